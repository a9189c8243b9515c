"""Durations by the time-stamp counter are those of the clock, and without it the clock serves."""

from __future__ import annotations

import time
from pathlib import Path

import numba
import pytest
from numba import types

from shmroute.shared import stopwatch
from shmroute.shared.atomic import COMPILED
from shmroute.shared.stopwatch import SCALE_BITS, cycle_scale, is_trusted, nanoseconds, reading


@numba.njit(types.int64(types.int64), _nrt=False)
def read(scale: int) -> int:
    return reading(scale)


@pytest.mark.skipif(not COMPILED, reason="interpreted kernels use the clock")
@pytest.mark.skipif(not is_trusted(), reason="this host keeps time by another clock")
def test_a_duration_in_cycles_is_that_of_the_clock() -> None:
    scale = cycle_scale()
    assert scale > 0
    outer = time.monotonic_ns()
    began = read(scale)
    inner_began = time.monotonic_ns()
    time.sleep(0.05)
    inner = time.monotonic_ns() - inner_began
    measured = nanoseconds(read(scale) - began, scale)
    outer = time.monotonic_ns() - outer
    assert inner * 0.999 <= measured <= outer * 1.001


def test_without_a_scale_a_reading_is_the_clocks() -> None:
    before = time.monotonic_ns()
    assert before <= read(0) <= time.monotonic_ns()
    assert nanoseconds(1234, 0) == 1234


def test_hours_do_not_overflow() -> None:
    four_gigahertz = (1 << SCALE_BITS) // 4
    assert nanoseconds(4_000_000_000 * 3600 * 2, four_gigahertz) == 3600 * 2 * 1_000_000_000


@pytest.mark.parametrize("source", ["kvm-clock\n", "hpet\n", ""])
def test_the_counter_is_used_only_where_the_kernel_keeps_time_by_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str
) -> None:
    file = tmp_path / "current_clocksource"
    if source:
        file.write_text(source)
    monkeypatch.setattr(stopwatch, "CLOCK_SOURCE", file)
    assert not is_trusted()
    assert cycle_scale.__wrapped__() == 0
