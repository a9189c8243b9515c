"""Counters and latency histograms, one shard for each lane and one for the pager.

Counters only ever grow, by `fetch_add`, over all the workers that a lane ever had: so a death loses nothing, and the
sum over lanes is always the whole truth. What *this* worker did is the difference from a baseline, the counts that the
lane had when it became free.

A histogram has eight buckets to the octave of nanoseconds, so a percentile read from it is at most 12.5 % high.

| who | may write | when |
|---|---|---|
| worker of a lane, any thread; for two counters the pager | its shard | always, `fetch_add` |
| whoever frees a lane | its baseline | once, before the lane is free |
| pager | the pager's shard | always, `fetch_add` |
| anybody | nothing; reads all | always |
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import types

from shmroute.shared.atomic import WORD, fetch_add, load
from shmroute.shared.bits import bit_length
from shmroute.shared.kernel import inner, kernel


class LaneCounter(IntEnum):
    """Words of a lane's shard."""

    CALLS = 0  # routing calls
    TOKENS = 1
    HITS = 2  # (token, chosen expert) pairs resident when routed
    MISSES = 3
    CHANGED = 4  # pairs that the bonus chose and the logits alone would not have
    NONFINITE = 5  # logits that were NaN or infinite
    REQUESTS = 6  # requests pushed
    RING_FULL = 7  # requests left to the sweep
    LEASES = 8
    WAITS = 9  # leases that had to wait for a load
    WAIT_NS = 10
    LOAD_ERRORS = 11  # ExpertLoadError raised
    LOADS = 12  # loads that its requests started; counted by the pager
    EVICTIONS = 13  # evictions that made room for those; counted by the pager
    LOST_MASS = 14  # probability that changed choices lost, in units of 1 / MASS_ONE
    RECORDED = 15  # (token, layer) pairs written to its recording
    UNRECORDED = 16  # records for which its recording had no room
    DEFERRED = 17  # tokens whose affinity was recorded after their call; see `shmroute.routing.publication`
    WITHHELD = 18  # speculations not made, since the pager has turned them down; see `shmroute.shared.turned_down`
    SPECULATING_NS = 19  # CPU time of those that were made
    DEVICE_HITS = 20  # hits whose expert was in the worker's GPU; see `shmroute.device_tier`
    DEVICE_COPIES = 21  # experts copied there


class PagerCounter(IntEnum):
    """Words of the pager's shard."""

    LOADS = 0
    BYTES_READ = 1
    EVICTIONS = 2
    FAILURES = 3
    CHECKSUM_MISMATCHES = 4
    PREFETCHES = 5  # loads that nobody had demanded
    PREFETCHES_CANCELLED = 6
    UPGRADES = 7  # queued requests whose priority was raised
    INVALID_REQUESTS = 8  # impossible ids on the ring, dropped
    PAGE_OUTS = 9  # evictions that were asked for
    SWEEPS = 10
    SWEPT_REQUESTS = 11  # requests that only the sweep found
    REAPED_LANES = 12
    TAKEOVERS = 13
    HUNGRY_SLEEPS = 14
    TICKS = 15  # rounds of the main loop: progress
    QUEUED = 16  # a gauge, not a counter: requests queued now


class Predictor(IntEnum):
    """Who may propose a prefetch: see `shmroute.pager.prefetch`."""

    AFFINITY = 0
    PREVIOUS_TOKEN = 1
    TRANSITIONS = 2
    GATE = 3
    HINT = 4  # the user


class PrefetchOutcome(IntEnum):
    """Words of a predictor in the pager's shard: see `shmroute.pager.prefetch.record`."""

    ISSUED = 0
    COMPLETED = 1  # its load ended
    USEFUL = 2  # of the completed: used before evicted
    WASTED = 3  # of the completed: evicted before used
    OVERTAKEN = 4  # demanded before its load began
    CANCELLED = 5  # stale, or without room, before its load began


MASS_ONE = 1 << 32  # stands for all of a token's probability

BUCKETS = 304
LANE_COUNTERS = len(LaneCounter)
PAGER_COUNTERS = len(PagerCounter)
LANE_SHARD_WORDS = LANE_COUNTERS + 2 * BUCKETS  # counters, routing latency, waiting time
PAGER_HISTOGRAM = PAGER_COUNTERS + len(Predictor) * len(PrefetchOutcome)
PAGER_SHARD_WORDS = PAGER_HISTOGRAM + BUCKETS  # counters, outcomes by predictor, load latency


@inner
def bucket_of(ns: int) -> int:
    """The histogram bucket of a duration."""
    if ns < 8:
        return max(ns, 0)
    octave = bit_length(ns) - 4
    return min((octave + 1) * 8 + ((ns >> octave) & 7), BUCKETS - 1)


@inner
def record_duration(histogram: int, ns: int) -> None:
    """Count one duration in the histogram at an address."""
    fetch_add(histogram + bucket_of(ns) * WORD, 1)


@kernel(types.void(types.int64, types.int64))
def count_duration(histogram: int, ns: int) -> None:
    """`record_duration`, from Python."""
    record_duration(histogram, ns)


@kernel(types.void(types.int64, types.int64))
def add(address: int, value: int) -> None:
    """Add to one counter."""
    fetch_add(address, value)


@kernel(types.void(types.int64, types.int64[::1]))
def read_words(address: int, out: npt.NDArray[np.int64]) -> None:
    """Copy words, each read atomically, to int64 [count] of this process's own."""
    for i in range(out.shape[0]):
        out[i] = load(address + i * WORD)


def snapshot_words(address: int, count: int) -> npt.NDArray[np.int64]:
    """int64 [count] of the words at `address`, each read atomically."""
    out = np.empty(count, np.int64)
    read_words(address, out)
    return out


def bucket_ceiling(bucket: int) -> int:
    """The largest duration, in ns, that falls into a bucket."""
    if bucket < 8:
        return bucket
    octave, step = bucket // 8 - 1, bucket % 8
    return ((8 + step + 1) << octave) - 1


_CEILINGS = np.array([bucket_ceiling(b) for b in range(BUCKETS)], np.float64)


@dataclass(frozen=True)
class Histogram:
    """A snapshot of durations.

    Attributes
    ----------
    counts : ndarray
        int64 [BUCKETS].
    """

    counts: npt.NDArray[np.int64]

    @property
    def total(self) -> int:
        """Durations counted."""
        return int(self.counts.sum())

    def percentile(self, share: float) -> float | None:
        """The duration in ns under which `share` (0 … 1) of them lie; None if there are none."""
        if self.total == 0:
            return None
        rank = min(int(share * self.total), self.total - 1)
        return float(_CEILINGS[np.searchsorted(np.cumsum(self.counts), rank, side="right")])

    def __add__(self, other: Histogram) -> Histogram:
        return Histogram(self.counts + other.counts)

    def as_dict(self) -> dict[str, Any]:
        """Count and percentiles in microseconds, as `stat --json` prints them."""
        microseconds = {
            name: None if (ns := self.percentile(share)) is None else ns / 1000
            for name, share in (("p50", 0.5), ("p99", 0.99), ("p999", 0.999))
        }
        return {"count": self.total, **{f"{name}_us": value for name, value in microseconds.items()}}


@dataclass(frozen=True)
class WorkerMetrics:
    """What one worker, or all that ever were, did.

    Attributes
    ----------
    lane : int or None
        None for the sum.
    pid : int or None
    counters : dict
        By the lower-case names of `LaneCounter`, in its units.
    route, wait : Histogram
        Latency of routing calls; time that leases waited for loads.
    """

    lane: int | None
    pid: int | None
    counters: dict[str, int]
    route: Histogram
    wait: Histogram

    @property
    def lost_mass(self) -> float:
        """The probability that changed choices lost, summed over all tokens.

        A token's is what the model gave to its own experts, minus what it gave to those that were chosen.
        """
        return self.counters["lost_mass"] / MASS_ONE

    @property
    def hit_rate(self) -> float | None:
        """Hits over hits and misses; None before the first route."""
        pairs = self.counters["hits"] + self.counters["misses"]
        return self.counters["hits"] / pairs if pairs else None

    @classmethod
    def from_words(cls, words: npt.NDArray[np.int64], lane: int | None, pid: int | None) -> WorkerMetrics:
        """Read a shard's words, or a difference or sum of such."""
        counters = {c.name.lower(): int(words[c]) for c in LaneCounter}
        first = LANE_COUNTERS
        return cls(lane, pid, counters, Histogram(words[first : first + BUCKETS]), Histogram(words[first + BUCKETS :]))

    def as_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            "lane": self.lane,
            "pid": self.pid,
            **self.counters,
            "lost_mass": self.lost_mass,
            "hit_rate": self.hit_rate,
            "route": self.route.as_dict(),
            "wait": self.wait.as_dict(),
        }


@dataclass(frozen=True)
class PagerMetrics:
    """What the pagers of a segment did, all that ever were.

    Attributes
    ----------
    pid : int or None
        The one at work now.
    counters : dict
        By the lower-case names of `PagerCounter`.
    load : Histogram
        Time from a load's start to its end.
    predictors : dict
        By the lower-case names of `Predictor`, what became of its prefetches: by those of `PrefetchOutcome`.
    """

    pid: int | None
    counters: dict[str, int]
    load: Histogram
    predictors: dict[str, dict[str, int]]

    @property
    def prefetch_accuracy(self) -> float | None:
        """Prefetches that were used before they were evicted, of all that were loaded; None before the first.

        What was loaded and is neither used nor evicted yet counts against it, and so does what a pager had loaded that
        another has taken over from.
        """
        completed = sum(outcomes["completed"] for outcomes in self.predictors.values())
        return sum(outcomes["useful"] for outcomes in self.predictors.values()) / completed if completed else None

    @classmethod
    def from_words(cls, words: npt.NDArray[np.int64], pid: int | None) -> PagerMetrics:
        """Read the pager's shard."""
        outcomes = words[PAGER_COUNTERS:PAGER_HISTOGRAM].reshape(len(Predictor), len(PrefetchOutcome))
        return cls(
            pid,
            {c.name.lower(): int(words[c]) for c in PagerCounter},
            Histogram(words[PAGER_HISTOGRAM:]),
            {p.name.lower(): {o.name.lower(): int(outcomes[p, o]) for o in PrefetchOutcome} for p in Predictor},
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            "pid": self.pid,
            **self.counters,
            "load": self.load.as_dict(),
            "prefetch_accuracy": self.prefetch_accuracy,
            "predictors": self.predictors,
        }
