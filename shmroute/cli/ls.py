"""``shmroute ls``: all segments and what was left behind."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from shmroute.cli.inspection import ABANDONED, CLOSING, FOREIGN, LIVE, NO_PAGER, UNREADABLE, Found, survey
from shmroute.cli.output import console, human_bytes
from shmroute.lifecycle import report_compilation
from shmroute.shared.kernel import load_kernels
from shmroute.shared.removal import orphans
from shmroute.shared.segment import SHM

STYLES = {LIVE: "green", NO_PAGER: "yellow", ABANDONED: "red", CLOSING: "yellow", FOREIGN: "dim", UNREADABLE: "red"}


def ls(
    as_json: Annotated[
        bool,
        typer.Option("--json", help='One JSON object: {"segments": \\[…], "orphans": \\[path, …]}.'),
    ] = False,
) -> None:
    """List all segments in /dev/shm, who uses them, and orphans.

    A segment is [green]live[/] (a pager serves it), has [yellow]no pager[/] but other users, is [red]abandoned[/]
    (owner, pager, standby and workers are dead: 'shmroute doctor --fix' removes it, 'shmroute pager' takes it over),
    closing, foreign or unreadable. Orphans are lock files and semaphores that belong to no segment.

    Keys of a segment: name, state, bytes, slots, owner, pager, standby (each pid and state: alive, stopped, dead or
    none), workers (lane, pid and state of each), reason (why it cannot be read).

    Example: shmroute ls --json
    """
    load_kernels(report_compilation)
    found, left = survey(), [str(path) for path in orphans()]
    if as_json:
        typer.echo(json.dumps({"segments": [one.as_dict() for one in found], "orphans": left}))
        return
    out = console()
    if found:
        out.print(_table(found))
    else:
        out.print(f"no segments in {SHM}")
    for path in left:
        out.print(Text(f"orphan: {path}", style="yellow"), soft_wrap=True)
    if left:
        out.print("remove orphans with: shmroute destroy --orphans")


def _table(found: list[Found]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("NAME", "STATE"):
        table.add_column(name, no_wrap=True)
    for name in ("SIZE", "SLOTS", "OWNER", "PAGER", "STANDBY", "WORKERS"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("NOTE", overflow="fold")
    for one in found:
        users = one.users
        who = [str(users.owner), str(users.pager), str(users.standby), _workers(one)] if users else ["-"] * 4
        table.add_row(
            Text(one.name),
            Text(one.state, style=STYLES[one.state]),
            human_bytes(one.bytes),
            "-" if one.slots is None else str(one.slots),
            *who,
            Text(one.reason or ""),
        )
    return table


def _workers(found: Found) -> str:
    assert found.users is not None
    live = len(found.users.live_workers)
    dead = len(found.users.workers) - live
    return f"{live} (+{dead} dead)" if dead else str(live)
