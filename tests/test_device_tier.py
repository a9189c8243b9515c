"""Which experts are in a worker's GPU: the pager's eviction on tables of its own, without a GPU or torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from runtimes import Residency, small_config

from shmroute import PagerConfig, Runtime
from shmroute.device_tier import DeviceTier, device_slots
from shmroute.errors import ConfigError
from shmroute.pager.eviction.names import POLICIES

LAYERS, EXPERTS = 3, 8
NONE = np.zeros(0, np.int64)


@pytest.fixture
def tier_of(make_runtime: Callable[..., Runtime]) -> Iterator[Callable[..., tuple[Runtime, DeviceTier]]]:
    """``tier_of(slots)``: a runtime without a pager, and a tier of its process."""

    def make(slots: int, **pager: Any) -> tuple[Runtime, DeviceTier]:
        runtime = make_runtime(num_layers=LAYERS, pager=PagerConfig(**pager))
        return runtime, DeviceTier(runtime._attachment, slots)

    yield make


def put(tier: DeviceTier, layer: int, *experts: int, wanted: Any = NONE) -> list[int]:
    """Use and place experts; their slots."""
    tier.use(layer, np.array([experts], np.int64))
    slots = []
    for expert in experts:
        slots.append(tier.make_room(layer, expert, np.asarray(wanted, np.int64)))
        tier.arrived(layer, expert, slots[-1])
    return slots


def present(runtime: Runtime) -> list[list[int]]:
    """What each layer's router takes to be in the GPU."""
    return [[e for e in range(EXPERTS) if runtime.router(layer).is_on_device(e)] for layer in range(LAYERS)]


def test_experts_of_all_layers_share_the_slots(tier_of: Any) -> None:
    runtime, tier = tier_of(4)
    slots = put(tier, 0, 1, 2) + put(tier, 2, 1, 7)
    assert sorted(slots) == [0, 1, 2, 3]
    assert present(runtime) == [[1, 2], [], [1, 7]]
    assert [tier.slot_of(0, 1), tier.slot_of(0, 2), tier.slot_of(2, 1), tier.slot_of(2, 7)] == slots
    assert tier.slot_of(1, 1) is None
    assert runtime.metrics().total.counters["device_copies"] == 4


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_makes_room(tier_of: Any, policy: str) -> None:
    runtime, tier = tier_of(5, eviction=policy)
    source = np.random.default_rng(0)
    for step in range(60):
        layer, experts = step % LAYERS, source.permutation(EXPERTS)[:2].tolist()
        missing = [expert for expert in experts if tier.slot_of(layer, expert) is None]
        tier.use(layer, np.array([experts]))
        for expert in missing:
            slot = tier.make_room(layer, expert, np.array(experts))
            assert tier.slot_of(layer, expert) is None
            assert not runtime.router(layer).is_on_device(expert)
            tier.arrived(layer, expert, slot)
        assert all(runtime.router(layer).is_on_device(expert) for expert in experts)
        assert sum(map(len, present(runtime))) <= 5
        slots = [tier.slot_of(at, e) for at, layer_s in enumerate(present(runtime)) for e in layer_s]
        assert len(set(slots)) == len(slots)


def test_the_policy_goes_by_this_worker_s_own_tokens(tier_of: Any) -> None:
    runtime, tier = tier_of(3, eviction="lru")
    put(tier, 0, 0, 1, 2)
    tier.use(0, np.array([[0], [2]]))
    put(tier, 0, 5)
    assert present(runtime)[0] == [0, 2, 5]


def test_what_the_call_wants_stays_if_anything_else_can_go(tier_of: Any) -> None:
    runtime, tier = tier_of(3, eviction="lru")
    put(tier, 0, 0, 1, 2)
    tier.use(0, np.array([[1, 2]]))
    put(tier, 0, 5, wanted=[0, 1, 5])
    assert present(runtime)[0] == [0, 1, 5]
    put(tier, 0, 6, wanted=range(8))  # all of them: then one of these goes
    assert len(present(runtime)[0]) == 3
    assert 6 in present(runtime)[0]


def test_an_expert_that_does_not_come_leaves_its_slot_free(tier_of: Any) -> None:
    runtime, tier = tier_of(2)
    put(tier, 0, 0, 1)
    for _ in range(5):
        slot = tier.make_room(1, 4, NONE)
        tier.left_out(1, 4, slot)
        assert present(runtime)[1] == []
    assert sum(map(len, present(runtime))) == 1  # the first of these took another's place
    put(tier, 1, 4)
    assert sum(map(len, present(runtime))) == 2


def test_the_tier_is_in_no_way_the_segment_s(tier_of: Any) -> None:
    runtime, tier = tier_of(4)
    Residency(runtime).load(0, 3)
    put(tier, 0, 1, 2)
    assert runtime.resident(0) == [3]
    assert not runtime.affinity(0).activations().any()
    assert Residency(runtime).word(0, 1) == 0


def test_routers_forget_a_tier_that_is_closed(tier_of: Any) -> None:
    runtime, tier = tier_of(4)
    put(tier, 0, 1, 2)
    tier.close()
    assert present(runtime) == [[], [], []]


CONFIG = small_config(num_layers=LAYERS, num_experts=EXPERTS, top_k=2, expert_bytes=8192)


@pytest.mark.parametrize(
    ("budget", "complaint"),
    [
        ("2%", "holds no expert"),
        ("10%", r"budget of '10%' holds 2 experts, but a token's 2 of a layer and one to come need 3 slots of 8192 b"),
        (4096, "holds no expert"),
        ("much", "'much' is no size"),
        (True, "a budget is bytes"),
    ],
)
def test_a_budget_that_does_not_do(budget: str | int, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        device_slots(CONFIG, budget)


def test_a_budget_that_does() -> None:
    assert device_slots(CONFIG, "100%") == LAYERS * EXPERTS == device_slots(CONFIG, "1GiB")
    assert device_slots(CONFIG, 3 * 8192) == 3 == device_slots(CONFIG, "13%")
