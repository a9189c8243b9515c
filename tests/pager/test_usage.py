"""`MeasuredUsage`: what waiting and CPU time are worth, by what the cores and the workers did between two looks."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from shmroute.pager.prefetch import usage as module
from shmroute.pager.prefetch.usage import SHORTEST, MeasuredUsage, idle_and_all
from shmroute.shared.atomic import WORD
from shmroute.shared.layout import LANE_SHARD
from shmroute.shared.metrics import LaneCounter, PagerCounter
from shmroute.shared.segment import Segment

STAT = """cpu  1000 0 0 4000 0 0 0 0 0 0
cpu0 100 10 20 300 40 5 6 7 50 60
cpu1 200 0 0 800 0 0 0 0 0 0
cpu11 700 0 0 2900 0 0 0 0 0 0
intr 12345
"""


class Host:
    """A machine of two cores whose clocks a test sets, and what workers have counted."""

    def __init__(self, segment: Segment, patch: pytest.MonkeyPatch, stat: Path) -> None:
        self._segment, self._stat = segment, stat
        self._busy, self._idle, self._now, self._cpu = 0, 0, 0.0, 0
        patch.setattr(module, "STAT", stat)
        patch.setattr(module.os, "sched_getaffinity", lambda pid: {0, 1})
        patch.setattr(module.time, "monotonic", lambda: self._now)
        patch.setattr(module.time, "process_time_ns", lambda: self._cpu)
        self.passes(0.0)
        self.usage = MeasuredUsage(segment)

    def passes(self, seconds: float, idle: float = 0.0, cpu: float = 0.0) -> None:
        """Time in which so many cores idled on average, and the pager took CPU time."""
        self._now += seconds
        self._cpu += int(cpu * 1e9)
        self._idle += round(idle * seconds * 100)
        self._busy += round((2 - idle) * seconds * 100)
        self._stat.write_text(f"cpu0 {self._busy} 0 0 0 0 0 0 0\ncpu1 0 0 0 {self._idle} 0 0 0 0\n")

    def count(self, lane: int, counter: LaneCounter, seconds: float) -> None:
        offset = self._segment.layout.lane(lane) + LANE_SHARD + counter * WORD
        self._segment.write(offset, self._segment.read(offset) + int(seconds * 1e9))

    def loads(self, count: int) -> None:
        offset = self._segment.layout.pager + PagerCounter.LOADS * WORD
        self._segment.write(offset, self._segment.read(offset) + count)

    @property
    def weights(self) -> tuple[float, float]:
        return self.usage.waiting_weight, self.usage.cpu_weight


@pytest.fixture
def host(segment: Segment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Host:
    return Host(segment, monkeypatch, tmp_path / "stat")


# ------------------------------------------------------------------ /proc/stat


def test_idle_time_is_that_of_the_given_cpus_and_of_waiting_for_disks() -> None:
    assert idle_and_all(STAT, {0}) == (340, 488)
    assert idle_and_all(STAT, {0, 1}) == (1140, 1488)
    assert idle_and_all(STAT, {1, 11}) == (3700, 4600)


def test_a_file_that_does_not_know_the_cpus_says_nothing() -> None:
    assert idle_and_all(STAT, {0, 2}) is None
    assert idle_and_all("", {0}) is None


def test_this_machines_file_can_be_read() -> None:
    found = idle_and_all(module.STAT.read_text(), module.os.sched_getaffinity(0))
    assert found is not None
    assert 0 < found[0] < found[1]


# ------------------------------------------------------------------ what things are worth


def test_before_anything_is_known_waiting_counts_in_full_and_cpu_time_not_at_all(host: Host) -> None:
    assert host.weights == (1.0, 0.0)


def test_while_cores_idle_waiting_counts_and_cpu_time_does_not(host: Host) -> None:
    host.passes(1.0, idle=1.2)
    host.count(0, LaneCounter.WAIT_NS, 0.5)
    assert host.usage.look() == 0.0
    assert host.weights == (1.0, 0.0)


def test_while_no_core_idles_cpu_time_counts_and_waiting_does_not(host: Host) -> None:
    host.passes(1.0, idle=0.0)
    host.count(0, LaneCounter.WAIT_NS, 0.5)
    host.usage.look()
    assert host.weights == (0.0, 1.0)
    host.passes(1.0, idle=2.0)
    host.usage.look()
    assert host.weights == (1.0, 0.0)


def test_of_waiting_only_what_left_a_core_idle_counts(host: Host) -> None:
    host.passes(1.0, idle=0.2)
    for lane in (0, 3):
        host.count(lane, LaneCounter.WAIT_NS, 0.4)
    host.usage.look()
    assert host.weights == pytest.approx((0.25, 0.8))


@pytest.mark.parametrize("content", [None, "", "cpu0 1 2 3\ncpu1 1 2 3\n", "cpu0 one\n", "cpu0 0 0 0 0\n"], ids=repr)
def test_where_the_file_says_nothing_all_cores_are_taken_to_be_idle(
    segment: Segment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str | None
) -> None:
    host = Host(segment, monkeypatch, tmp_path / "stat")
    host.passes(1.0, idle=0.0)
    (tmp_path / "stat").unlink()
    if content is not None:
        (tmp_path / "stat").write_text(content)
    host.count(0, LaneCounter.WAIT_NS, 1.0)
    host.usage.look()
    assert host.weights == (1.0, 0.0)


# ------------------------------------------------------------------ what is spent


def test_a_load_takes_the_cpu_time_of_the_pager_by_all_loads(host: Host) -> None:
    host.loads(10)
    host.passes(1.0, cpu=0.02)
    host.usage.look()
    assert host.usage.load_cpu == pytest.approx(0.002)
    host.passes(1.0, cpu=0.5)
    host.usage.look()
    assert host.usage.load_cpu == pytest.approx(0.002), "without a load nothing is known of loads"
    for _ in range(30):
        host.loads(10)
        host.passes(1.0, cpu=0.04)
        host.usage.look()
    assert host.usage.load_cpu == pytest.approx(0.004, rel=0.01)


def test_what_workers_speculated_is_told_once(host: Host) -> None:
    host.count(1, LaneCounter.SPECULATING_NS, 0.25)
    host.count(2, LaneCounter.SPECULATING_NS, 0.5)
    assert host.usage.look() == 0.0, "no time has passed"
    host.passes(SHORTEST)
    assert host.usage.look() == pytest.approx(0.75)
    host.passes(SHORTEST)
    assert host.usage.look() == 0.0


def test_a_successor_begins_with_what_the_lanes_have_counted(host: Host, segment: Segment) -> None:
    host.count(1, LaneCounter.SPECULATING_NS, 0.25)
    successor = MeasuredUsage(segment)
    host.passes(SHORTEST)
    assert successor.look() == 0.0


def test_a_lanes_waits_are_read_as_they_are_counted(host: Host) -> None:
    host.count(3, LaneCounter.WAIT_NS, 0.5)
    assert (host.usage.waited(3), host.usage.waited(2)) == (0.5, 0.0)


def test_cpu_time_of_a_thread_does_not_pass_while_it_sleeps(segment: Segment) -> None:
    usage = MeasuredUsage(segment)
    began = usage.thread_seconds()
    time.sleep(0.2)
    assert 0 <= usage.thread_seconds() - began < 0.1
