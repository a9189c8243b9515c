"""Replays against an oracle that shares nothing with them: lists and plain loops."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shmroute.pager.eviction.names import DEFAULT_POLICY, POLICIES
from shmroute.replay.accesses import Accesses, accesses_of
from shmroute.replay.belady import belady_hits
from shmroute.replay.run import ALL, replay
from shmroute.replay.serving import on_demand, serve_accesses
from shmroute.replay.timing import Machine, waiting
from shmroute.traces import Trace

MACHINE = Machine(1000, 1e6, 1e-3)


def made(tokens: int, layers: int, experts: int, k: int, seed: int, stickiness: float = 0.5) -> Trace:
    """Tokens that repeat the last one's choices now and then, some experts more popular than others."""
    rng = np.random.default_rng(seed)
    popularity = rng.dirichlet(np.full(experts, 0.7), layers) * 0.9 + 0.1 / experts
    ids = np.zeros((tokens, layers, k), np.int32)
    for token, layer in itertools.product(range(tokens), range(layers)):
        if token and rng.random() < stickiness:
            ids[token, layer] = ids[token - 1, layer]
        else:
            ids[token, layer] = rng.choice(experts, k, replace=False, p=popularity[layer])
    return Trace("made", "made", ids, experts)


def hits_of(accesses: Accesses, slots: int, policy: str, observe_every: int = 1) -> npt.NDArray[np.bool_]:
    """What a policy hits, nothing being asked for ahead."""
    return serve_accesses(accesses, slots, policy, observe_every).hits


def textbook(keys: list[int], slots: int, policy: str) -> list[bool]:
    """What LRU, LFU (ties by the last use) and Belady's rule hit, found by looking at everything each time."""
    resident: list[int] = []
    hits = []
    for now, key in enumerate(keys):
        past = keys[: now + 1]

        def last(one: int, past: list[int] = past) -> int:
            return len(past) - past[::-1].index(one)

        def following(one: int, now: int = now) -> int:
            return keys.index(one, now + 1) if one in keys[now + 1 :] else len(keys)

        hits.append(key in resident)
        if key in resident:
            continue
        if len(resident) == slots:
            if policy == "lru":
                resident.remove(min(resident, key=last))
            elif policy == "lfu":
                resident.remove(min(resident, key=lambda one: (past.count(one), last(one))))
            else:
                resident.remove(max(resident, key=following))
        resident.append(key)
    return hits


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("slots", [1, 3, 7, 12])
@pytest.mark.parametrize("policy", ["lru", "lfu"])
def test_the_pagers_policies_do_what_textbooks_say(policy: str, slots: int, seed: int) -> None:
    accesses = accesses_of(made(30, 3, 6, 2, seed)).one_by_one()
    assert hits_of(accesses, slots, policy).tolist() == textbook(accesses.keys.tolist(), slots, policy)


@settings(max_examples=60)
@given(keys=st.lists(st.integers(0, 7), min_size=1, max_size=60), slots=st.integers(1, 8))
def test_belady_is_belady(keys: list[int], slots: int) -> None:
    accesses = flat(keys)
    assert belady_hits(accesses, slots).sum() == sum(textbook(keys, slots, "belady"))


@settings(max_examples=20)
@given(keys=st.lists(st.integers(0, 3), min_size=1, max_size=9), slots=st.integers(1, 3))
def test_nothing_beats_belady(keys: list[int], slots: int) -> None:
    def best(now: int, resident: frozenset[int]) -> int:
        if now == len(keys):
            return 0
        if keys[now] in resident:
            return 1 + best(now + 1, resident)
        if len(resident) < slots:
            return best(now + 1, resident | {keys[now]})
        return max(best(now + 1, resident - {gone} | {keys[now]}) for gone in resident)

    assert belady_hits(flat(keys), slots).sum() == best(0, frozenset())


def flat(keys: list[int]) -> Accesses:
    count = len(keys)
    zeros = np.zeros(count, np.int64)
    return Accesses(np.array(keys, np.int64), np.arange(count + 1), zeros, zeros, 1, 8, 1, 1, count)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("workers", [1, 3])
def test_no_policy_beats_belady_and_all_hit_with_a_slot_for_each(policy: str, workers: int) -> None:
    accesses = accesses_of(made(60, 4, 8, 2, 5), workers)
    for slots in (4, 9, 16):
        assert hits_of(accesses, slots, policy).sum() <= belady_hits(accesses, slots).sum()
    assert len(accesses.keys) - hits_of(accesses, 32, policy).sum() == len(np.unique(accesses.keys))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_replay_can_be_repeated(policy: str) -> None:
    accesses = accesses_of(made(40, 3, 8, 2, 6), 2)
    np.testing.assert_array_equal(hits_of(accesses, 8, policy), hits_of(accesses, 8, policy))


def test_the_default_closes_some_of_the_gap_on_sticky_routing() -> None:
    trace = made(300, 8, 16, 2, 7, stickiness=0.4)
    found = {outcome.policy: outcome.hit_rate for outcome in replay(trace, [24], ALL, MACHINE)}
    assert found["lru"] < found[DEFAULT_POLICY] < found["belady"]
    assert found[DEFAULT_POLICY] >= max(found["lfu"], found["least-stale"], found["affinity"])


def test_a_pager_that_looks_seldom_still_serves() -> None:
    accesses = accesses_of(made(60, 4, 8, 2, 8))
    seldom = hits_of(accesses, 12, DEFAULT_POLICY, observe_every=25)
    assert 0 < seldom.sum() <= belady_hits(accesses, 12).sum()


# ------------------------------------------------------------------ the order of accesses


def test_choices_that_were_not_recorded_are_left_out() -> None:
    ids = np.array([[[0, -1], [1, 2]], [[-1, -1], [3, 0]]], np.int32)
    accesses = accesses_of(Trace("t", "t", ids, 4))
    assert accesses.keys.tolist() == [0, 5, 6, 7, 4]
    assert accesses.starts.tolist() == [0, 1, 3, 3, 5]
    assert accesses.layers.tolist() == [0, 1, 0, 1]


def test_workers_share_the_sequences_and_stand_at_layers_apart() -> None:
    ids = np.arange(16, dtype=np.int32).reshape(4, 4, 1)
    accesses = accesses_of(Trace("t", "t", ids, 16, seq_id=np.array([0, 0, 1, 1])), 2)
    assert accesses.workers.tolist() == [0, 0, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1, 1, 1]
    for worker in range(2):
        mine = accesses.workers == worker
        assert accesses.layers[mine].tolist() == [0, 1, 2, 3] * 2
        assert (accesses.keys % 16)[mine].tolist() == list(range(8 * worker, 8 * worker + 8))


def test_one_sequence_is_cut_among_the_workers() -> None:
    accesses = accesses_of(made(10, 2, 4, 1, 1), 3)
    assert np.bincount(accesses.workers).tolist() == [8, 6, 6]


# ------------------------------------------------------------------ time


def test_hits_wait_for_nothing_and_lone_misses_for_their_load() -> None:
    accesses = accesses_of(made(5, 2, 4, 1, 2))
    assert waiting(accesses, on_demand(accesses, np.ones(10, np.bool_)), MACHINE) == (1.0, 0.0)
    on_time, stall = waiting(accesses, on_demand(accesses, np.zeros(10, np.bool_)), MACHINE)  # 1 ms each, two a token
    assert on_time == 0
    assert stall == pytest.approx(2e-3)


def test_a_load_that_ends_while_others_are_computed_is_in_time() -> None:
    trace = Trace("t", "t", np.array([[[0, 1]]], np.int32), 2)
    served = on_demand(accesses_of(trace), np.array([True, False]))
    assert waiting(accesses_of(trace), served, Machine(1000, 1e6, 2e-3)) == (1.0, 0.0)
    on_time, stall = waiting(accesses_of(trace), served, Machine(1000, 1e6, 1e-3))
    assert (on_time, stall) == (0.5, pytest.approx(0.5e-3))


def test_workers_share_the_channel_of_loads() -> None:
    ids = np.array([[[0]], [[1]]], np.int32)
    accesses = accesses_of(Trace("t", "t", ids, 2, seq_id=np.array([0, 1])), 2)
    on_time, stall = waiting(accesses, on_demand(accesses, np.zeros(2, np.bool_)), MACHINE)
    assert (on_time, stall) == (0.0, pytest.approx((1e-3 + 2e-3) / 2))
