"""Search, replay and break the protocols from a command line: ``python -m tests.interleaving --help``."""

from __future__ import annotations

import os

os.environ["NUMBA_DISABLE_JIT"] = "1"  # before anything imports Numba: the kernels run interpreted

import json
import sys
from collections.abc import Callable
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from .mutants import MUTANTS
from .mutation import Mutant
from .search import Kill, Report, Walks, exhaust, hunt, replay, search
from .world import World
from .worlds import WORLDS

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, help=__doc__)
console = Console()

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Names = Annotated[list[str] | None, typer.Argument(help="Which; all if none is named.")]


def _worlds(names: list[str] | None) -> dict[str, type[World]]:
    unknown = [name for name in names or () if name not in WORLDS]
    if unknown:
        raise typer.BadParameter(f"no world {', '.join(unknown)}; there are {', '.join(WORLDS)}")
    return {name: WORLDS[name] for name in names or WORLDS}


def _progress() -> Progress:
    """A bar on a terminal, nothing in a file."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty(),
    )  # fmt: skip


def _row(name: str, how: str, report: Report) -> dict[str, object]:
    return {
        "world": name,
        "search": how,
        "schedules": report.runs,
        "complete": report.complete,
        "steps_per_schedule": round(report.steps / max(report.runs, 1), 1),
        "deaths": report.deaths,
        "timeouts": report.timeouts,
        "seconds": round(report.seconds, 3),
        "schedules_per_minute": round(report.runs / report.seconds * 60) if report.seconds else None,
        "found": None if report.found is None else str(report.found),
    }


def _show(rows: list[dict[str, object]], as_json: bool) -> None:
    if as_json:
        print(json.dumps(rows))
        return
    table = Table("world", "search", "schedules", "steps each", "deaths", "a minute", box=None)
    for row in rows:
        schedules = f"{row['schedules']:,}" + (" (all)" if row["complete"] else "")
        table.add_row(
            str(row["world"]), str(row["search"]), schedules, str(row["steps_per_schedule"]), f"{row['deaths']:,}",
            f"{row['schedules_per_minute']:,}",
        )  # fmt: skip
    console.print(table)
    for row in rows:
        if row["found"]:
            console.print(f"[bold]{row['world']}[/]: {row['found']}", highlight=False, soft_wrap=True)


@app.command("worlds")
def list_worlds() -> None:
    """What there is to search."""
    table = Table("world", "processes", box=None)
    for name, world in WORLDS.items():
        table.add_row(name, world.title)
    console.print(table)


@app.command("search")
def search_worlds(
    worlds: Names = None,
    runs: Annotated[int, typer.Option(min=1, help="Schedules for each world and way of searching.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="Of the random ways.")] = 0,
    preemptions: Annotated[int, typer.Option(min=0, help="Bound of the exhaustive way; 0 leaves it out.")] = 0,
    deaths: Annotated[int, typer.Option(min=0, help="Deaths in the exhaustive way.")] = 1,
    as_json: Json = False,
) -> None:
    """Run worlds under many schedules: random walks, PCT, threads alone; and, with --preemptions, all within a bound.

    Exits with 1 if something does not hold, and prints the schedule.
    """
    rows = []
    with _progress() as progress:

        def bar(name: str, how: str) -> Callable[[Report], None]:
            task = progress.add_task(f"{name}, {how}", total=runs)
            return lambda report: progress.update(task, completed=report.runs)

        for name, world in _worlds(worlds).items():
            rows.append(
                _row(name, "random", search(name, world, Walks(world, seed), runs=runs, progress=bar(name, "random")))
            )
            if preemptions:
                how = f"≤ {preemptions} preemptions, ≤ {deaths} deaths"
                report = exhaust(
                    name, world, preemptions=preemptions, deaths=deaths, runs=runs, progress=bar(name, "exhaustive")
                )
                rows.append(_row(name, how, report))
    _show(rows, as_json)
    raise typer.Exit(1 if any(row["found"] for row in rows) else 0)


@app.command("replay")
def replay_schedule(
    world: Annotated[str, typer.Argument(help="As the finding names it.")],
    schedule: Annotated[str, typer.Argument(help="As the finding prints it.")],
    mutant: Annotated[str | None, typer.Option(help="Break this rule first.")] = None,
) -> None:
    """Make the very same run again. Exits with 1 if something does not hold."""
    chosen = _worlds([world])[world]
    broken = _mutants([mutant]) if mutant else []
    try:
        if broken:
            with broken[0].applied():
                outcome = replay(chosen, schedule)
        else:
            outcome = replay(chosen, schedule)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    console.print(f"{outcome.steps} steps, {outcome.deaths} deaths, {outcome.timeouts} timeouts")
    console.print(outcome.details or "everything holds", highlight=False, soft_wrap=True)
    raise typer.Exit(0 if outcome.failure is None else 1)


def _mutants(names: list[str] | None) -> list[Mutant]:
    unknown = set(names or ()) - {mutant.name for mutant in MUTANTS}
    if unknown:
        raise typer.BadParameter(f"no mutant {', '.join(sorted(unknown))}; see: python -m tests.interleaving mutants")
    return [mutant for mutant in MUTANTS if not names or mutant.name in names]


@app.command("mutants")
def kill_mutants(
    names: Names = None,
    runs: Annotated[int, typer.Option(min=1, help="Schedules for each mutant and world, at most.")] = 20_000,
    seed: Annotated[int, typer.Option(min=0, help="Of the random ways.")] = 0,
    as_json: Json = False,
) -> None:
    """Break each protocol rule, and see the search find it. Exits with 1 if one survives."""
    kills: list[Kill] = []
    chosen = _mutants(names)
    with _progress() as progress:
        task = progress.add_task("mutants", total=len(chosen))
        for mutant in chosen:
            progress.update(task, description=mutant.name)
            kills.append(hunt(mutant, WORLDS, runs=runs, seed=seed))
            progress.advance(task)
    if as_json:
        print(json.dumps([kill.as_dict() for kill in kills]))
    else:
        table = Table("mutant", "rule", "killed by", "schedules", "the shortest found", box=None)
        for kill in kills:
            table.add_row(kill.mutant.name, kill.mutant.rule, kill.world or "nobody", f"{kill.runs:,}", kill.shown)
        console.print(table)
    raise typer.Exit(0 if all(kill.world for kill in kills) else 1)


@app.command("speed")
def speed(
    runs: Annotated[int, typer.Option(min=1, help="Schedules for each way.")] = 5_000, as_json: Json = False
) -> None:
    """How many schedules of three processes on one ring are run in a minute."""
    name = "ring-two-producers"
    rows = [
        _row(name, "random", search(name, WORLDS[name], Walks(WORLDS[name], 0), runs=runs)),
        _row(name, "exhaustive", exhaust(name, WORLDS[name], preemptions=3, deaths=1, runs=runs)),
    ]
    _show(rows, as_json)


if __name__ == "__main__":
    try:
        app(prog_name="python -m tests.interleaving")
    except KeyboardInterrupt:
        sys.exit(130)
