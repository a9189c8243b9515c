"""Prefetching in a replay: what the predictors are good for, and that none of them makes a stream worse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shmroute.config import PagerConfig
from shmroute.demo.recording import Recording
from shmroute.pager.eviction.names import POLICIES
from shmroute.replay.accesses import Accesses, accesses_of
from shmroute.replay.player import Played, play
from shmroute.replay.prefetching import foreseen, predictors_of
from shmroute.replay.run import replay
from shmroute.replay.serving import serve_accesses
from shmroute.replay.timing import Machine, waiting
from shmroute.shared.metrics import Predictor, PrefetchOutcome
from shmroute.speculation import expected_experts
from shmroute.traces.trace import Trace

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-mixtral"
LAYERS, EXPERTS = 6, 8


def machine(load: float) -> Machine:
    """One whose loads take so many steps' computation."""
    return Machine(expert_bytes=1, bandwidth=1 / load, compute=1.0)


def trace(ids: np.ndarray, experts: int = EXPERTS) -> Trace:
    return Trace("made", "made", ids.astype(np.int32), experts)


def markov(tokens: int, sure: float, seed: int = 0) -> Trace:
    """One expert a layer; the next layer's follows from it, but for a share of choices at random."""
    random = np.random.default_rng(seed)
    successor = np.stack([random.permutation(EXPERTS) for _ in range(LAYERS)])
    ids = np.zeros((tokens, LAYERS, 1), np.int64)
    expert = 0
    for token in range(tokens):
        for layer in range(LAYERS):
            expert = int(successor[layer, expert]) if random.random() < sure else int(random.integers(EXPERTS))
            ids[token, layer] = expert
    return trace(ids)


def noise(tokens: int, seed: int = 0) -> Trace:
    """Two experts a layer that nothing announces."""
    random = np.random.default_rng(seed)
    scores = random.random((tokens, LAYERS, EXPERTS))
    return trace(np.argsort(scores, axis=2)[:, :, :2])


def played(accesses: Accesses, slots: int, load: float, *predictors: str, speculated: list[list[int]] | None = None,
           io: int = 1) -> Played:  # fmt: skip
    pager = PagerConfig(prefetch=2 if predictors else 0, predictors=predictors, io_threads=io)
    return play(accesses, slots, machine(load), pager, told=speculated, told_by=Predictor.GATE)


def recorded(tokens: int, workers: int = 1) -> tuple[Accesses, list[list[int]]]:
    """A real model's choices, shared by workers, and what the next layer's gate says of each hidden state."""
    hidden = Recording.load(TINY).hidden[:tokens]
    with np.load(TINY / "activations.npz") as file:
        gates = file["gate"]
    logits = np.einsum("tlh,leh->tle", hidden, gates)
    accesses = accesses_of(trace(np.argsort(-logits, axis=2, kind="stable")[:, :, :2]), workers)
    speculated: list[list[int]] = [[] for _ in accesses.layers]
    # Workers get equal parts of the tokens in turn, so their steps one after the other are the recording's.
    for number, step in enumerate(np.argsort(accesses.workers, kind="stable").tolist()):
        token, layer = divmod(number, LAYERS)
        if layer < LAYERS - 1:
            expected = expected_experts(hidden[None, token, layer] @ gates[layer + 1].T, 2)
            speculated[step] = [(layer + 1) * EXPERTS + expert for expert in expected]
    return accesses, speculated


@pytest.mark.parametrize("slots", [12, 24])
@pytest.mark.parametrize("load", [0.2, 1.0])
def test_with_a_real_models_gates_three_of_five_prefetches_are_useful_and_stalls_fall(slots: int, load: float) -> None:
    accesses, speculated = recorded(1400)
    without = played(accesses, slots, load)
    result = played(accesses, slots, load, "transitions", "gate", speculated=speculated)
    assert result.accuracy is not None
    assert result.accuracy >= 0.60
    assert result.outcomes[Predictor.GATE, PrefetchOutcome.USEFUL] > 300
    assert result.stall_per_token < 0.85 * without.stall_per_token
    assert result.on_time > without.on_time


def test_transitions_learn_what_follows_what() -> None:
    accesses = accesses_of(markov(1500, sure=0.9))
    without, result = played(accesses, 12, 0.3), played(accesses, 12, 0.3, "transitions")
    assert result.accuracy is not None
    assert result.accuracy > 0.65
    assert result.stall_per_token < 0.6 * without.stall_per_token


@pytest.mark.parametrize("predictor", ["affinity", "previous-token", "transitions"])
@pytest.mark.parametrize("load", [0.1, 1.0, 5.0])
@pytest.mark.parametrize("workers", [1, 3])
def test_where_nothing_can_be_foretold_prefetching_does_hardly_any_harm(
    predictor: str, load: float, workers: int
) -> None:
    accesses = accesses_of(noise(600), workers)
    for slots in (8, 24):
        without, result = played(accesses, slots, load), played(accesses, slots, load, predictor)
        # Or half a percent of the computation, where loads are so short that hardly anybody waits at all.
        assert result.stall_per_token <= 1.03 * without.stall_per_token + 0.005 * LAYERS


def test_a_gate_that_is_always_wrong_is_turned_down() -> None:
    accesses, speculated = recorded(900)
    for step, keys in enumerate(speculated):
        wanted = set(accesses.keys[accesses.starts[step + 1] : accesses.starts[step + 2]].tolist()) if keys else set()
        layer = keys[0] // EXPERTS if keys else 0
        speculated[step] = [key for key in range(layer * EXPERTS, (layer + 1) * EXPERTS) if key not in wanted][-2:]
    without = played(accesses, 12, 1.0)
    result = played(accesses, 12, 1.0, "gate", speculated=speculated)
    assert result.stall_per_token <= 1.03 * without.stall_per_token


def test_where_four_workers_demand_all_of_the_channel_prefetching_turns_itself_down() -> None:
    accesses, speculated = recorded(1400, workers=4)
    without = played(accesses, 24, 1.0)
    for predictors in (("transitions", "gate"), ("transitions", "affinity")):
        result = played(accesses, 24, 1.0, *predictors, speculated=speculated)
        assert 0 < result.completed < 0.02 * len(accesses.keys)
        assert result.stall_per_token <= 1.01 * without.stall_per_token


def test_the_books_are_closed() -> None:
    accesses, speculated = recorded(400)
    result = played(accesses, 12, 1.0, "affinity", "previous-token", "transitions", "gate", speculated=speculated)
    issued, completed, useful, wasted, overtaken, cancelled = (result.outcomes[:, o] for o in PrefetchOutcome)
    assert (issued > 0).sum() >= 3
    assert (completed >= useful + wasted).all()
    assert (issued - completed - overtaken - cancelled <= 3).all()  # what is queued or loading at the end
    assert (issued >= completed + overtaken + cancelled).all()


def test_without_prefetching_nothing_is_prefetched() -> None:
    accesses, speculated = recorded(100)
    result = played(accesses, 12, 0.5, speculated=speculated)
    assert result.accuracy is None
    assert not result.outcomes.any()


# ------------------------------------------------------------------ one model of time


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("load", [0.3, 2.0])
def test_with_nothing_ahead_the_player_agrees_exactly_with_serving_and_timing(
    policy: str, workers: int, load: float
) -> None:
    accesses = accesses_of(noise(60), workers)
    for slots, observe_every in ((1, 1), (9, 1), (24, 3)):
        served = serve_accesses(accesses, slots, policy, observe_every)
        pager = PagerConfig(prefetch=0, predictors=(), eviction=policy)
        result = play(accesses, slots, machine(load), pager, observe_every=observe_every)
        assert (result.on_time, result.stall_per_token) == waiting(accesses, served, machine(load))
        assert (result.hit_rate, result.loads) == (served.hits.mean(), len(served.loads))


def test_the_oracle_foresees_what_its_worker_wants_next() -> None:
    accesses = accesses_of(noise(12), 2)
    asked = foreseen(accesses)
    for worker in range(2):
        steps = np.flatnonzero(accesses.workers == worker)
        wanted = [accesses.keys[accesses.starts[s] : accesses.starts[s + 1]].tolist() for s in steps]
        assert [asked[step] for step in steps] == [*wanted[1:], []]


def flat(keys: list[int], workers: list[int] | None = None) -> Accesses:
    """One layer, one expert a token."""
    count, named = len(keys), np.array(workers or [0] * len(keys))
    layers = np.zeros(count, np.int64)
    return Accesses(np.array(keys), np.arange(count + 1), layers, named, 1, 8, 1, int(named.max()) + 1, count)


def hinted(accesses: Accesses, slots: int, told: list[list[int]], load: float, policy: str = "lru") -> Played:
    """With a user's hints after each step."""
    return play(accesses, slots, machine(load), PagerConfig(prefetch=0, eviction=policy), told=told)


@pytest.mark.parametrize("policy", POLICIES)
def test_with_room_time_and_foresight_only_the_first_layer_is_missed(policy: str) -> None:
    accesses = accesses_of(noise(60))
    result = hinted(accesses, LAYERS * EXPERTS, foreseen(accesses), 0.1, policy)
    assert result.hit_rate == 1 - 2 / len(accesses.keys)
    assert result.accuracy == 1
    assert result.completed == result.loads - 2 == len(np.unique(accesses.keys)) - 2


def test_what_is_never_wanted_is_of_no_use() -> None:
    result = hinted(flat([0, 1, 2, 0]), 8, [[5], [6], [], [7]], 0.1)
    assert (result.loads, result.completed, result.accuracy) == (5, 2, 0)  # 7 would come after the end
    assert result.hit_rate == 1 / 4


def test_a_prefetch_takes_the_slot_that_the_policy_gives_up() -> None:
    result = hinted(flat([0, 1, 0, 2, 1]), 2, [[], [], [2], [], []], 0.1)  # 2 takes the slot of 1, then 1 is missed
    assert (result.hit_rate, result.accuracy) == (2 / 5, 1)


def test_a_prefetch_uses_the_time_in_which_others_are_computed() -> None:
    without = hinted(flat([0, 0, 1]), 8, [[], [], []], 0.5)
    assert (without.on_time, without.stall_per_token) == (1 / 3, pytest.approx(1 / 3))
    ahead = hinted(flat([0, 0, 1]), 8, [[1], [], []], 0.5)
    assert (ahead.on_time, ahead.stall_per_token) == (2 / 3, pytest.approx(0.5 / 3))


def test_demand_goes_before_what_is_only_queued_and_pulls_what_it_wants_out_of_the_queue() -> None:
    # 7, 6 and 1 are asked for ahead at 0, and 0 is loaded until 10. Demand of 1 comes at 11, when 0 is done: it
    # waits for 7, which is under way until 20, and overtakes 6.
    result = hinted(flat([0, 1]), 8, [[7, 6, 1], []], 10)
    assert (result.on_time, result.stall_per_token) == (0, pytest.approx((10 + 19) / 2))
    assert result.outcomes[Predictor.HINT, PrefetchOutcome.OVERTAKEN] == 1


def test_a_demand_waits_for_no_load_that_began_ahead_of_it_by_another_workers_clock_only() -> None:
    # Worker 0 loads 0 until 2, computes until 3 and, told at 0, has 5 loaded from 2 to 4; its second token, at 3,
    # hits. Worker 1 comes with clock 0: its load runs from 2 to 4, and not from 4 to 6.
    result = hinted(flat([0, 0, 1], [0, 0, 1]), 8, [[5], [], []], 2)
    assert result.stall_per_token == pytest.approx((2 + 0 + 4) / 3)


def test_who_wants_what_another_workers_clock_began_later_gets_it_first() -> None:
    # As before, but worker 1 wants the expert loaded ahead: it hits, from 2 to 4 likewise.
    result = hinted(flat([0, 0, 0, 5], [0, 0, 0, 1]), 8, [[], [5], [], []], 2)  # told at 3: loaded from 3 to 5
    assert result.hit_rate == 3 / 4
    assert result.stall_per_token == pytest.approx((2 + 4) / 4)


def test_the_only_slot_may_be_one_that_is_being_loaded_ahead() -> None:
    result = hinted(flat([0, 1, 2]), 1, [[5], [6], []], 2)
    assert (result.hit_rate, result.loads) == (0, 5)


def test_foresight_waits_less() -> None:
    made = markov(200, sure=0.5)
    without, oracle = replay(made, [12], ["lru"], machine(0.7), workers=2, prefetch=("none", "oracle"))
    assert (without.prefetch, oracle.prefetch) == ("none", "oracle")
    assert oracle.on_time > without.on_time
    assert oracle.stall_per_token < without.stall_per_token
    assert (without.prefetches["issued"], without.prefetch_accuracy) == (0, None)
    assert oracle.prefetch_accuracy is not None
    assert oracle.prefetch_accuracy > 0.9


def test_each_name_is_a_set_of_predictors() -> None:
    made = markov(400, sure=0.9)
    names = ("none", "transitions", "affinity", "previous-token", "transitions+affinity", "oracle")
    outcomes = replay(made, [12], [*POLICIES, "belady"], machine(0.3), prefetch=names)
    assert [one.prefetch for one in outcomes if one.policy == "lru"] == list(names)
    assert [one.prefetch for one in outcomes if one.policy == "belady"] == ["none"]
    ours = {one.prefetch: one for one in outcomes if one.policy == "expected-next-use"}
    idle = [name for name, one in ours.items() if one.prefetches["completed"] == 0]
    assert idle == ["none"]
    assert ours["oracle"].stall_per_token < ours["transitions"].stall_per_token < ours["none"].stall_per_token
    assert all(one.bytes_per_token == pytest.approx(one.loads / 400) for one in outcomes)
    assert predictors_of("transitions + affinity") == ("transitions", "affinity")
