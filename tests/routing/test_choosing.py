"""Which experts are chosen, what that requests, and what it counts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from runtimes import Metrics, Residency, clock_of, everything_recorded, logits_choosing, small_config, unique_name

from shmroute.config import RouterConfig
from shmroute.lifecycle import create
from shmroute.runtime import Runtime
from shmroute.shared.atomic import COMPILED
from shmroute.shared.requests import PagingDirection, PagingPriority
from shmroute.shared.ring import EMPTY, ring_pop
from shmroute.shared.words import REQUESTED, RESIDENT

LOGITS = np.array([0.1, 0.9, -0.5, 0.8, 0.0, 0.7, -1.0, 0.2], np.float32)


def counted(runtime: Runtime) -> Metrics:
    """All counters."""
    return runtime.metrics().total.counters


def drain(runtime: Runtime) -> int:
    """Take all requests off the ring; how many there were."""
    layout, base = runtime._attachment.segment.layout, runtime._attachment.segment.address
    taken = 0
    while ring_pop(base + layout.ring, layout.ring_bits) != EMPTY:
        taken += 1
    return taken


def by_definition(
    logits: npt.NDArray[np.float32], k: int, resident: set[int] | None = None, bonus: float = 0.0
) -> list[list[int]]:
    """Top-k by logit plus bonus, ties to the lower id: a sort, written plainly."""
    raised = {expert: bonus for expert in resident or set()}
    return [
        sorted(range(len(row)), key=lambda expert: (-(float(row[expert]) + raised.get(expert, 0.0)), expert))[:k]
        for row in logits
    ]


# ------------------------------------------------------------------ the choice


def test_a_token_goes_to_its_best_experts_in_order(make_runtime: Callable[..., Runtime]) -> None:
    decision = make_runtime(top_k=3).router(0).route(LOGITS)
    assert decision.experts.tolist() == [1, 3, 5]
    assert decision.experts.dtype == np.int32
    assert decision.weights.dtype == np.float32
    assert decision.weights.sum() == pytest.approx(1)
    assert decision.weights[0] > decision.weights[1] > decision.weights[2]


def test_the_bonus_changes_the_choice_but_not_the_weights(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime(top_k=1)
    Residency(runtime).load(0, 3)
    decision = runtime.router(0).route(np.stack([LOGITS, LOGITS]))
    assert decision.experts.tolist() == [[3], [3]]
    assert decision.hits == 2
    assert decision.weights.tolist() == [[1], [1]]
    assert counted(runtime)["changed"] == 2


def test_experts_are_ordered_by_logit_plus_bonus_and_weighted_without(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime(top_k=3)
    Residency(runtime).load(0, 3)
    decision = runtime.router(0).route(LOGITS)
    assert decision.experts.tolist() == [3, 1, 5]
    assert decision.weights[0] < decision.weights[1]
    assert counted(runtime)["changed"] == 0


def test_a_bonus_too_small_changes_nothing(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime(top_k=1, router=RouterConfig(cache_bonus=0.05))
    Residency(runtime).load(0, 3)
    assert runtime.router(0).route(LOGITS).experts.tolist() == [1]
    assert counted(runtime)["changed"] == 0


def test_ties_go_to_the_lower_id(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime(top_k=3)
    assert runtime.router(0).route(np.zeros(8, np.float32)).experts.tolist() == [0, 1, 2]
    Residency(runtime).load(0, 6, 4)
    assert runtime.router(0).route(np.zeros(8, np.float32)).experts.tolist() == [4, 6, 0]


def test_zeros_of_either_sign_tie(make_runtime: Callable[..., Runtime]) -> None:
    logits = np.array([-0.0, 0.0, -0.0, 0.0, -1, -1, -1, -1], np.float32)
    assert make_runtime().router(0).route(logits).experts.tolist() == [0, 1]


@pytest.mark.parametrize("resident", [[], [0, 1, 2, 3, 4, 5, 6, 7]], ids=["none", "all"])
def test_with_all_or_none_resident_the_bonus_says_nothing(
    make_runtime: Callable[..., Runtime], resident: list[int]
) -> None:
    runtime = make_runtime(slots=8, router=RouterConfig(cache_bonus=100.0))
    Residency(runtime).load(0, *resident)
    decision = runtime.router(0).route(LOGITS)
    assert decision.experts.tolist() == [1, 3]
    assert decision.hits == (2 if resident else 0)
    assert len(decision.requests) == 2 - decision.hits
    assert counted(runtime)["changed"] == 0


def test_without_memory_awareness_the_bonus_is_never_applied(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime(top_k=1, router=RouterConfig(memory_aware=False, cache_bonus=100.0))
    Residency(runtime).load(0, 3)
    decision = runtime.router(0).route(LOGITS)
    assert decision.experts.tolist() == [1]
    assert (decision.hits, len(decision.requests)) == (0, 1)
    assert (counted(runtime)["misses"], counted(runtime)["changed"]) == (1, 0)


def test_the_same_logits_and_residency_give_the_same_choice(make_runtime: Callable[..., Runtime]) -> None:
    """INV-6."""
    runtime = make_runtime(num_layers=2, slots=6)
    for layer in range(2):
        Residency(runtime).load(layer, 2, 5)
        if layer == 0:
            runtime._attachment.segment.check_live()
    logits = np.random.default_rng(3).normal(size=(100, 8)).astype(np.float32)
    first = runtime.router(0).route(logits)
    for again in (runtime.router(0).route(logits), runtime.router(1).route(logits)):
        assert again.experts.tolist() == first.experts.tolist()
        assert again.weights.tolist() == first.weights.tolist()
    assert [runtime.router(0).route(row).experts.tolist() for row in logits] == first.experts.tolist()


def test_the_bonus_of_a_layer_can_be_changed_at_any_time(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime(top_k=1, num_layers=2)
    router = runtime.router(0)
    Residency(runtime).load(0, 6)
    assert router.cache_bonus == pytest.approx(0.15)
    assert router.route(LOGITS).experts.tolist() == [1]
    router.cache_bonus = 5.0
    assert router.route(LOGITS).experts.tolist() == [6]
    assert runtime.router(1).cache_bonus == pytest.approx(0.15)
    for impossible in (-0.1, float("nan"), 1e7, True, "1"):
        with pytest.raises(ValueError, match="cache_bonus must be a number in"):
            router.cache_bonus = impossible
    assert router.cache_bonus == 5.0


@pytest.mark.parametrize("num_experts", [1, 63, 64, 65, 100, 128, 256])
def test_any_number_of_experts_is_chosen_from(make_runtime: Callable[..., Runtime], num_experts: int) -> None:
    k = min(8, num_experts)
    resident = {expert for expert in range(num_experts) if expert % 5 == 3 or expert in (63, 64, num_experts - 1)}
    runtime = make_runtime(num_experts=num_experts, top_k=k, slots=num_experts, router=RouterConfig(cache_bonus=0.7))
    Residency(runtime).load(0, *resident)
    assert runtime.resident(0) == sorted(resident)
    assert {expert for expert in range(num_experts) if runtime.is_resident(0, expert)} == resident
    logits = np.random.default_rng(num_experts).normal(size=(50, num_experts)).astype(np.float32)
    decision = runtime.router(0).route(logits)
    expected = by_definition(logits, k, resident, 0.7)
    assert decision.experts.tolist() == expected
    hits = sum(expert in resident for row in expected for expert in row)
    assert decision.hits == counted(runtime)["hits"] == hits
    plain = by_definition(logits, k)
    changed = sum(expert not in without for row, without in zip(expected, plain, strict=True) for expert in row)
    assert counted(runtime)["changed"] == changed
    assert {request.expert for request in decision.requests} == {e for row in expected for e in row} - resident


# Multiples of 2^-10, so that adding a bonus never rounds two different scores to one.
FLOATS = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 0.25]), st.integers(-(2**20), 2**20).map(lambda n: n / 1024))


@settings(max_examples=60 if COMPILED else 5)
@given(
    logits=arrays(np.float32, (4, 9), elements=FLOATS),
    k=st.integers(1, 9),
    resident=st.sets(st.integers(0, 8)),
    bonus=st.sampled_from([0.0, 0.25, 1.0]),
)
def test_the_choice_is_the_definition(
    logits: npt.NDArray[np.float32], k: int, resident: set[int], bonus: float
) -> None:
    config = small_config(num_experts=9, top_k=k, slots=9, router=RouterConfig(cache_bonus=bonus))
    with create(unique_name(), config, progress=None) as runtime:
        Residency(runtime).load(0, *resident)
        decision = runtime.router(0).route(logits)
    assert decision.experts.tolist() == by_definition(logits, k, resident, bonus)


# ------------------------------------------------------------------ requests


def test_every_miss_is_requested_once(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime(num_layers=2)
    residency = Residency(runtime)
    decision = runtime.router(1).route(logits_choosing([[4, 1], [1, 7], [4, 7]], 8))
    assert [(r.layer, r.expert, r.direction, r.priority) for r in decision.requests] == [
        (1, expert, PagingDirection.IN, PagingPriority.NORMAL) for expert in (4, 1, 7)
    ]
    assert [residency.state(1, expert) for expert in (4, 1, 7)] == [REQUESTED] * 3
    assert counted(runtime)["requests"] == drain(runtime) == 3


def test_only_what_this_call_queued_is_in_its_requests(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime()
    router = runtime.router(0)
    assert [r.expert for r in router.route(logits_choosing([[4, 1]], 8)).requests] == [4, 1]
    assert [r.expert for r in router.route(logits_choosing([[4, 2]], 8)).requests] == [2]
    assert router.route(logits_choosing([[4, 2]], 8)).requests == []
    assert counted(runtime)["misses"] == 6
    assert counted(runtime)["requests"] == drain(runtime) == 3


def test_a_resident_expert_is_not_requested(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime()
    residency = Residency(runtime)
    residency.load(0, 4, 1)
    decision = runtime.router(0).route(logits_choosing([[4, 1]], 8))
    assert (decision.hits, decision.requests) == (2, [])
    assert residency.state(0, 4) == RESIDENT
    assert drain(runtime) == 0


def test_an_evicted_expert_is_requested_again(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime()
    residency = Residency(runtime)
    residency.load(0, 4, 1)
    residency.evict(0, 1)
    assert [r.expert for r in runtime.router(0).route(logits_choosing([[4, 1]], 8)).requests] == [1]


def test_a_full_ring_loses_nothing(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime(num_experts=16, top_k=16)
    size = 1 << runtime._attachment.segment.layout.ring_bits
    for _ in range(size - 2):
        assert runtime.page_out(0, 0)
    assert runtime.router(0).route(np.zeros(16, np.float32)).hits == 0
    assert counted(runtime)["requests"] == 2
    assert counted(runtime)["ring_full"] == 14
    residency = Residency(runtime)
    assert [residency.state(0, expert) for expert in range(16)] == [REQUESTED] * 16
    assert not runtime.page_out(0, 0)
    assert drain(runtime) == size


# ------------------------------------------------------------------ counting


def test_hits_and_misses_make_the_hit_rate(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime()
    assert runtime.metrics().hit_rate is None
    Residency(runtime).load(0, 4)
    runtime.router(0).route(logits_choosing([[4, 1], [4, 2], [5, 6]], 8))
    runtime.router(0).route(logits_choosing([[4, 1]], 8)[0])
    metrics = runtime.metrics()
    assert metrics.hit_rate == 3 / 8
    assert (metrics.total.counters["hits"], metrics.total.counters["misses"]) == (3, 5)
    assert (metrics.total.counters["calls"], metrics.total.counters["tokens"]) == (2, 4)
    assert metrics.total.route.total == 2
    assert metrics.resident == 1


def test_without_metrics_calls_are_counted_and_not_timed(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime(router=RouterConfig(metrics=False))
    runtime.router(0).route(LOGITS)
    assert counted(runtime)["calls"] == 1
    assert runtime.metrics().total.route.total == 0


def test_an_empty_batch_is_routed_to_nothing(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime()
    router = runtime.router(0)
    before = everything_recorded(runtime)
    decision = router.route(np.empty((0, 8), np.float32))
    assert (decision.experts.shape, decision.weights.shape) == ((0, 2), (0, 2))
    assert (decision.hits, decision.requests) == (0, [])
    nothing = np.empty((0, 8), np.float32), np.empty((0, 2), np.int32), np.empty((0, 2), np.float32)
    assert router.route_into(*nothing) == 0
    assert everything_recorded(runtime) == before
    assert clock_of(runtime) == 0


def test_the_hot_path_does_what_route_does(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime(num_layers=2)
    logits = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)
    experts, weights = np.empty((20, 2), np.int32), np.empty((20, 2), np.float32)
    misses = runtime.router(0).route_into(logits, experts, weights)
    decision = runtime.router(1).route(logits)
    assert experts.tolist() == decision.experts.tolist()
    assert weights.tolist() == decision.weights.tolist()
    assert misses == 40 - decision.hits == 40
    assert runtime.affinity(0).scores().tolist() == runtime.affinity(1).scores().tolist()
