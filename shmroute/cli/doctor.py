"""``shmroute doctor``: is this machine fit, is this installation sound, was anything left behind."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.text import Text

from shmroute.cli.checks import MACHINE, OK, PROBLEM, WARNING, Check
from shmroute.cli.destroy import unlink_orphans
from shmroute.cli.inspection import ABANDONED, FOREIGN, UNREADABLE, survey
from shmroute.cli.output import console, human_bytes
from shmroute.cli.self_check import check_atomics, check_cache, check_kernels
from shmroute.errors import KernelCacheError
from shmroute.lifecycle import reclaim, report_compilation
from shmroute.shared.kernel import load_kernels
from shmroute.shared.removal import orphans
from shmroute.shared.segment import PREFIX, SHM

STYLES = {OK: "green", WARNING: "yellow", PROBLEM: "bold red"}


def doctor(
    as_json: Annotated[
        bool,
        typer.Option("--json", help='One JSON object: {"ok": …, "checks": \\[{name, status, detail, remedy}, …]}.'),
    ] = False,
    fix: Annotated[
        bool,
        typer.Option("--fix", help="Remove abandoned segments, orphans, and kernel caches of other versions."),
    ] = False,
) -> None:
    """Check the machine, the installation, and what was left behind.

    Each check is ok, a warning or a problem, with a remedy. Exit code 0 if there is no problem, else 1.

    Example: shmroute doctor --fix
    """
    checks = [look() for look in MACHINE]
    try:
        load_kernels(report_compilation)
    except KernelCacheError as error:
        checks.append(Check("kernel cache", PROBLEM, str(error), "see there; nothing else can be checked before"))
    else:
        checks += [check_kernels(), check_atomics(), check_cache(fix), *check_segments(fix), check_orphans(fix)]
    fine = all(check.status != PROBLEM for check in checks)
    if as_json:
        typer.echo(json.dumps({"ok": fine, "checks": [asdict(check) for check in checks]}))
    else:
        _show(checks)
    if not fine:
        raise typer.Exit(1)


def _show(checks: list[Check]) -> None:
    out = console()
    width = max(len(check.name) for check in checks)
    for check in checks:
        line = Text.assemble((f"{check.status:<8}", STYLES[check.status]), f"{check.name:<{width}}  {check.detail}")
        out.print(line, soft_wrap=True)
        if check.remedy:
            out.print(Text(f"{'':<{8 + width}}  → {check.remedy}", style="bold"), soft_wrap=True)


def check_segments(fix: bool) -> list[Check]:
    """One check for each segment that is not in order; `fix` removes the abandoned."""
    found = survey()
    checks = []
    for one in found:
        if one.state == ABANDONED:
            checks.append(_abandoned(one.name, one.bytes, fix))
        elif one.state in (FOREIGN, UNREADABLE):
            how = (
                f"shmroute destroy {one.name} --force" if one.state == UNREADABLE else f"rm {SHM / (PREFIX + one.name)}"
            )
            remedy = f"if it is yours and nobody uses it: {how}"
            checks.append(Check("segments", WARNING, f"{one.name!r}: {one.reason}", remedy))
    return checks or [Check("segments", OK, f"{len(found)}, none abandoned")]


def _abandoned(name: str, size: int, fix: bool) -> Check:
    detail = f"{name!r} is abandoned and holds {human_bytes(size)}: owner, pager and workers are dead"
    if not fix:
        return Check("segments", PROBLEM, detail, "shmroute doctor --fix removes it, shmroute pager takes it over")
    if reclaim(name):
        return Check("segments", OK, f"{name!r} was abandoned; removed, {human_bytes(size)} freed")
    return Check("segments", WARNING, f"{name!r} was abandoned, but somebody took it over just now")


def check_orphans(fix: bool) -> Check:
    """Lock files and semaphores of no segment; `fix` removes them."""
    found = unlink_orphans() if fix else orphans()
    names = ", ".join(path.name for path in found)
    if not found:
        return Check("orphans", OK, "none")
    if fix:
        return Check("orphans", OK, f"removed {len(found)}: {names}")
    return Check("orphans", WARNING, f"{len(found)} belong to no segment: {names}", "shmroute doctor --fix")
