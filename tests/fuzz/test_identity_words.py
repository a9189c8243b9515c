"""Identity words of any bits: nothing breaks, and no live process is ever taken for dead."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator

import pytest
from fuzzing import bounded, fuzz, segment_of, words
from hypothesis import example, given
from hypothesis import strategies as st
from runtimes import small_config

from shmroute.cli.inspection import Process
from shmroute.errors import NoWorkerLane
from shmroute.lifecycle import attach
from shmroute.pager.reaper import Reaper
from shmroute.shared import lanes
from shmroute.shared.atomic import WORD
from shmroute.shared.identity import DeathWatch, is_dead, is_stopped, own_identity, process_stat, same_process
from shmroute.shared.layout import LANE_IDENTITY, LANE_WAIT
from shmroute.shared.segment import Segment
from shmroute.shared.words import (
    GENERATION_BITS,
    LIVE,
    NOBODY,
    PID_BITS,
    RESIDENT,
    START_BITS,
    expert_mask,
    identity_generation,
    identity_pid,
    identity_start,
    identity_state,
    pack_expert,
    pack_identity,
)

generations = st.integers(0, (1 << GENERATION_BITS) - 1)
states = st.integers(1, 3)


@pytest.fixture(scope="module")
def child() -> Iterator[int]:
    """Pid of a process that lives, and does nothing."""
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process.pid
        process.kill()


@pytest.fixture(scope="module")
def segment() -> Iterator[Segment]:
    """With four lanes and eight experts."""
    with segment_of(small_config()) as made:
        yield made


def identity_of(pid: int, state: int = LIVE, generation: int = 0) -> int:
    """The word that names a process."""
    return pack_identity(state, generation, process_stat(pid)[1], pid)


@fuzz(3)
@given(word=words, other=words)
@example(word=pack_identity(LIVE, 0, 0, 0), other=0)
@example(word=pack_identity(LIVE, 0, 0, (1 << PID_BITS) - 1), other=-1)
@example(word=pack_identity(3, 0, 1, 2), other=pack_identity(LIVE, 9, 1, 2))
def test_a_word_of_any_bits_names_somebody_or_nobody(word: int, other: int) -> None:
    with bounded():
        dead = is_dead(word)
        assert dead or identity_state(word) != NOBODY
        shown = Process.of(word)
        assert (shown.state == "none") == (identity_state(word) == NOBODY)
        assert shown.lives or dead
        is_stopped(word)
        assert same_process(word, other) == same_process(other, word)
        with contextlib.closing(DeathWatch[int]()) as watch:
            watch.watch(1, word)
            watch.watch(2, other)
            watch.watch(1, other)
            assert {key for key, _ in watch.dead()} <= {1, 2}


@fuzz()
@given(state=states, generation=generations)
def test_a_live_process_is_never_dead_whatever_else_its_word_says(child: int, state: int, generation: int) -> None:
    for pid in (child, os.getpid()):
        word = identity_of(pid, state, generation)
        with bounded(), contextlib.closing(DeathWatch[int]()) as watch:
            assert not is_dead(word)
            assert Process.of(word).lives
            watch.watch(1, word)
            assert watch.dead() == []


@fuzz()
@given(state=states, generation=generations, start=st.integers(0, (1 << START_BITS) - 1))
def test_a_pid_with_another_start_time_is_dead(child: int, state: int, generation: int, start: int) -> None:
    if start != identity_start(identity_of(child)):
        assert is_dead(pack_identity(state, generation, start, child))


@fuzz()
@given(others=st.lists(words, min_size=3, max_size=3), generation=generations, lane=st.integers(0, 3))
def test_reaping_among_words_of_any_bits_spares_the_living(
    segment: Segment, child: int, others: list[int], generation: int, lane: int
) -> None:
    alive = identity_of(child, LIVE, generation)
    identities = [*others[:lane], alive, *others[lane:]]
    for number, word in enumerate(identities):
        segment.write(segment.layout.lane(number) + LANE_IDENTITY, word)
        segment.write(segment.layout.lane(number) + LANE_WAIT, number + 1)
    leased = segment.layout.experts
    segment.write(leased, pack_expert(RESIDENT, 0, 0, 0b1111))
    with bounded(), contextlib.closing(Reaper(segment)) as reaper:
        assert lane in lanes.live_lanes(segment)
        reaper.reap()
        lanes.reap(segment)
        lanes.free_own_leftovers(segment, own_identity())
    assert segment.read(segment.layout.lane(lane) + LANE_IDENTITY) == alive
    assert segment.read(segment.layout.lane(lane) + LANE_WAIT) == lane + 1
    assert expert_mask(segment.read(leased)) & 1 << lane
    for number, word in enumerate(identities):
        if identity_state(word) != NOBODY and is_dead(word):
            freed = segment.read(segment.layout.lane(number) + LANE_IDENTITY)
            assert identity_state(freed) == NOBODY
            assert identity_generation(freed) == (identity_generation(word) + 1) % (1 << GENERATION_BITS)
            assert segment.read(segment.layout.lane(number) + LANE_WAIT) == 0
            assert not expert_mask(segment.read(leased)) & 1 << number


@fuzz()
@given(free=st.integers(0, (1 << 62) - 1))
@example(free=1)
def test_who_claims_a_free_lane_of_any_bits_is_whom_it_names(segment: Segment, free: int) -> None:
    """Else its worker would be reaped while it lives."""
    me = own_identity()
    layout = segment.layout
    segment.write(layout.lane(0) + LANE_IDENTITY, free)
    assert lanes.claim(segment.address + layout.lanes, layout.lane_bytes, 1, me) == 0
    claimed = segment.read(layout.lane(0) + LANE_IDENTITY)
    segment.write(layout.lane(0) + LANE_IDENTITY, 0)
    assert (identity_pid(claimed), identity_start(claimed)) == (os.getpid(), identity_start(me))
    assert identity_generation(claimed) == identity_generation(free)


@fuzz(0.3)
@given(held=st.lists(words, min_size=4, max_size=4))
def test_a_worker_finds_a_lane_among_words_of_any_bits_or_is_told_that_there_is_none(
    segment: Segment, held: list[int]
) -> None:
    addresses = [segment.layout.lane(number) + LANE_IDENTITY for number in range(4)]
    for address, word in zip(addresses, held, strict=True):
        segment.write(address, word)
    kept = {address: word for address, word in zip(addresses, held, strict=True) if not is_dead(word)}
    with attach(segment.name) as runtime:
        try:
            runtime.router(0)
        except NoWorkerLane:
            assert len(kept) == 4
    for address in addresses:
        word = segment.read(address)
        assert word == kept[address] if address in kept else identity_state(word) == NOBODY or is_dead(word)
        segment.write(address, 0)


@fuzz()
@given(first=words, second=words)
def test_the_segment_s_bookkeeping_of_lanes_touches_lanes_and_masks_only(
    segment: Segment, first: int, second: int
) -> None:
    layout = segment.layout
    before = bytes(segment.buffer)
    for number, word in enumerate((first, second)):
        segment.write(layout.lane(number) + LANE_IDENTITY, word)
    lanes.claim(segment.address + layout.lanes, layout.lane_bytes, segment.config.max_workers, own_identity())
    lanes.reap(segment)
    lanes.free_own_leftovers(segment, own_identity())
    after = bytes(segment.buffer)
    assert after[: layout.experts] == before[: layout.experts]
    assert after[layout.experts + 8 * WORD : layout.lanes] == before[layout.experts + 8 * WORD : layout.lanes]
    assert after[layout.pager :] == before[layout.pager :]
