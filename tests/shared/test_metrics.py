"""Histograms and counters."""

from __future__ import annotations

from collections.abc import Callable

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmroute.shared.atomic import WORD
from shmroute.shared.metrics import (
    BUCKETS,
    LANE_SHARD_WORDS,
    Histogram,
    LaneCounter,
    WorkerMetrics,
    add,
    bucket_ceiling,
    bucket_of,
    count_duration,
    snapshot_words,
)

LARGEST = bucket_ceiling(BUCKETS - 1)
DURATIONS = st.one_of(st.integers(0, 100), st.integers(0, LARGEST), st.integers(0, 39).map(lambda bits: 1 << bits))


@numba.njit
def compiled_bucket_of(ns: int) -> int:
    return bucket_of(ns)


@given(DURATIONS)
def test_a_bucket_covers_its_durations_and_is_at_most_an_eighth_too_high(ns: int) -> None:
    bucket = bucket_of(ns)
    assert compiled_bucket_of(ns) == bucket
    assert ns <= bucket_ceiling(bucket) <= ns * 1.125
    assert bucket == 0 or bucket_ceiling(bucket - 1) < ns


@given(DURATIONS, DURATIONS)
def test_longer_durations_are_in_no_earlier_bucket(one: int, other: int) -> None:
    shorter, longer = sorted((one, other))
    assert bucket_of(shorter) <= bucket_of(longer)


def test_every_bucket_ends_where_the_next_begins() -> None:
    for bucket in range(BUCKETS - 1):
        assert bucket_of(bucket_ceiling(bucket)) == bucket
        assert bucket_of(bucket_ceiling(bucket) + 1) == bucket + 1


@pytest.mark.parametrize(("ns", "bucket"), [(-1, 0), (-(10**12), 0), (LARGEST + 1, BUCKETS - 1), (2**62, BUCKETS - 1)])
def test_impossible_durations_go_to_the_ends(ns: int, bucket: int) -> None:
    assert bucket_of(ns) == compiled_bucket_of(ns) == bucket


def histogram(memory: Callable[[int], int], durations: list[int]) -> Histogram:
    """What kernels made of durations."""
    address = memory(BUCKETS * WORD)
    for ns in durations:
        count_duration(address, ns)
    return Histogram(snapshot_words(address, BUCKETS))


def test_percentiles_are_those_of_the_durations(memory: Callable[[int], int]) -> None:
    counted = histogram(memory, [1000] * 98 + [50_000, 2_000_000])
    assert counted.total == 100
    for share, ns in ((0.0, 1000), (0.5, 1000), (0.98, 50_000), (0.99, 2_000_000), (1.0, 2_000_000)):
        assert ns <= (counted.percentile(share) or 0) <= ns * 1.125


def test_no_durations_have_no_percentile() -> None:
    empty = Histogram(np.zeros(BUCKETS, np.int64))
    assert empty.percentile(0.5) is None
    assert empty.as_dict() == {"count": 0, "p50_us": None, "p99_us": None, "p999_us": None}


def test_histograms_add_up(memory: Callable[[int], int]) -> None:
    both = histogram(memory, [5, 5]) + histogram(memory, [5, 9000])
    assert both.total == 4
    assert both.percentile(0.5) == 5


def test_a_shard_says_what_its_counters_are(memory: Callable[[int], int]) -> None:
    address = memory(LANE_SHARD_WORDS * WORD)
    add(address + LaneCounter.HITS * WORD, 3)
    add(address + LaneCounter.MISSES * WORD, 1)
    worker = WorkerMetrics.from_words(snapshot_words(address, LANE_SHARD_WORDS), 2, 77)
    assert worker.hit_rate == 0.75
    assert {name for name, value in worker.counters.items() if value} == {"hits", "misses"}
    assert worker.route.total == worker.wait.total == 0
    assert worker.as_dict()["hits"] == 3


def test_there_is_no_hit_rate_before_the_first_route() -> None:
    assert WorkerMetrics.from_words(np.zeros(LANE_SHARD_WORDS, np.int64), None, None).hit_rate is None
