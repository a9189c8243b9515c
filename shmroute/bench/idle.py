"""Doing nothing: the share of a core that an idle pager and idle workers use."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from shmroute.bench.concurrency import cpus_of
from shmroute.bench.measuring import Contestant, contest, cpu_ns, unpinned
from shmroute.bench.partners import crew, held, let_go
from shmroute.bench.report import Table, table
from shmroute.bench.stage import Bench, segment_name, segment_of
from shmroute.config import PagerConfig, RuntimeConfig
from shmroute.errors import ShmrouteError
from shmroute.lifecycle import attach, create
from shmroute.shared.layout import HEADER_PAGER
from shmroute.shared.words import identity_pid
from shmroute.sources import SyntheticSource

POLL = 0.001
"""Seconds between the looks of a process that polls instead."""


def measure(bench: Bench) -> Iterator[Table]:
    """One table: all processes at once, in windows of a second or so."""
    window = 0.5 if bench.scale.quick else 2.0
    rounds = 4 if bench.scale.quick else 6
    idle, waiting, polling, nothing = crew(bench.resources, bench.shared, 4, cpus_of(bench))
    # One read outlasts the measurement, so that whoever wants that expert waits all the time.
    longest = window * (rounds + 2) * 5 + 10
    source = SyntheticSource(1, 8, 64, 64, delay=longest)
    config = RuntimeConfig.from_checkpoint(source, "50%", pager=PagerConfig(prefetch=0))
    with unpinned(), create(segment_name(), config, pager=True, progress=None) as runtime:
        idle.call(be_attached, runtime.name)
        waiting.call(be_attached, runtime.name)
        total = window * (rounds + 1) + 2
        waiting.begin(wait_for_an_expert, total)
        polling.begin(poll, total)
        pager = identity_pid(segment_of(runtime).read(HEADER_PAGER))
        shares = _Shares([pager, idle.pid, waiting.pid, polling.pid, nothing.pid], window)
        names = (
            "pager, nothing to do",
            "worker, attached",
            "worker that waits for an expert",
            f"a process that looks every {POLL * 1000:g} ms instead",
            "a Python process that waits for a pipe",
        )
        results = contest([Contestant(name, partial(shares.of, i)) for i, name in enumerate(names)], rounds)
        for partner in (waiting, polling):
            partner.result()
        idle.call(let_go)
        waiting.call(let_go)
    yield table(
        "idle/share", "processes with nothing to do", "% of a core", results,
        note="CPU time by the kernel's clock of each process; the pager has one load under way, which sleeps",
    )  # fmt: skip


class _Shares:
    """CPU shares of several processes in one window after the other, all in the same one.

    A contest asks for one after the other; the first question of a round measures them all.
    """

    def __init__(self, pids: list[int], window: float) -> None:
        self._pids, self._window = pids, window
        self._left: dict[int, float] = {}

    def of(self, index: int) -> float:
        """The share of one process, in percent."""
        if index not in self._left:
            began, before = time.monotonic_ns(), [cpu_ns(pid) for pid in self._pids]
            time.sleep(self._window)
            elapsed = time.monotonic_ns() - began
            used = [cpu_ns(pid) - start for pid, start in zip(self._pids, before, strict=True)]
            self._left = {i: nanoseconds / elapsed * 100 for i, nanoseconds in enumerate(used)}
        return self._left.pop(index)


# ---------------------------------------------------------- in the partners


def be_attached(inherited: dict[str, Any], name: str) -> None:
    """Attach and claim a lane."""
    held["runtime"] = attach(name, progress=None)
    held["runtime"].router(0)


def wait_for_an_expert(inherited: dict[str, Any], seconds: float) -> None:
    """Wait for an expert that does not come."""
    try:
        with held["runtime"].expert(0, 0, timeout=seconds):
            raise RuntimeError("the expert came")
    except ShmrouteError:
        return


def poll(inherited: dict[str, Any], seconds: float) -> None:
    """Look at the clock again and again."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(POLL)
