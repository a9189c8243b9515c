"""A ring that holds any words at all: every operation on it ends, stays inside it, and gives back 31 bits at most."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
from fuzzing import Steps, bounded, fuzz, in_time, segment_of, words
from hypothesis import example, given
from hypothesis import strategies as st
from runtimes import Memory

from shmroute.config import PagerConfig, RuntimeConfig
from shmroute.metrics import read_metrics
from shmroute.pager.daemon import Pager
from shmroute.pager_lock import PagerLock
from shmroute.shared import atomic
from shmroute.shared import ring as ring_module
from shmroute.shared.atomic import WORD, load, signed, store
from shmroute.shared.layout import RING_ENTRIES, RING_HEAD, RING_TAIL
from shmroute.shared.ring import EMPTY, FULL, PUSHED, pop, push, ring_has_work, ring_pop, ring_push
from shmroute.shared.segment import Segment
from shmroute.shared.words import LOW32, REQUEST_BITS, request_expert, request_layer
from shmroute.sources import SyntheticSource

BITS = 3
SIZE = 1 << BITS
BYTES = RING_ENTRIES + SIZE * WORD
CANARY = 0x5EED5EED5EED5EED
STEPS = 8 * SIZE
"""More loads than any one operation needs when nobody else is at work."""

entries = st.lists(words, min_size=SIZE, max_size=SIZE)


class Watched:
    """A ring between two canaries, and `ring`'s operations on words, counted and confined to it."""

    def __init__(self, head: int, tail: int, contents: list[int]) -> None:
        self._memory = Memory(BYTES + 128)
        self.address = self._memory.address + 64
        for edge in (*range(-64, 0, WORD), *range(BYTES, BYTES + 64, WORD)):
            store(self.address + edge, CANARY)
        store(self.address + RING_HEAD, head)
        store(self.address + RING_TAIL, tail)
        for i, word in enumerate(contents):
            store(self.address + RING_ENTRIES + i * WORD, word)
        self._allowed = {self.address + RING_HEAD, self.address + RING_TAIL} | {
            self.address + RING_ENTRIES + i * WORD for i in range(SIZE)
        }

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Whoever leaves the ring, or goes round and round, is caught."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("load", "cas"):
                patch.setattr(ring_module, name, self._confined(Steps(getattr(atomic, name), STEPS)))
            yield

    def _confined(self, operation: Any) -> Any:
        def confined(address: int, *arguments: int) -> int:
            assert address in self._allowed, "a word outside the ring is touched"
            result: int = operation(address, *arguments)
            return result

        return confined

    def close(self) -> None:
        """Nothing beside the ring was written."""
        for edge in (*range(-64, 0, WORD), *range(BYTES, BYTES + 64, WORD)):
            assert load(self.address + edge) == CANARY
        self._memory.close()


def lap(position: int) -> int:
    """The lap of a position, as entries carry it."""
    return (position >> BITS) & LOW32


def fitting(position: int, published: list[bool], low: list[int]) -> list[int]:
    """Entries as real cursors at `position` find them: of this lap or of the one before, with any request in them."""
    words = [0] * SIZE
    for i in range(SIZE):
        at = position + i
        words[at % SIZE] = signed(((lap(at) - (not published[i])) & LOW32) << 32 | low[i])
    return words


# ------------------------------------------------------------------ any words


STRAY = 5 * SIZE
"""A cursor of lap 5, over entries of lap 0."""


@fuzz(3)
@given(head=words, tail=words, contents=entries)
@example(head=STRAY, tail=STRAY, contents=[0] * SIZE)
def test_a_pop_ends_whatever_the_ring_holds(head: int, tail: int, contents: list[int]) -> None:
    ring = Watched(head, tail, contents)
    with ring.watched():
        taken = pop(ring.address, BITS)
    assert taken == EMPTY or 0 <= taken <= LOW32
    ring.close()


@fuzz(3)
@given(head=words, tail=words, contents=entries, request=st.integers(0, (1 << REQUEST_BITS) - 1))
@example(head=STRAY, tail=STRAY, contents=[0] * SIZE, request=1)
def test_a_push_ends_whatever_the_ring_holds(head: int, tail: int, contents: list[int], request: int) -> None:
    ring = Watched(head, tail, contents)
    with ring.watched():
        assert push(ring.address, BITS, request) in (PUSHED, FULL)
    ring.close()


@fuzz(3)
@given(head=words, tail=words, contents=entries)
@example(head=STRAY, tail=STRAY, contents=[0] * SIZE)
def test_looking_for_work_ends_whatever_the_ring_holds(head: int, tail: int, contents: list[int]) -> None:
    ring = Watched(head, tail, contents)
    with bounded():
        has_work = ring_has_work(ring.address, BITS)
    assert has_work == (lap(head) == load(ring.address + RING_ENTRIES + (head % SIZE) * WORD) >> 32 & LOW32)
    ring.close()


# ------------------------------------------------------------------ cursors that fit, requests that do not


@fuzz(3)
@given(
    position=st.integers(0, 2**63 - 1 - SIZE),
    tail_ahead=words,
    published=st.lists(st.booleans(), min_size=SIZE, max_size=SIZE),
    low=st.lists(st.integers(0, LOW32), min_size=SIZE, max_size=SIZE),
)
def test_any_requests_in_entries_of_fitting_laps_come_out_until_the_first_gap(
    position: int, tail_ahead: int, published: list[bool], low: list[int]
) -> None:
    ring = Watched(position, tail_ahead, fitting(position, published, low))
    expected = low[: [*published, False].index(False)]
    with bounded():
        taken = [ring_pop(ring.address, BITS) for _ in range(len(expected) + 2)]
    assert taken == [*expected, EMPTY, EMPTY]
    assert load(ring.address + RING_HEAD) == position + len(expected)
    ring.close()


@fuzz(3)
@given(
    position=st.integers(0, 2**63 - 1 - 2 * SIZE),
    head=words,
    published=st.lists(st.booleans(), min_size=SIZE, max_size=SIZE),
    request=st.integers(0, (1 << REQUEST_BITS) - 1),
)
def test_a_push_into_entries_of_fitting_laps_takes_the_first_gap_or_is_refused(
    position: int, head: int, published: list[bool], request: int
) -> None:
    ring = Watched(head, position, fitting(position, published, [0] * SIZE))
    gap = position + [*published, False].index(False)
    with bounded():
        code = ring_push(ring.address, BITS, request)
    entry = load(ring.address + RING_ENTRIES + (gap % SIZE) * WORD)
    if code == PUSHED:
        assert (entry & LOW32, entry >> 32 & LOW32) == (request, lap(gap))
        assert load(ring.address + RING_TAIL) == gap + 1
    else:
        assert code == FULL
        assert load(ring.address + RING_TAIL) == gap
    ring.close()


# ------------------------------------------------------------------ the pager


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Segment, Pager]]:
    """A pager at work on 2 layers of 3 experts, none of which any word requests."""
    source = SyntheticSource(2, 3, 4, 5)
    config = RuntimeConfig.from_checkpoint(source, "50%", max_workers=2, pager=PagerConfig(tick=0.01, prefetch=0))
    with segment_of(config) as segment, PagerLock(segment) as lock:
        assert lock.try_acquire()
        pager = Pager(segment, source)
        yield segment, pager
        pager.close()


@fuzz(0.5)
@given(
    position=st.integers(0, 2**40),
    low=st.lists(st.integers(0, LOW32) | st.sampled_from([3, 2 << 12, 1 << 22, LOW32]), min_size=16, max_size=16),
)
def test_the_pager_drops_impossible_requests_and_counts_them(
    served: tuple[Segment, Pager], position: int, low: list[int]
) -> None:
    segment, pager = served
    layout = segment.layout
    assert layout.ring_bits == 4
    for cursor in (RING_HEAD, RING_TAIL):
        segment.write(layout.ring + cursor, position)
    for i, request in enumerate(low):
        word = signed(((position + i >> 4) & LOW32) << 32 | request)
        segment.write(layout.ring + RING_ENTRIES + (position + i) % 16 * WORD, word)
    before = bytes(segment.buffer[layout.clock : layout.ring])
    invalid = read_metrics(segment).pager.counters["invalid_requests"]
    rounds = iter(range(2))
    with in_time():
        pager.serve(lambda: next(rounds, None) is None)
    impossible = sum(request_layer(word) >= 2 or request_expert(word) >= 3 for word in low)
    assert read_metrics(segment).pager.counters["invalid_requests"] == invalid + impossible
    assert segment.read(layout.ring + RING_HEAD) == position + 16
    assert bytes(segment.buffer[layout.clock : layout.ring]) == before
