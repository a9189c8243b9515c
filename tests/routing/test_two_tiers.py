"""A worker with a GPU: what is there is nearer than host memory, and both are nearer than the disk."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from runtimes import Residency, logits_choosing

from routing.test_rules import bitmap_of, routed, spread_word
from shmroute import RouterConfig, Runtime
from shmroute.config import RULES
from shmroute.errors import ConfigError
from shmroute.shared.words import ABSENT, REQUESTED, pack_spread

ROW = np.array([1.0, 0.9, 0.8, 0.7, 0, 0, 0, 0], np.float32)
"""Expert 0 is absent, 1 in host memory, 2 in the GPU, 3 in both."""


@pytest.mark.parametrize(
    ("bonus", "share", "chosen"),
    [(0.0, 0.5, 0), (0.15, 0.0, 0), (0.15, 1.0, 1), (0.3, 0.5, 2), (0.3, 0.4, 2), (0.3, 0.9, 1), (0.11, 0.95, 1)],
)
def test_a_resident_in_host_memory_gets_a_share_of_the_bonus(bonus: float, share: float, chosen: int) -> None:
    config = RouterConfig(cache_bonus=bonus, host_share=share)
    with routed(config, 8, 1, {1, 3}, device={2, 3}) as (_, router):
        assert router.route(ROW).experts.tolist() == [chosen]


@pytest.mark.parametrize("rule", RULES)
def test_with_a_share_of_one_both_tiers_are_alike(rule: str) -> None:
    config = RouterConfig(rule=rule, cache_bonus=0.75, host_share=1.0, max_rank=24 if rule == "max-rank" else 0)
    rows = np.random.default_rng(5).integers(-32, 33, (40, 32)).astype(np.float32) / 8
    choices = []
    for host, device in (({1, 2, 3, 9, 20}, {4, 5, 9}), ({1, 2, 3, 4, 5, 9, 20}, None)):
        with routed(config, 32, 4, host, device=device) as (runtime, router):
            spread_word(runtime, pack_spread(4, 2.0))
            choices.append(router.route(rows).experts.tolist())
    assert choices[0] == choices[1]


@pytest.mark.parametrize("rule", ["max-rank", "cumulative-threshold"])
def test_a_rule_of_ranks_reaches_less_far_into_host_memory(rule: str) -> None:
    """Of ten equal experts in order, the strength reaches eight in the GPU and half of it reaches fewer in memory."""
    row = -np.arange(10, dtype=np.float32) / 1000
    config = RouterConfig(rule=rule, cache_bonus=0.75, max_rank=10 if rule == "max-rank" else 0)
    for host, device, chosen in (({7}, set(), 0), (set(), {7}, 7), ({3}, set(), 3), ({3}, {7}, 3), ({7}, {6}, 6)):
        with routed(config, 10, 1, host, device=device) as (_, router):
            assert router.route(row).experts.tolist() == [chosen], (host, device)


def test_what_is_in_the_gpu_alone_is_a_hit_and_not_requested(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime()
    residency, router = Residency(runtime), runtime.router(0)
    residency.load(0, 1)
    router.set_device_residency(bitmap_of({2}, 8))
    decision = router.route(logits_choosing([[2, 1], [2, 4]], 8))
    assert (decision.hits, [request.expert for request in decision.requests]) == (3, [4])
    assert [residency.state(0, expert) for expert in (2, 4)] == [ABSENT, REQUESTED]
    counters = runtime.metrics().total.counters
    assert (counters["hits"], counters["device_hits"], counters["misses"]) == (3, 2, 1)


def test_with_all_experts_in_host_memory_the_gpu_is_still_preferred() -> None:
    config = RouterConfig(cache_bonus=0.5)
    with routed(config, 8, 1, set(range(8)), device={2}) as (_, router):
        assert router.route(ROW).experts.tolist() == [2]


def test_with_none_in_host_memory_the_gpu_is_still_preferred() -> None:
    with routed(RouterConfig(cache_bonus=0.5), 8, 1, set(), device={2}) as (_, router):
        assert router.route(ROW).experts.tolist() == [2]


@pytest.mark.parametrize("hot", [True, False])
def test_the_gpu_may_change_between_calls_and_be_given_up(hot: bool) -> None:
    with routed(RouterConfig(cache_bonus=0.15), 8, 1, {1}, device=set()) as (runtime, router):
        bitmap = bitmap_of({3}, 8)
        experts, weights = np.empty(1, np.int32), np.empty(1, np.float32)

        def chosen() -> int:
            if hot:
                router.route_into(ROW, experts, weights)
                return int(experts[0])
            return int(router.route(ROW).experts[0])

        assert chosen() == 0
        router.set_device_residency(bitmap)
        assert chosen() == 0
        assert [router.is_on_device(expert) for expert in range(8)] == [expert == 3 for expert in range(8)]
        bitmap |= 1 << 1
        assert chosen() == 1
        bitmap[:] = 0
        assert chosen() == 0
        router.set_device_residency(None)
        assert chosen() == 1
        assert not router.is_on_device(3)
        assert runtime.metrics().total.counters["device_hits"] == 1


def test_a_quality_budget_pays_for_the_gpu_too(make_runtime: Callable[..., Runtime]) -> None:
    """All experts are in host memory, so without a GPU nothing would be charged."""
    logits = np.random.default_rng(1).normal(size=(400, 16)).astype(np.float32)
    adjustments = []
    for device in (None, bitmap_of(set(range(6)), 16)):
        runtime = make_runtime(
            num_experts=16, top_k=2, slots=16, router=RouterConfig(cache_bonus=0.2, quality_budget=0.02)
        )
        Residency(runtime).load(0, *range(16))
        router = runtime.router(0)
        router.set_device_residency(device)
        for part in np.split(logits, 40):
            router.route(part)
        adjustments.append(router.cache_bonus != pytest.approx(0.2))
    assert adjustments == [False, True]


@pytest.mark.parametrize(
    ("bitmap", "complaint"),
    [
        (np.zeros(2, np.int64), r"int64 \[1\], not int64 \[2\]"),
        (np.zeros(1, np.uint64), r"int64 \[1\], not uint64 \[1\]"),
        ([0], r"int64 \[1\], not a list"),
    ],
)
def test_another_bitmap_is_refused(make_runtime: Callable[..., Runtime], bitmap: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        make_runtime().router(0).set_device_residency(bitmap)


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), True, "half"])
def test_a_share_is_from_0_to_1(share: Any) -> None:
    with pytest.raises(ConfigError, match="host_share must be a number in"):
        RouterConfig(host_share=share)
