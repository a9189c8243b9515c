"""Tables that hold any words at all: the pager, the workers and whoever looks stay inside the segment, and go on."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fuzzing import Steps, bounded, fuzz, in_time, look_at_everything, segment_of, words
from hypothesis import example, given
from hypothesis import strategies as st
from runtimes import Memory, small_config, unique_name

from shmroute.config import PagerConfig, RuntimeConfig
from shmroute.errors import ShmrouteError
from shmroute.failures import failure_reason
from shmroute.lifecycle import create
from shmroute.metrics import read_metrics
from shmroute.pager import daemon
from shmroute.pager import slots as slots_module
from shmroute.pager.daemon import Pager
from shmroute.pager.eviction.policy import Eviction
from shmroute.pager.table import ExpertTable
from shmroute.pager.waiters import Waiters, awaited_by_lane, each_lane
from shmroute.pager_lock import PagerLock
from shmroute.runtime import Runtime
from shmroute.shared.affinity import power_table
from shmroute.shared.atomic import WORD, load, signed, store
from shmroute.shared.experts import clear_lane, rebuild_bitmap, recover, scan_table
from shmroute.shared.layout import HEADER_OWNER, HEADER_STATE, LANE_IDENTITY, LANE_WAIT, LINE
from shmroute.shared.metrics import BUCKETS, Histogram, bucket_ceiling
from shmroute.shared.pool import Pool
from shmroute.shared.segment import Segment
from shmroute.shared.words import (
    ABSENT,
    FAILED,
    LOADING,
    LOW32,
    PREFETCH,
    REQUESTED,
    RESIDENT,
    URGENT,
    expert_mask,
    expert_slot,
    expert_state,
    failure_not_before_ms,
    pack_expert,
    pack_wait,
)
from shmroute.sources import SyntheticSource

CANARY = 0x5EED5EED5EED5EED
LAYERS, EXPERTS, SLOTS = 2, 5, 4
SOURCE = SyntheticSource(LAYERS, EXPERTS, 4, 5)
CONFIG = RuntimeConfig.from_checkpoint(SOURCE, "40%", max_workers=3, pager=PagerConfig(tick=0.01))

clean_words = st.one_of(
    st.sampled_from([ABSENT, FAILED, 5, 6, 7]).map(lambda state: pack_expert(state, 0, 0, 0)),
    st.integers(PREFETCH, URGENT).map(lambda priority: pack_expert(REQUESTED, priority, 0, 0)),
    st.integers(0, SLOTS + 2).map(lambda slot: pack_expert(LOADING, 0, slot, 0)),
    st.builds(
        lambda slot, mask: pack_expert(RESIDENT, 0, slot, mask),
        st.integers(0, SLOTS + 2) | st.just((1 << 24) - 1),
        st.just(0) | st.integers(0, LOW32),
    ),
)
"""Expert words with nothing in fields that their state does not have, but with any slot."""

near_words = st.builds(
    lambda state, priority, slot, mask, rest: pack_expert(state, priority, slot, mask) | rest << 61,
    st.integers(0, 7), st.integers(0, 3), st.integers(0, SLOTS + 1), st.sampled_from([0, 0, 1, LOW32]),
    st.sampled_from([0, 0, 1]),
)  # fmt: skip
"""Expert words with something in every field."""

wait_words = words | st.builds(pack_wait, st.integers(0, LAYERS) | st.integers(0, 2**50), st.integers(0, EXPERTS))
"""Wait words, most of them near those that name an expert."""

any_words = clean_words | near_words | words


def tables(element: st.SearchStrategy[int]) -> st.SearchStrategy[list[int]]:
    """The words of a whole table."""
    return st.lists(element, min_size=LAYERS * EXPERTS, max_size=LAYERS * EXPERTS)


def write_table(segment: Segment, contents: list[int]) -> None:
    """Make a segment's expert words be these."""
    for key, word in enumerate(contents):
        layer, expert = divmod(key, EXPERTS)
        segment.write(segment.layout.row(segment.layout.experts, layer) + expert * WORD, word)


def read_table(segment: Segment) -> list[int]:
    """A segment's expert words."""
    row = segment.layout.row
    return [
        segment.read(row(segment.layout.experts, layer) + expert * WORD)
        for layer in range(LAYERS)
        for expert in range(EXPERTS)
    ]


@pytest.fixture(scope="module")
def segment() -> Iterator[Segment]:
    """Of 2 layers with 5 experts, 4 slots and 3 lanes."""
    assert CONFIG.slots == SLOTS
    with segment_of(CONFIG) as made:
        yield made


@contextlib.contextmanager
def only_changing(segment: Segment, *regions: tuple[int, int]) -> Iterator[None]:
    """The block changes nothing in a segment but some regions [start, end)."""
    before = bytearray(segment.buffer)
    yield
    after = bytearray(segment.buffer)
    for start, end in regions:
        before[start:end] = after[start:end] = bytes(end - start)
    assert before == after


# ------------------------------------------------------------------ kernels


class Guarded:
    """Private memory for so many words, between two canaries."""

    def __init__(self, count: int) -> None:
        self._memory = Memory((count + 2) * WORD)
        self.address, self._count = self._memory.address + WORD, count
        for index in (-1, count):
            store(self.address + index * WORD, CANARY)

    def words(self) -> list[int]:
        """What is there now; the canaries are still alive."""
        assert load(self.address - WORD) == load(self.address + self._count * WORD) == CANARY
        return [load(self.address + index * WORD) for index in range(self._count)]


@fuzz(2)
@given(contents=tables(any_words))
def test_a_scan_finds_the_owners_of_slots_that_there_are_and_what_is_requested(
    segment: Segment, contents: list[int]
) -> None:
    write_table(segment, contents)
    owners, requested = Guarded(SLOTS), Guarded(LAYERS * EXPERTS)
    with bounded(), only_changing(segment):
        count = scan_table(
            segment.address + segment.layout.experts, segment.layout.row_bytes, LAYERS, EXPERTS,
            owners.address, SLOTS, requested.address,
        )  # fmt: skip
    assert requested.words()[:count] == [key for key, word in enumerate(contents) if expert_state(word) == REQUESTED]
    for slot, owner in enumerate(owners.words()):
        named = [
            key for key, word in enumerate(contents)
            if expert_state(word) in (LOADING, RESIDENT) and expert_slot(word) == slot
        ]  # fmt: skip
        assert owner in (named or [-1])


@fuzz(2)
@given(contents=tables(any_words), lane=st.integers(0, 31))
def test_the_pager_s_passes_over_the_table_change_what_they_should_and_no_more(
    segment: Segment, contents: list[int], lane: int
) -> None:
    layout = segment.layout
    table = (layout.experts, layout.checksums)
    write_table(segment, contents)
    with bounded(), only_changing(segment, table):
        recover(segment.address + layout.experts, layout.row_bytes, LAYERS)
    for word, now in zip(contents, read_table(segment), strict=True):
        assert now == (pack_expert(REQUESTED, URGENT, 0, 0) if expert_state(word) == LOADING else word)
    write_table(segment, contents)
    with bounded(), only_changing(segment, table):
        clear_lane(segment.address + layout.experts, layout.row_bytes, LAYERS, 1 << lane)
    assert read_table(segment) == [word & ~(1 << lane) for word in contents]
    write_table(segment, contents)
    with bounded(), only_changing(segment, (layout.resident, layout.ring)):
        for layer in range(LAYERS):
            rebuild_bitmap(
                segment.address + layout.row(layout.experts, layer),
                segment.address + layout.resident + layer * layout.resident_row_bytes,
                EXPERTS,
            )
    for layer in range(LAYERS):
        bits = segment.read(layout.resident + layer * layout.resident_row_bytes)
        row = contents[layer * EXPERTS :][:EXPERTS]
        assert bits == sum((expert_state(word) == RESIDENT) << expert for expert, word in enumerate(row))


@fuzz(2)
@given(
    contents=tables(any_words),
    affinities=tables(words),
    clocks=st.lists(words, min_size=LAYERS, max_size=LAYERS),
    loaded=st.lists(st.integers(-1, LAYERS * EXPERTS - 1), min_size=SLOTS, max_size=SLOTS),
    awaited=st.lists(words | st.integers(0, 9), max_size=3),
)
def test_a_victim_is_a_resident_expert_that_nobody_reads_or_awaits(
    segment: Segment, contents: list[int], affinities: list[int], clocks: list[int], loaded: list[int],
    awaited: list[int],
) -> None:  # fmt: skip
    layout = segment.layout
    write_table(segment, contents)
    for layer, clock in enumerate(clocks):
        segment.write(layout.clock + layer * LINE, clock)
        for expert in range(EXPERTS):
            segment.write(layout.affinity(layer, expert), affinities[layer * EXPERTS + expert])
    eviction = Eviction(segment, power_table(0.99))
    keys = np.array(awaited, np.int64)
    with bounded(), only_changing(segment):
        ExpertTable(segment).scan(eviction.owners)
        for slot, key in enumerate(loaded):
            if key >= 0:
                eviction.loaded(slot, key)
        found = eviction.victim(keys)
    if found is None:
        return
    key, score = found
    assert eviction.owners[expert_slot(contents[key])] == key
    assert expert_state(contents[key]) == RESIDENT
    assert expert_mask(contents[key]) == 0
    assert key not in awaited
    assert 0 <= score <= 1


@fuzz()
@given(waits=st.lists(wait_words, min_size=3, max_size=3), which=st.integers(0, LAYERS - 1))
def test_a_wait_word_that_names_no_expert_counts_as_none(segment: Segment, waits: list[int], which: int) -> None:
    layout = segment.layout
    for lane, word in enumerate(waits):
        segment.write(layout.lane(lane) + LANE_WAIT, word)
    expected = []
    for word in waits:
        layer, expert = divmod(word - 1, 1 << 12)
        expected.append(layer * EXPERTS + expert if word > 0 and layer < LAYERS and expert < EXPERTS else -1)
    with bounded(), only_changing(segment, (layout.lanes, layout.pager)), contextlib.closing(Waiters(segment)) as who:
        assert awaited_by_lane(segment).tolist() == expected
        awaited = sorted(key for key in expected if key >= 0)
        assert sorted(who.keys().tolist()) == awaited
        assert sorted(who.in_turn()) == sorted(set(awaited))
        waiting = [lane for lane, word in enumerate(waits) if word > 0 and (word - 1) >> 12 == which]
        assert list(each_lane(who.lanes_in(which))) == waiting
    for lane in range(3):
        segment.write(layout.lane(lane) + LANE_WAIT, 0)


# ------------------------------------------------------------------ the pager


def serve(segment: Segment, rounds: int = 6) -> None:
    """Take over a segment and serve it for some rounds; whoever tries again and again without success is caught."""
    left = iter(range(rounds))
    with pytest.MonkeyPatch.context() as patch, PagerLock(segment) as lock:
        assert lock.try_acquire()
        patch.setattr(slots_module, "evict", Steps(slots_module.evict, 1000))
        patch.setattr(daemon, "cancel", Steps(daemon.cancel, 1000))
        with contextlib.closing(Pager(segment, SyntheticSource(LAYERS, EXPERTS, 4, 5))) as pager:
            pager.serve(lambda: next(left, None) is None)


def takes_over(contents: list[int], failures: int, waits: list[int]) -> None:
    """A pager adopts a table of such words and serves it, and what it loads is what it says."""
    with segment_of(CONFIG) as segment:
        layout = segment.layout
        write_table(segment, contents)
        for lane, word in enumerate(waits):
            segment.write(layout.lane(lane) + LANE_WAIT, word)
        for offset in range(layout.failures, layout.resident, WORD):
            segment.write(offset, failures)
        header = bytes(segment.buffer[: HEADER_STATE + LINE])
        with in_time():
            serve(segment)
        assert bytes(segment.buffer[: HEADER_STATE + LINE]) == header
        assert read_metrics(segment).pager.counters["ticks"] == 6
        named = [expert_slot(word) for word in contents if expert_state(word) == RESIDENT]
        if len(set(named)) < len(named):
            return  # two words that named one slot: nobody can tell whose the bytes are
        pool, expected = Pool(segment), bytearray(SOURCE.geometry.expert_bytes)
        for key, (word, now) in enumerate(zip(contents, read_table(segment), strict=True)):
            if expert_state(now) == RESIDENT and now != word:
                SOURCE.read_into(*divmod(key, EXPERTS), memoryview(expected))
                assert pool.weights(expert_slot(now)).raw.tobytes() == expected
        pool.forget()


@fuzz(0.4)
@given(contents=tables(clean_words), failures=words, waits=st.lists(words | st.integers(0, 9), max_size=3))
@example(contents=[pack_expert(RESIDENT, 0, 0, 0)] * 9 + [pack_expert(REQUESTED, URGENT, 0, 0)], failures=0, waits=[])
@example(contents=[pack_expert(RESIDENT, 0, 9, 0)] * 9 + [pack_expert(REQUESTED, URGENT, 0, 0)], failures=0, waits=[])
@example(contents=[pack_expert(LOADING, 0, 9, 0)] * 10, failures=-1, waits=[1, 1, 1])
def test_a_pager_takes_over_a_table_whose_words_name_any_slots(
    contents: list[int], failures: int, waits: list[int]
) -> None:
    takes_over(contents, failures, waits)


FULL_OF_READ = [pack_expert(RESIDENT, 0, slot, 1) for slot in range(SLOTS)] + [0] * 5


@fuzz(0.4)
@given(contents=tables(any_words), failures=words, waits=st.lists(words | st.integers(0, 9), max_size=3))
@example(
    contents=[pack_expert(RESIDENT, 1, slot, 0) for slot in range(SLOTS)]
    + [pack_expert(REQUESTED, URGENT, 0, 0)] * (LAYERS * EXPERTS - SLOTS),
    failures=0, waits=[],
)  # fmt: skip
@example(contents=[*FULL_OF_READ, pack_expert(REQUESTED, PREFETCH, 0, 1)], failures=0, waits=[])
@example(contents=[*FULL_OF_READ, pack_expert(REQUESTED, 0, 0, 0)], failures=0, waits=[])
def test_a_pager_takes_over_a_table_of_any_words(contents: list[int], failures: int, waits: list[int]) -> None:
    takes_over(contents, failures, waits)


# ------------------------------------------------------------------ workers


@pytest.fixture(scope="module")
def runtime() -> Iterator[Runtime]:
    """Of this process, without a pager; its lane and its router exist."""
    with create(unique_name(), CONFIG, progress=None) as made:
        made.router(0)
        yield made


@fuzz(2)
@given(word=any_words, failure=words)
@example(word=pack_expert(RESIDENT, 0, SLOTS, 0), failure=0)
@example(word=signed(pack_expert(RESIDENT, 3, (1 << 24) - 1, LOW32) | 7 << 61), failure=-1)
def test_a_lease_on_a_word_of_any_bits_gives_a_slot_s_bytes_or_an_error(
    runtime: Runtime, word: int, failure: int
) -> None:
    segment = runtime._attachment.segment
    layout = segment.layout
    segment.write(layout.experts, word)
    segment.write(layout.failures, failure)
    with bounded():
        try:
            with runtime.expert(0, 0, timeout=0) as weights:
                assert expert_state(word) == RESIDENT
                assert expert_slot(word) < SLOTS
                assert weights.raw.ctypes.data == segment.address + layout.slot(expert_slot(word))
                assert weights.raw.nbytes == CONFIG.expert_bytes
                del weights
        except (ShmrouteError, ValueError) as error:
            if expert_state(word) == RESIDENT:
                assert expert_slot(word) >= SLOTS
            else:
                assert isinstance(error, ShmrouteError)
    assert expert_mask(segment.read(layout.experts)) & 1 in (0, word & 1)
    assert not runtime._lease_table().holds_any()
    segment.write(layout.ring, 1 << layout.ring_bits)
    segment.write(layout.ring + LINE, 1 << layout.ring_bits)
    for entry in range(1 << layout.ring_bits):
        segment.write(layout.ring + 2 * LINE + entry * WORD, 0)


@pytest.mark.parametrize("slot", [4, 5, 1000, (1 << 24) - 1])
def test_a_lease_on_a_slot_that_there_is_not_is_an_error_without_tensors_too(slot: int) -> None:
    with create(unique_name(), small_config(), progress=None) as runtime:
        segment = runtime._attachment.segment
        segment.write(segment.layout.experts, pack_expert(RESIDENT, 0, slot, 0))
        with pytest.raises(ShmrouteError), runtime.expert(0, 0, timeout=0):
            pass
        assert segment.read(segment.layout.experts) == pack_expert(RESIDENT, 0, slot, 0)


@fuzz(2)
@given(word=words)
def test_any_failure_word_has_a_reason(word: int) -> None:
    assert failure_reason(word)
    assert 0 <= failure_not_before_ms(word) < 1 << 44


# ------------------------------------------------------------------ everything at once


def scribble(segment: Segment, seed: int, density: float, *regions: tuple[int, int]) -> None:
    """Overwrite a share of the words of some regions with any bits."""
    drawn = random.Random(seed)
    for start, end in regions:
        for offset in range(start, end, WORD):
            if drawn.random() < density:
                segment.write(offset, drawn.choice([drawn.getrandbits(64) - (1 << 63), -1, 1 << 62, 1 - (1 << 63)]))


densities = st.sampled_from([0.02, 0.5, 1.0])


@fuzz(0.5)
@given(seed=st.integers(0, 2**32), density=densities)
def test_a_segment_full_of_any_words_can_be_looked_at(seed: int, density: float) -> None:
    with segment_of(CONFIG) as segment:
        layout = segment.layout
        scribble(segment, seed, density, (HEADER_OWNER, HEADER_OWNER + 4 * LINE), (layout.clock, layout.pool))
        with bounded(spare=8 << 20), only_changing(segment):
            said = look_at_everything(segment)
            assert all(0 <= layer["resident"] <= EXPERTS for layer in said["layers"])
            metrics = read_metrics(segment)
            assert metrics.as_dict()["slots"] == SLOTS
            for lane in range(3):
                metrics.worker_of(lane)


@fuzz()
@given(counts=st.lists(words | st.integers(0, 9), min_size=BUCKETS, max_size=BUCKETS), share=st.floats(0, 1))
@example(counts=[-(2**63)] + [0] * (BUCKETS - 1), share=0.5)
@example(counts=[2**63 - 1] * 3 + [0] * (BUCKETS - 3), share=1.0)
def test_a_histogram_of_any_words_has_percentiles_within_its_buckets(counts: list[int], share: float) -> None:
    histogram = Histogram(np.array(counts, np.int64))
    found = histogram.percentile(share)
    assert found is None or 0 <= found <= bucket_ceiling(BUCKETS - 1)
    assert set(histogram.as_dict()) == {"count", "p50_us", "p99_us", "p999_us"}


@fuzz(0.5)
@given(seed=st.integers(0, 2**32), density=densities, logits=st.lists(st.floats(width=32), min_size=10, max_size=10))
def test_routing_over_any_words_chooses_experts_that_there_are(
    runtime: Runtime, seed: int, density: float, logits: list[float]
) -> None:
    """The ring is left as it is: what it may hold has tests of its own."""
    segment = runtime._attachment.segment
    layout = segment.layout
    kept = segment.read(layout.lane(0) + LANE_IDENTITY)
    scribble(segment, seed, density, (layout.clock, layout.ring), (layout.lanes, layout.control_bytes))
    segment.write(layout.lane(0) + LANE_IDENTITY, kept)
    header, pool = bytes(segment.buffer[: HEADER_STATE + LINE]), bytes(segment.buffer[layout.pool :])
    batch = np.array(logits, np.float32).reshape(2, EXPERTS)
    with bounded():
        for layer in range(LAYERS):
            with contextlib.suppress(ShmrouteError):  # too few logits are finite
                decision = runtime.router(layer).route(batch)
                assert decision.experts.min() >= 0 and decision.experts.max() < EXPERTS
                assert np.isfinite(decision.weights).all()
            runtime.affinity(layer).update([0, EXPERTS - 1])
            scores = runtime.affinity(layer).scores()
            assert scores.min() >= 0 and scores.max() <= 1
            assert sorted(runtime.affinity(layer).top(EXPERTS)) == list(range(EXPERTS))
            resident = runtime.resident(layer)
            assert resident == [expert for expert in range(EXPERTS) if runtime.is_resident(layer, expert)]
        for expert in range(EXPERTS):
            with contextlib.suppress(ShmrouteError, ValueError), runtime.expert(0, expert, timeout=0):
                pass
    assert bytes(segment.buffer[: HEADER_STATE + LINE]) == header
    assert bytes(segment.buffer[layout.pool :]) == pool
    segment.write(layout.lane(0) + LANE_IDENTITY, kept)
    segment.write(layout.lane(0) + LANE_WAIT, 0)


def test_scribbling_reaches_every_region_that_it_is_meant_to(segment: Segment) -> None:
    """Else the tests above would look at a sound segment."""
    layout: Any = segment.layout
    with segment_of(CONFIG) as fresh:
        before = bytes(fresh.buffer)
        scribble(fresh, 1, 1.0, (layout.clock, layout.pool))
        after = bytes(fresh.buffer)
    for region in ("clock", "uses", "experts", "failures", "resident", "ring", "lanes", "pager", "slot_headers"):
        assert before[getattr(layout, region) :][:WORD] != after[getattr(layout, region) :][:WORD]
