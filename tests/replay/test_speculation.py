"""Prefetching in a replay: what the predictors are good for, and that none of them makes a stream worse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shmroute.config import PagerConfig
from shmroute.demo.recording import Recording
from shmroute.replay.accesses import Accesses, accesses_of
from shmroute.replay.speculation import Speculation, speculate
from shmroute.replay.timing import Machine
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
           io: int = 1) -> Speculation:  # fmt: skip
    pager = PagerConfig(prefetch=2 if predictors else 0, predictors=predictors, io_threads=io)
    return speculate(accesses, slots, machine(load), pager, speculated)


def recorded(tokens: int) -> tuple[Accesses, list[list[int]]]:
    """A real model's choices, by one worker, and what the next layer's gate says of each hidden state."""
    hidden = Recording.load(TINY).hidden[:tokens]
    with np.load(TINY / "activations.npz") as file:
        gates = file["gate"]
    logits = np.einsum("tlh,leh->tle", hidden, gates)
    accesses = accesses_of(trace(np.argsort(-logits, axis=2, kind="stable")[:, :, :2]))
    speculated = []
    for token in range(tokens):
        for layer in range(LAYERS - 1):
            expected = expected_experts(hidden[token, layer], gates[layer + 1], 2)
            speculated.append([(layer + 1) * EXPERTS + expert for expert in expected])
        speculated.append([])
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
        assert result.stall_per_token <= 1.03 * without.stall_per_token


def test_a_gate_that_is_always_wrong_is_turned_down() -> None:
    accesses, speculated = recorded(900)
    for step, keys in enumerate(speculated):
        wanted = set(accesses.keys[accesses.starts[step + 1] : accesses.starts[step + 2]].tolist()) if keys else set()
        layer = keys[0] // EXPERTS if keys else 0
        speculated[step] = [key for key in range(layer * EXPERTS, (layer + 1) * EXPERTS) if key not in wanted][-2:]
    without = played(accesses, 12, 1.0)
    result = played(accesses, 12, 1.0, "gate", speculated=speculated)
    assert result.stall_per_token <= 1.03 * without.stall_per_token


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
