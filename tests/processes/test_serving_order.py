"""What the pager loads first, what it drops, what it fetches by itself, and what garbage it survives."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from worlds import PATIENCE, World, eventually, falling_logits

from shmroute.shared.atomic import WORD
from shmroute.shared.experts import QUEUE, request_expert_word, write_word
from shmroute.shared.layout import LANE_WAIT
from shmroute.shared.ring import PUSHED, ring_push
from shmroute.shared.words import (
    ABSENT,
    NORMAL,
    PAGE_IN,
    PAGE_OUT,
    REQUESTED,
    RESIDENT,
    URGENT,
    expert_priority,
    pack_request,
)


def push(world: World, request: int) -> None:
    layout = world.segment.layout
    assert ring_push(world.segment.address + layout.ring, layout.ring_bits, request) == PUSHED


def test_an_urgent_request_overtakes_queued_prefetches_and_upgrades_one_of_its_own(world: World) -> None:
    runtime = world.create(io_threads=1, slots=8, prefetch_stale=600)
    world.close_gate(0, 0)
    assert runtime.prefetch(0, [0]) == 1
    world.await_read(0, 0)  # the only thread is busy
    assert runtime.prefetch(0, [1, 2, 3]) == 3
    eventually(lambda: world.counter("queued") == 3)
    worker = world.worker()
    leased = worker.start("lease", layer=0, expert=3)
    eventually(lambda: expert_priority(world.word(0, 3)) == URGENT)
    also = runtime.experts(0, [5])
    eventually(lambda: world.counter("upgrades") == 1)
    world.open_gate()
    assert leased.get() == world.truth(0, 3)
    assert [expert for expert, *_ in also] == [5]
    eventually(lambda: world.metrics().resident == 5)
    assert world.reads() == [(0, 0), (0, 3), (0, 5), (0, 1), (0, 2)]


def test_an_awaited_expert_loads_before_urgent_ones_that_nobody_waits_for_yet(world: World) -> None:
    runtime = world.create(io_threads=1, slots=8)
    world.close_gate(0, 0)
    runtime.prefetch(0, [0])
    world.await_read(0, 0)
    loop = runtime.experts(0, [1, 2, 3])  # requested, but not awaited before the first step
    worker = world.worker()
    leased = worker.start("lease", layer=0, expert=4)
    eventually(lambda: world.awaited() == {(0, 4)})
    rounds = world.counter("ticks")
    eventually(lambda: world.counter("ticks") >= rounds + 2)  # the pager has looked who waits
    world.open_gate()
    leased.get()
    assert sorted(expert for expert, *_ in loop) == [1, 2, 3]
    assert world.reads()[1] == (0, 4)


def test_an_awaited_expert_is_not_evicted_before_its_waiter_has_it(world: World) -> None:
    runtime = world.create(slots=1)
    world.close_gate(0, 0)
    worker = world.worker()
    leased = worker.start("lease", layer=0, expert=0)
    world.await_read(0, 0)
    worker.stop()
    world.open_gate()
    eventually(lambda: world.state(0, 0) == RESIDENT)
    runtime.page_out(0, 0)
    assert runtime.prefetch(0, [1]) == 1
    eventually(lambda: world.state(0, 1) == ABSENT, "the prefetch's cancellation")
    assert world.state(0, 0) == RESIDENT
    worker.resume()
    assert leased.get() == world.truth(0, 0)


def test_prefetches_that_wait_too_long_are_cancelled(world: World) -> None:
    runtime = world.create(io_threads=1, slots=8, prefetch_stale=0.2)
    world.close_gate(0, 0)
    runtime.prefetch(0, [0])
    world.await_read(0, 0)
    assert runtime.prefetch(0, [1, 2]) == 2
    eventually(lambda: world.counter("prefetches_cancelled") == 2)
    assert [world.state(0, e) for e in (1, 2)] == [ABSENT, ABSENT]
    world.open_gate()
    with runtime.expert(0, 1, PATIENCE):
        pass
    assert world.reads() == [(0, 0), (0, 1)]


def test_a_prefetched_expert_is_not_read_again_on_demand(world: World) -> None:
    runtime = world.create()
    assert runtime.prefetch(0, [3, 4]) == 2
    for expert in (3, 4):
        with runtime.expert(0, expert, PATIENCE):
            pass
    assert sorted(world.reads()) == [(0, 3), (0, 4)]
    assert runtime.prefetch(0, [3]) == 0


def test_prefetch_by_affinity_fills_free_slots_with_what_the_router_favours(world: World) -> None:
    runtime = world.create(slots=4, prefetch=2, predictors=("affinity",))
    for _ in range(3):
        runtime.affinity(1).update([6, 2])  # activated, but never demanded
    eventually(lambda: runtime.resident(1) == [2, 6], "the prefetches")
    assert world.counter("prefetches") == 2
    assert world.counter("loads") == 2


def test_prefetch_by_affinity_evicts_nothing_dearer(world: World) -> None:
    runtime = world.create(slots=1, prefetch=2, predictors=("affinity",))
    with runtime.expert(1, 0, PATIENCE):
        pass
    runtime.affinity(1).update([0, 1])
    for _ in range(3):
        runtime.affinity(1).update([0])  # expert 1 has decayed by a little
    runtime.affinity(0).update([])  # the layer before: now it may be layer 1's turn
    sweeps = world.counter("sweeps")
    eventually(lambda: world.counter("prefetches_cancelled") > 0)
    eventually(lambda: world.counter("sweeps") > sweeps + 3)
    assert runtime.resident(1) == [0]
    assert world.reads() == [(1, 0)]


def test_a_request_that_is_not_on_the_ring_is_found_by_the_sweep(world: World) -> None:
    world.create()
    address = world.expert_address(0, 5)
    failure = world.segment.address + world.segment.layout.row(world.segment.layout.failures, 0) + 5 * WORD
    assert request_expert_word(address, failure, NORMAL) == QUEUE  # and its worker dies before it pushes
    eventually(lambda: world.state(0, 5) == RESIDENT)
    assert world.counter("swept_requests") == 1


def test_stale_bits_of_the_bitmap_are_rebuilt_by_the_sweep(world: World) -> None:
    runtime = world.create()
    with runtime.expert(0, 2, PATIENCE):
        pass
    write_word(world.segment.address + world.segment.layout.resident, 0b1000_0001)
    eventually(lambda: runtime.resident(0) == [2])


def test_impossible_requests_are_counted_and_dropped(world: World) -> None:
    runtime = world.create()
    push(world, pack_request(2, 0, PAGE_IN, URGENT, 0))  # there are layers 0 and 1
    push(world, pack_request(0, 8, PAGE_IN, URGENT, 63))  # and experts 0 to 7
    push(world, (1 << 31) - 1)
    push(world, pack_request(1, 8, PAGE_OUT, 0, 0))
    push(world, pack_request(0, 3, PAGE_IN, URGENT, 62))  # possible, but nobody asked: the word says ABSENT
    push(world, pack_request(0, 3, PAGE_OUT, URGENT, 62))
    eventually(lambda: world.counter("invalid_requests") == 4)
    with runtime.expert(0, 0, PATIENCE):
        pass
    assert world.reads() == [(0, 0)]


def test_wait_words_of_garbage_do_not_disturb_the_pager(world: World) -> None:
    runtime = world.create(slots=1)
    layout = world.segment.layout
    pager = world.metrics().pager.pid
    for garbage in (-1, 1 << 62, (1 << 22) + 9, 9, -(1 << 63)):
        world.segment.write(layout.lane(5) + LANE_WAIT, garbage)
        for expert in (0, 1):
            with runtime.expert(1, expert, PATIENCE):
                pass
    world.segment.write(layout.lane(5) + LANE_WAIT, 0)
    assert world.metrics().pager.pid == pager


def test_a_lane_that_asks_out_of_nowhere_is_charged_to_nobody(world: World) -> None:
    runtime = world.create()
    address = world.expert_address(0, 5)
    failure = world.segment.address + world.segment.layout.row(world.segment.layout.failures, 0) + 5 * WORD
    assert request_expert_word(address, failure, URGENT) == QUEUE
    push(world, pack_request(0, 5, PAGE_IN, URGENT, 40))  # there are 8 lanes
    with runtime.expert(0, 5, PATIENCE):
        pass


def test_misses_of_the_router_are_loaded_and_then_hit(world: World) -> None:
    runtime = world.create()
    router = runtime.router(0)
    first = router.route(falling_logits())
    assert (first.hits, len(first.requests)) == (0, 2)
    eventually(lambda: runtime.resident(0) == [0, 1])
    second = router.route(np.stack([falling_logits()] * 3))
    assert (second.hits, second.requests) == (6, [])
    counters = world.metrics().total.counters
    assert (counters["hits"], counters["misses"], counters["tokens"]) == (6, 2, 4)
    assert world.metrics().hit_rate == 0.75


def test_more_demands_than_slots_wait_hungrily_for_a_release(world: World) -> None:
    runtime = world.create(slots=1, tick=10)  # no sweep in the time of this test: only the bell
    worker = world.worker()
    worker.do("lease", layer=0, expert=0)
    with pytest.raises(TimeoutError), runtime.expert(0, 1, 0.3):
        pass
    assert world.state(0, 1) == REQUESTED
    eventually(lambda: world.counter("hungry_sleeps") > 0)
    worker.do("release")
    eventually(lambda: world.state(0, 1) == RESIDENT)
    assert world.counter("sweeps") <= 2


def test_an_idle_pager_wakes_only_to_sweep(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    runtime = world.create(tick=0.25, prefetch=2)
    with runtime.expert(0, 0, PATIENCE):
        pass
    pid = world.metrics().pager.pid
    assert pid is not None

    def cpu_ticks() -> int:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])

    eventually(lambda: world.counter("queued") == 0)
    rounds, sweeps, used = world.counter("ticks"), world.counter("sweeps"), cpu_ticks()
    eventually(lambda: world.counter("sweeps") >= sweeps + 12)
    rounds, sweeps = world.counter("ticks") - rounds, world.counter("sweeps") - sweeps
    used_ms = (cpu_ticks() - used) * 1000 / os.sysconf("SC_CLK_TCK")
    with capsys.disabled():
        print(f"\nidle pager: {rounds} rounds, {sweeps} sweeps, {used_ms:g} ms of CPU in about {sweeps * 0.25:g} s")
    assert rounds <= 3 * sweeps + 10
