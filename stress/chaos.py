"""``python -m stress.chaos``: many workers at real work on a real checkpoint, while everything is done to them.

Workers route and compute recorded tokens, and compare the bytes under every lease with the file's. A tormentor kills,
stops and replaces workers and pagers (a standby always waits), fills the ring, corrupts reads, and makes experts and
the file unreadable and mends them. At the end all work that was begun is done, every output equals a dense reference,
and nothing is left: no lease, slot, lane, semaphore, file or process.
"""

from __future__ import annotations

import json
import random
import sys
import time
from dataclasses import dataclass, field
from typing import Annotated, Any

import typer
from rich.console import Console

from stress.checks import check_at_rest, check_removed
from stress.commands import (
    DEFAULT_CHECKPOINT,
    FAILED,
    BudgetOption,
    CheckpointOption,
    JsonOption,
    SeedOption,
    complain,
    run,
)
from stress.display import Show, display
from stress.errors import StressFailure
from stress.journal import Count
from stress.plan import Lever
from stress.stage import SABOTAGES, Stage
from stress.tormentor import Tormentor

KILLS_A_MINUTE, TAKEOVERS_A_MINUTE = 30, 5
"""A run with fewer has proved too little, and fails."""

STEP = 0.005


@dataclass
class Report:
    """What a run did and survived.

    Attributes
    ----------
    seconds : float
        From the moment at which all workers were ready to the last act.
    deaths : dict
        Of workers, pagers and standbys: all of them SIGKILLed.
    levers : dict
        How often each had its effect.
    operations, checks, errors, paging : dict
        What workers did; what was compared; the errors that faults led to, and that workers survived; the pager's and
        the router's own counters.
    failures : list of str
        What must hold and did not.
    """

    seed: int
    workers: int
    seconds: float = 0.0
    deaths: dict[str, int] = field(default_factory=dict)
    takeovers: int = 0
    levers: dict[str, int] = field(default_factory=dict)
    operations: dict[str, int] = field(default_factory=dict)
    checks: dict[str, int] = field(default_factory=dict)
    errors: dict[str, int] = field(default_factory=dict)
    paging: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    @property
    def kills(self) -> int:
        """All deaths."""
        return sum(self.deaths.values())

    def as_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {**vars(self), "kills": self.kills, "operations_total": sum(self.operations.values())}


def chaos(
    seconds: Annotated[float, typer.Option(min=1, help="How long things are done to the workers, at least.")] = 60.0,
    workers: Annotated[int, typer.Option(min=2, max=30, help="Worker processes at work.")] = 6,
    seed: SeedOption = None,
    checkpoint: CheckpointOption = DEFAULT_CHECKPOINT,
    budget: BudgetOption = "25%",
    kills: Annotated[int, typer.Option(min=0, help="Go on until so many processes were killed.")] = 0,
    as_json: JsonOption = False,
    sabotage: Annotated[str, typer.Option(hidden=True, help=f"One of {', '.join(SABOTAGES)}.")] = "",
) -> None:
    """Kill, stop and starve workers and pagers at real work, and check that nothing wedges, leaks or corrupts.

    Fails (exit code 1) if any byte under a lease, any output or anything at the end is wrong, or if fewer than 30
    processes were killed and 5 pagers followed in a minute. Goes on beyond --seconds until everything in the plan was
    done at least once. The seed decides what is done in which order; it is printed.

    Example: python -m stress.chaos --seconds 60 --workers 6 --seed 1
    """
    if sabotage and sabotage not in SABOTAGES:
        raise typer.BadParameter(f"must be one of {', '.join(SABOTAGES)}", param_hint="--sabotage")
    seed = random.randrange(1 << 32) if seed is None else seed
    console = Console(stderr=as_json, highlight=False, width=None if sys.stdout.isatty() else 140)
    console.print(f"seed {seed}, {workers} workers, budget {budget}; computing the dense reference …", soft_wrap=True)
    report = Report(seed, workers)
    stage = Stage(checkpoint, budget, workers, seed, "chaos", sabotage=sabotage)
    try:
        with stage, display(console, "chaos") as show:
            tormentor = Tormentor(stage, seed)
            try:
                _torment(stage, tormentor, report, seconds, kills, 0 if sabotage else 1, show)
            finally:
                _count(stage, tormentor, report)
            stage.finish_work()
            _count(stage, tormentor, report)
            report.failures += check_at_rest(stage)
            stage.remove()
            report.failures += check_removed(stage)
    except StressFailure as failure:
        report.failures.append(str(failure))
    report.failures += _shortcomings(report, seconds)
    _tell(console, report)
    if as_json:
        print(json.dumps(report.as_dict()))
    if report.failures:
        again = f"python -m stress.chaos --seconds {seconds:g} --workers {workers} --budget {budget} --seed {seed}"
        complain(console, f"again, with what is drawn drawn alike: {again}")
        raise typer.Exit(FAILED)


def _torment(
    stage: Stage, tormentor: Tormentor, report: Report, seconds: float, kills: int, rounds: int, show: Show
) -> None:
    began = time.monotonic()
    while True:
        stage.step()
        tormentor.step()
        spent = report.seconds = time.monotonic() - began
        dead = stage.crew.killed + stage.pagers.killed + stage.pagers.standbys_killed
        show(min(spent / seconds, dead / kills if kills else 1.0), _status(stage, dead))
        if spent >= seconds and dead >= kills and tormentor.rounds >= rounds:
            break
        time.sleep(STEP)

    def at_rest() -> bool:
        tormentor.go_on()
        return tormentor.at_rest and stage.pagers.complete

    stage.wait_until(at_rest, "everything that was broken is mended")


def _status(stage: Stage, dead: int) -> str:
    counts = stage.crew.counts()
    takeovers = stage.runtime.metrics().pager.counters["takeovers"]
    return (
        f"{dead} deaths  {takeovers} takeovers  {stage.work.done} items done  {counts[Count.LEASES]:,} leases  "
        f"{counts[Count.CHECKS]:,} checks"
    )


def _count(stage: Stage, tormentor: Tormentor, report: Report) -> None:
    """Take stock, while the segment is there to be read."""
    counts, metrics = stage.crew.counts(), stage.runtime.metrics()
    pager = metrics.pager.counters
    pagers = stage.pagers
    report.deaths = {"workers": stage.crew.killed, "pagers": pagers.killed, "standbys": pagers.standbys_killed}
    report.takeovers = pager["takeovers"]
    report.levers = {lever.value: tormentor.fired[lever] for lever in Lever} | {
        "workers killed in a lease": tormentor.killed_in_lease,
        "hints refused by a full ring": tormentor.ring_full,
        "requests refused by a full ring": metrics.total.counters["ring_full"],
        "checksum mismatches caught": pager["checksum_mismatches"],
        "pagers that found no file": pagers.refused,
        "lanes of the dead reaped": pager["reaped_lanes"],
        "items begun anew after a death": stage.work.redone,
    }
    report.operations = {
        "tokens routed": counts[Count.TOKENS],
        "leases": counts[Count.LEASES],
        "hints": counts[Count.HINTS],
        "looks": counts[Count.LOOKS],
        "attaches": counts[Count.ATTACHES],
        "loads": pager["loads"],
        "evictions": pager["evictions"],
    }
    report.checks = {"digests under leases": counts[Count.CHECKS], "items against the reference": stage.work.done}
    report.errors = dict(sorted(stage.crew.errors.items()))
    report.paging = {**pager, **{key: metrics.total.counters[key] for key in ("hits", "misses", "waits")}}


_MUST_FIRE = (
    *(lever.value for lever in Lever),
    "hints refused by a full ring",
    "checksum mismatches caught",
    "pagers that found no file",
)


def _shortcomings(report: Report, seconds: float) -> list[str]:
    """What a run that has failed in nothing else should have shown and did not."""
    if report.failures:
        return []
    found = [f"nothing ever came of: {name}" for name in _MUST_FIRE if report.levers[name] == 0]
    for what, count, rate in (
        ("processes were killed", report.kills, KILLS_A_MINUTE),
        ("pagers followed another", report.takeovers, TAKEOVERS_A_MINUTE),
    ):
        if count < int(rate * seconds / 60):
            found.append(f"only {count} {what} in {seconds:g} s, fewer than {rate} a minute")
    if report.checks["items against the reference"] == 0:
        found.append("no work was done")
    return found


def _tell(console: Console, report: Report) -> None:
    deaths = ", ".join(f"{count} {who}" for who, count in report.deaths.items())
    console.print(f"seed {report.seed}, {report.workers} workers, {report.seconds:.1f} s")
    console.print(f"deaths survived  {report.kills} ({deaths}); {report.takeovers} takeovers")
    for title, counts in (
        ("operations done", report.operations),
        ("checks made", report.checks),
        ("done to them", report.levers),
        ("errors survived", report.errors),
    ):
        console.print(title)
        for name, count in counts.items():
            console.print(f"{count:14,}  {name}", soft_wrap=True)
    for failure in report.failures:
        complain(console, f"FAILED: {failure}")
    if not report.failures:
        console.print("all work that was begun is done and right; nothing is left")


if __name__ == "__main__":
    run(chaos)
