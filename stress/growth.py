"""Samples of what processes hold, and whether it grows.

A trend is judged by the Theil–Sen slope, the median of the slopes between all pairs of samples: a few outliers (a
garbage collection, a file that is open for a moment) do not move it. It is multiplied by the time between the first
and the last sample, which gives the growth that is compared with what is allowed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

WARM_UP = 0.25
"""Share of a process's samples that are left out: until then, caches fill and arenas find their size."""

FEWEST_SAMPLES = 6
"""Fewer, after the warm-up, tell no trend."""


@dataclass(frozen=True)
class Allowance:
    """How much a series may grow from the end of the warm-up to the end of the run.

    Attributes
    ----------
    memory : float
        Bytes of anonymous memory. An allocator returns what it likes when it likes; a leak of a kilobyte for each item
        of work would be many times this.
    descriptors, threads : float
        A steady process needs as many at the end as at the start.
    """

    memory: float = 6e6
    descriptors: float = 0.5
    threads: float = 0.5


@dataclass
class Series:
    """Samples of one process.

    Attributes
    ----------
    role : str
        ``worker``, ``pager`` or ``owner``.
    """

    role: str
    pid: int
    times: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    descriptors: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    def sample(self, now: float) -> None:
        """Look at the process, if it is still there."""
        looked = look(self.pid)
        if looked is None:
            return
        for values, value in zip((self.memory, self.descriptors, self.threads), looked, strict=True):
            values.append(value)
        self.times.append(now)

    def growth(self, name: str) -> float | None:
        """By how much one of the quantities grew after the warm-up; None if there are too few samples to tell."""
        first = int(len(self.times) * WARM_UP)
        if len(self.times) - first < FEWEST_SAMPLES:
            return None
        return trend(np.array(self.times[first:]), np.array(getattr(self, name)[first:], np.float64))

    def complaints(self, allowed: Allowance) -> list[str]:
        """What grew by more than it may."""
        found = []
        for name in ("memory", "descriptors", "threads"):
            grown, limit = self.growth(name), getattr(allowed, name)
            if grown is not None and grown > limit:
                found.append(f"{name} of {self.role} {self.pid} grew by {grown:,.1f}, {limit:,.1f} are allowed")
        return found


def look(pid: int) -> tuple[int, int, int] | None:
    """Anonymous memory in bytes, open descriptors and threads of a process; None if it is gone.

    Anonymous memory is what the process alone pays for: the segment's pages are not counted.
    """
    folder = Path(f"/proc/{pid}")
    try:
        lines = (folder / "status").read_text().splitlines()
        fields = dict(line.split(":", 1) for line in lines if ":" in line)
        descriptors = len(list((folder / "fd").iterdir()))
        return int(fields["RssAnon"].split()[0]) * 1024, descriptors, int(fields["Threads"])
    except (FileNotFoundError, ProcessLookupError, KeyError):  # a zombie has no memory to tell of
        return None


def trend(times: np.ndarray, values: np.ndarray) -> float:
    """Growth over the whole of `times` by the Theil–Sen slope.

    Parameters
    ----------
    times : ndarray
        float64, ascending, at least two.
    values : ndarray
        float64 of the same length.
    """
    chosen = np.linspace(0, len(times) - 1, min(len(times), 500)).astype(int)  # pairs grow as the square
    t, v = times[chosen], values[chosen]
    later, earlier = np.tril_indices(len(t), -1)
    slopes = (v[later] - v[earlier]) / (t[later] - t[earlier])
    return float(np.median(slopes) * (times[-1] - times[0]))
