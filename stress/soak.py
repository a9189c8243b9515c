"""``python -m stress.soak``: steady work for hours, to see that nothing grows and nothing slows down.

Workers play recorded tokens and check the bytes under every lease; each leaves and attaches anew now and then, and the
pager hands over to its standby now and then. Memory, descriptors and threads of every process are sampled all along,
and so are the latencies of routing and waiting, from the differences of the shared histograms.

A trend in memory or descriptors fails the run. So does latency, if the run is long enough to tell drift from a busy
machine.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from shmroute.shared.metrics import Histogram, WorkerMetrics
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
from stress.growth import Allowance, Series
from stress.journal import Count
from stress.stage import Stage

SAMPLES = 60
"""Periods of a short run."""

LONGEST_PERIOD = 30.0
HAND_OVER_EVERY = 600.0
"""Seconds between handovers of a long run; a short one has two."""

REATTACH_AFTER = 40
"""Items of work after which a worker attaches anew."""

LATENCY_FACTOR = 1.5
"""What the median latency of the last quarter may be of the first quarter's."""

JUDGE_LATENCY_FROM = 600.0
"""Seconds that a run must last for its latencies to be judged: shorter ones measure the machine's other work."""


@dataclass
class Latencies:
    """Percentiles of one period, in microseconds; None if nothing was timed in it."""

    at: float
    route_p50: float | None
    route_p99: float | None
    wait_p50: float | None


@dataclass
class Report:
    """What a run did, and what became of what it held.

    Attributes
    ----------
    growth : list of dict
        For each process: ``role``, ``pid``, ``samples`` and the growth of ``memory`` (bytes), ``descriptors`` and
        ``threads`` after the warm-up, None where there were too few samples.
    drift : dict
        Median latency of the first and of the last quarter, in microseconds, and the factor between them.
    failures : list of str
    """

    seed: int
    workers: int
    seconds: float = 0.0
    operations: dict[str, int] = field(default_factory=dict)
    growth: list[dict[str, Any]] = field(default_factory=list)
    drift: dict[str, dict[str, float]] = field(default_factory=dict)
    drift_judged: bool = False
    periods: list[Latencies] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def soak(
    hours: Annotated[float, typer.Option(min=0)] = 0.0,
    minutes: Annotated[float, typer.Option(min=0)] = 0.0,
    seconds: Annotated[float, typer.Option(min=0, help="The three add up; an hour if none is given.")] = 0.0,
    workers: Annotated[int, typer.Option(min=1, max=30, help="Worker processes at work.")] = 4,
    seed: SeedOption = None,
    checkpoint: CheckpointOption = DEFAULT_CHECKPOINT,
    budget: BudgetOption = "50%",
    judge_latency: Annotated[
        bool | None,
        typer.Option(
            "--judge-latency/--no-judge-latency",
            help="Whether drift of latency fails the run; by default if it lasts 10 minutes or more.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Work steadily, with workers that come and go and pagers that hand over, and check that nothing grows.

    Fails (exit code 1) if the memory of a process grows by more than 6 MB after its first quarter, if its descriptors
    or threads grow at all, if median latency in the last quarter is over 1.5 times the first quarter's, or if anything
    is wrong or left at the end.

    Example: python -m stress.soak --hours 2
    """
    length = hours * 3600 + minutes * 60 + seconds or 3600.0
    if length < 1:
        raise typer.BadParameter("a run lasts a second or more", param_hint="--seconds")
    seed = random.randrange(1 << 32) if seed is None else seed
    console = Console(stderr=as_json, highlight=False, width=None if sys.stdout.isatty() else 140)
    console.print(f"seed {seed}, {workers} workers, {length:g} s, budget {budget}; computing the dense reference …")
    report = Report(seed, workers)
    report.drift_judged = length >= JUDGE_LATENCY_FROM if judge_latency is None else judge_latency
    try:
        with (
            Stage(checkpoint, budget, workers, seed, "soak", reattach=REATTACH_AFTER) as stage,
            display(console, "soak") as show,
        ):
            _Soak(stage, report, length).go(show)
            stage.finish_work()
            report.failures += check_at_rest(stage)
            stage.remove()
            report.failures += check_removed(stage)
    except StressFailure as failure:
        report.failures.append(str(failure))
    _tell(console, report)
    if as_json:
        print(json.dumps(asdict(report)))
    if report.failures:
        raise typer.Exit(FAILED)


class _Soak:
    """One run: goes on, samples and judges."""

    def __init__(self, stage: Stage, report: Report, length: float) -> None:
        self._stage, self._report, self._length = stage, report, length
        self._period = min(length / SAMPLES, LONGEST_PERIOD)
        self._hand_over_every = min(length / 3, HAND_OVER_EVERY)
        self._series: dict[tuple[str, int], Series] = {}
        self._before = stage.runtime.metrics().total
        self._files = len(stage.shared_files())

    def go(self, show: Show) -> None:
        """Run to the end, and write down what there is to say."""
        stage = self._stage
        began = time.monotonic()
        next_sample, next_hand_over = began + self._period, began + self._hand_over_every
        while (now := time.monotonic()) < began + self._length:
            stage.step()
            if now >= next_sample:
                next_sample += self._period
                self._sample(now - began)
            if now >= next_hand_over and stage.pagers.complete:
                next_hand_over += self._hand_over_every
                stage.pagers.hand_over()
            show((now - began) / self._length, self._status())
            time.sleep(0.01)
        self._report.seconds = time.monotonic() - began
        stage.wait_until(lambda: stage.pagers.complete, "a pager serves and a standby waits")
        self._judge()

    def _status(self) -> str:
        counts = self._stage.crew.counts()
        latest = self._report.periods[-1] if self._report.periods else None
        latency = "" if latest is None or latest.route_p50 is None else f"  route p50 {latest.route_p50:.1f} µs"
        done = f"{self._stage.work.done} items  {counts[Count.CHECKS]:,} checks  {counts[Count.ATTACHES]} attaches"
        return done + latency

    def _sample(self, at: float) -> None:
        stage = self._stage
        members = [("worker", worker.pid) for worker in stage.crew.workers] + [("owner", os.getpid())]
        if stage.pagers.pager is not None:
            members.append(("pager", stage.pagers.pager.pid))
        for role, pid in members:
            self._series.setdefault((role, pid), Series(role, pid)).sample(at)
        total = stage.runtime.metrics().total
        self._report.periods.append(_latencies(at, self._before, total))
        self._before = total

    def _judge(self) -> None:
        stage, report = self._stage, self._report
        allowed = Allowance()
        for series in self._series.values():
            report.failures += series.complaints(allowed)
            growth = {name: series.growth(name) for name in ("memory", "descriptors", "threads")}
            report.growth.append({"role": series.role, "pid": series.pid, "samples": len(series.times), **growth})
        files = len(stage.shared_files())
        if files > self._files + 1:  # the lane that this process may claim
            report.failures.append(f"files in /dev/shm grew from {self._files} to {files}")
        for name in ("route_p50", "route_p99", "wait_p50"):
            self._judge_latency(name)
        counts, pager = stage.crew.counts(), stage.runtime.metrics().pager.counters
        report.operations = {
            "tokens routed": counts[Count.TOKENS],
            "leases": counts[Count.LEASES],
            "digests under leases": counts[Count.CHECKS],
            "items against the reference": stage.work.done,
            "attaches": counts[Count.ATTACHES],
            "takeovers": pager["takeovers"],
            "loads": pager["loads"],
            "evictions": pager["evictions"],
        }
        report.failures += [f"nothing was done: {name}" for name, count in report.operations.items() if count == 0]

    def _judge_latency(self, name: str) -> None:
        values = [value for period in self._report.periods if (value := getattr(period, name)) is not None]
        quarter = len(values) // 4
        if quarter == 0:
            return
        first, last = float(np.median(values[:quarter])), float(np.median(values[-quarter:]))
        self._report.drift[name] = {"first": first, "last": last, "factor": last / first}
        # The 99th percentile is shown but not judged: it is of the machine's scheduler more than of the runtime.
        if self._report.drift_judged and name != "route_p99" and last > LATENCY_FACTOR * first:
            self._report.failures.append(
                f"{name} went from {first:.1f} µs to {last:.1f} µs, over {LATENCY_FACTOR:g} times as much"
            )


def _latencies(at: float, before: WorkerMetrics, now: WorkerMetrics) -> Latencies:
    """Of what was timed between two snapshots."""

    def percentile(name: str, share: float) -> float | None:
        ns = Histogram(getattr(now, name).counts - getattr(before, name).counts).percentile(share)
        return None if ns is None else ns / 1000

    return Latencies(at, percentile("route", 0.5), percentile("route", 0.99), percentile("wait", 0.5))


def _tell(console: Console, report: Report) -> None:
    console.print(f"seed {report.seed}, {report.workers} workers, {report.seconds:.1f} s")
    for name, count in report.operations.items():
        console.print(f"{count:14,}  {name}")
    for process in report.growth:
        if process["memory"] is not None:
            console.print(
                f"{process['role']} {process['pid']}: memory {process['memory'] / 1e6:+.2f} MB, descriptors "
                f"{process['descriptors']:+.1f}, threads {process['threads']:+.1f} over {process['samples']} samples"
            )
    for name, drift in report.drift.items():
        judged = "" if report.drift_judged and name != "route_p99" else " (not judged)"
        console.print(
            f"{name}: {drift['first']:.1f} µs in the first quarter, {drift['last']:.1f} µs in the last{judged}"
        )
    for failure in report.failures:
        complain(console, f"FAILED: {failure}")
    if not report.failures:
        console.print("nothing grew; all work is done and right; nothing is left")


if __name__ == "__main__":
    run(soak)
