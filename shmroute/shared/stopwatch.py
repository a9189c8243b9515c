"""Timing what takes a few hundred nanoseconds: by the time-stamp counter where it can be trusted, else by the clock.

Reading CLOCK_MONOTONIC costs some 25 ns, the counter some 10, and a routing call is timed by two readings. The counter
is used only if the kernel itself keeps time by it (clock source ``tsc``): then it has found it to tick at one rate,
never to stop, and to agree between cores. Its rate is measured once for each process, against CLOCK_MONOTONIC; both
ends of that measurement are known to some 50 ns of its 2 ms, so durations are right to a ten-thousandth.
"""

from __future__ import annotations

import functools
import platform
import time
from pathlib import Path
from typing import Final

import numpy as np
from numba import types

from shmroute.shared.atomic import COMPILED, cycle_count, i64_array, monotonic_ns
from shmroute.shared.kernel import inner, kernel

CLOCK_SOURCE: Final = Path("/sys/devices/system/clocksource/clocksource0/current_clocksource")
SCALE_BITS: Final = 20
CALIBRATION_SECONDS: Final = 0.002


@inner
def reading(scale: int) -> int:
    """A point in time: cycles, or nanoseconds if `scale` is 0."""
    if scale == 0:
        return monotonic_ns()
    return cycle_count()


@inner
def nanoseconds(difference: int, scale: int) -> int:
    """The nanoseconds between two readings; up to some hours."""
    if scale == 0:
        return difference
    return (difference * scale) >> SCALE_BITS


@kernel(types.void(types.int64))
def read_together(out: int) -> None:
    """Write cycles, CLOCK_MONOTONIC, and cycles again to int64 [3]."""
    readings = i64_array(out, 3)
    readings[0] = cycle_count()
    readings[1] = monotonic_ns()
    readings[2] = cycle_count()


def is_trusted() -> bool:
    """Whether the time-stamp counter keeps this host's time."""
    try:
        source = CLOCK_SOURCE.read_text().strip()
    except OSError:
        return False
    return COMPILED and platform.machine() == "x86_64" and source == "tsc"


def _simultaneous() -> tuple[int, int]:
    """Cycles and nanoseconds of one moment: of several readings the one that was interrupted least."""
    readings = np.empty((8, 3), np.int64)
    for row in readings:
        read_together(row.ctypes.data)
    before, ns, after = readings[np.argmin(readings[:, 2] - readings[:, 0])].tolist()
    return (before + after) // 2, ns


@functools.cache
def cycle_scale() -> int:
    """Nanoseconds in a cycle, times 2^SCALE_BITS; 0 if the counter cannot be used."""
    if not is_trusted():
        return 0
    cycles, ns = _simultaneous()
    time.sleep(CALIBRATION_SECONDS)
    later_cycles, later_ns = _simultaneous()
    if later_cycles <= cycles:
        return 0
    return round((later_ns - ns) / (later_cycles - cycles) * (1 << SCALE_BITS))
