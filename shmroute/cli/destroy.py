"""``shmroute destroy``: removing a segment, or what was left of one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from shmroute import lifecycle
from shmroute.cli.inspection import ABANDONED, CLOSING, FOREIGN, UNREADABLE, look_at
from shmroute.cli.output import note
from shmroute.errors import SegmentExistsError, SegmentForeignError, SegmentPermissionError
from shmroute.shared.kernel import load_kernels
from shmroute.shared.layout import HEADER_CONFIG, HEADER_MAGIC, HEADER_UUID, MAGIC
from shmroute.shared.removal import orphans
from shmroute.shared.segment import checked_name, segment_path


def destroy(
    name: Annotated[str | None, typer.Argument(help="Of the segment.", show_default=False)] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Also if it is in use, or was made by another version of shmroute."),
    ] = False,
    remove_orphans: Annotated[
        bool, typer.Option("--orphans", help="Remove lock files and semaphores that belong to no segment.")
    ] = False,
) -> None:
    """Remove a segment: its pager ends, workers that wait get SegmentClosingError.

    A segment that a live owner, pager, standby or worker uses is removed with --force only; on a terminal you are
    asked instead. Exit code 1 if it is not removed.

    Example: shmroute destroy demo --force
    """
    if name is None and not remove_orphans:
        raise typer.BadParameter("say which segment, or --orphans", param_hint="'NAME'")
    if name is not None:
        _destroy(checked_name(name), force)
    if remove_orphans:
        removed = unlink_orphans()
        note(f"removed {len(removed)} orphan{'s' * (len(removed) != 1)}")


def _destroy(name: str, force: bool) -> None:
    load_kernels(lifecycle.report_compilation)
    found = look_at(name)
    if found is not None and found.state in (FOREIGN, UNREADABLE):
        _remove_unreadable(name, force, found.reason or found.state)
        note(f"removed the segment {name!r}, whatever used it")
        return
    if found is not None and found.state not in (ABANDONED, CLOSING) and not force:
        assert found.users is not None
        users = ", ".join(found.users.living())
        if not sys.stdin.isatty():
            raise SegmentExistsError(f"{name!r} is in use by {users}; add --force to remove it nevertheless")
        typer.confirm(f"{name!r} is in use by {users}. Remove it nevertheless?", abort=True)
    lifecycle.destroy(name)
    note(f"removed the segment {name!r}")


def _remove_unreadable(name: str, force: bool, reason: str) -> None:
    """Remove a segment that this version cannot attach to: its users cannot be told, so only when asked to."""
    path = segment_path(name)
    if path.is_symlink() or not path.is_file():
        raise SegmentForeignError(f"{reason}; remove it by hand if it is yours: rm {path}")
    try:
        with path.open("rb") as file:
            header = file.read(HEADER_CONFIG)
    except PermissionError:
        raise SegmentPermissionError(reason) from None
    if int.from_bytes(header[HEADER_MAGIC : HEADER_MAGIC + 8], "little") != MAGIC:
        raise SegmentForeignError(f"{reason}; remove it by hand if it is yours: rm {path}")
    if not force:
        raise SegmentExistsError(f"{reason}; add --force to remove it, whoever uses it")
    path.unlink(missing_ok=True)
    if len(header) >= HEADER_UUID + 16:
        unlink_orphans(header[HEADER_UUID : HEADER_UUID + 16].hex())  # what goes with it became orphaned just now


def unlink_orphans(uuid: str = "") -> list[Path]:
    """Remove all orphans, or those of one segment that is gone; the paths removed."""
    found = [path for path in orphans() if uuid in path.name]
    for path in found:
        path.unlink(missing_ok=True)
    return found
