"""What the cores are used for: how much a second of waiting, or of CPU time, is worth.

With `idle` cores idle and `waiting` workers that wait for loads, both on average over the time between two sweeps:

- A waiting worker loses time only as far as its core idles meanwhile: of each second of waiting at most
  ``idle / waiting``. Where other workers take the core, nothing is lost by waiting.
- CPU time of the pager is taken from a worker unless a core is idle: ``1 - idle`` of each second, while that is not
  negative.

Idle time is that of the CPUs that the pager may run on, as ``/proc/stat`` counts it (waiting for a disk is idle);
workers are taken to run on the same. Where the file cannot be read, or does not know these CPUs, all are taken to be
idle, so that prefetches are judged by waiting alone; so it is where a control group's quota, and not the lack of cores,
keeps processes waiting. Pressure stall information was tried too, and says less: of four workers on two cores that
never idled, nobody waited for a core for a quarter of the time, since just as many were ready as there are cores.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Set
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from shmroute.shared.atomic import WORD
from shmroute.shared.layout import LANE_SHARD
from shmroute.shared.metrics import LaneCounter, PagerCounter
from shmroute.shared.segment import Segment

SHORTEST: Final = 0.1
"""Seconds between two measurements at least: the kernel counts hundredths."""
RATE: Final = 1 / 4
"""What one measurement weighs in the average CPU time of a load."""
STAT: Final = Path("/proc/stat")
_IDLE: Final = (3, 4)  # idle, iowait
_COUNTED: Final = 8  # guest time is counted as user time too


class Usage(Protocol):
    """What seconds are worth, and how many are spent.

    Attributes
    ----------
    waiting_weight, cpu_weight : float
        0 … 1.
    load_cpu : float
        CPU seconds of one load.
    """

    waiting_weight: float
    cpu_weight: float
    load_cpu: float

    def thread_seconds(self) -> float:
        """CPU time of the calling thread so far."""

    def waited(self, lane: int) -> float:
        """Seconds that a lane's workers have waited for loads so far: each wait is counted when it ends."""


class IdleCores:
    """Cores that are idle whenever a worker waits, and thoughts that take no time: a replay's."""

    waiting_weight, cpu_weight, load_cpu = 1.0, 0.0, 0.0

    def thread_seconds(self) -> float:
        """0."""
        return 0.0

    def waited(self, lane: int) -> float:
        """0."""
        return 0.0


def idle_and_all(stat: str, cpus: Set[int]) -> tuple[int, int] | None:
    """What ``/proc/stat`` says that some CPUs were idle, and existed, in ticks of its own; None if it does not know."""
    idle = everything = found = 0
    for line in stat.splitlines():
        name, *fields = line.split()
        if not name.startswith("cpu") or not name[3:].isdigit() or int(name[3:]) not in cpus:
            continue
        ticks = [int(field) for field in fields[:_COUNTED]]
        idle += sum(ticks[i] for i in _IDLE)
        everything += sum(ticks)
        found += 1
    return (idle, everything) if found == len(cpus) else None


class MeasuredUsage:
    """The usage that one pager measures at its sweeps.

    Parameters
    ----------
    segment : Segment
    """

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._cpus = os.sched_getaffinity(0)
        self._cpu, self._loads = 0.0, 0.0
        self._looked_at = time.monotonic()
        self._ticks = self._read_ticks()
        self._counts = self._read_counts()
        self.waiting_weight, self.cpu_weight, self.load_cpu = 1.0, 0.0, 0.0

    def thread_seconds(self) -> float:
        """CPU time of the calling thread so far."""
        return time.thread_time()

    def waited(self, lane: int) -> float:
        """Seconds that a lane's workers have waited for loads so far: each wait is counted when it ends."""
        return self._segment.read(self._segment.layout.lane(lane) + LANE_SHARD + LaneCounter.WAIT_NS * WORD) / 1e9

    def look(self) -> float:
        """Measure, if it is time; the CPU seconds that workers have speculated for since this last did."""
        now = time.monotonic()
        seconds = now - self._looked_at
        if seconds < SHORTEST:
            return 0.0
        self._looked_at = now
        idle = self._idle_cores()
        waited, speculated, cpu, loads = self._count()
        self.waiting_weight = min(idle / max(waited / seconds, 1e-9), 1.0)
        self.cpu_weight = max(1.0 - idle, 0.0)
        if loads:
            self._cpu += cpu - self._cpu * RATE
            self._loads += loads - self._loads * RATE
            self.load_cpu = self._cpu / self._loads
        return speculated

    def _idle_cores(self) -> float:
        """How many cores were idle on average since the last time."""
        before, self._ticks = self._ticks, self._read_ticks()
        if before is None or self._ticks is None or (passed := self._ticks[1] - before[1]) <= 0:
            return float(len(self._cpus))
        return len(self._cpus) * min(max((self._ticks[0] - before[0]) / passed, 0.0), 1.0)

    def _read_ticks(self) -> tuple[int, int] | None:
        with contextlib.suppress(OSError, ValueError, IndexError):
            return idle_and_all(STAT.read_text(encoding="ascii"), self._cpus)
        return None

    def _count(self) -> tuple[float, float, float, float]:
        """Seconds that workers waited and speculated, CPU seconds of this process, and loads, since the last time."""
        before, self._counts = self._counts, self._read_counts()
        waited, speculated, cpu, loads = (self._counts - before).tolist()
        return waited / 1e9, speculated / 1e9, cpu / 1e9, loads

    def _read_counts(self) -> npt.NDArray[np.int64]:
        segment, layout = self._segment, self._segment.layout
        shards = [layout.lane(lane) + LANE_SHARD for lane in range(segment.config.max_workers)]
        waited, speculated = (sum(segment.read(shard + word * WORD) for shard in shards) for word in _OF_LANES)
        loads = segment.read(layout.pager + PagerCounter.LOADS * WORD)
        return np.array((waited, speculated, time.process_time_ns(), loads), np.int64)


_OF_LANES: Final = LaneCounter.WAIT_NS, LaneCounter.SPECULATING_NS
