"""At strength 0 every rule routes as the routers of Transformers do; `golden/make_golden.py` recorded these."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from runtimes import REPOSITORY, Residency, small_config, unique_name

from shmroute.config import RULES, RouterConfig
from shmroute.lifecycle import create

FILES = sorted((REPOSITORY / "tests" / "data").glob("routing_*.npz"))


def recorded(family: str) -> dict[str, Any]:
    """A family's logits, ids, weights and settings, and its bias if it has one."""
    with np.load(REPOSITORY / "tests" / "data" / f"routing_{family}.npz") as file:
        return {name: file[name] for name in file.files}


def test_all_families_are_recorded() -> None:
    assert {path.stem.removeprefix("routing_") for path in FILES} == {
        "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2_lite", "deepseek_v2", "deepseek_v3", "glm4_moe",
        "gpt_oss",
    }  # fmt: skip


@pytest.mark.parametrize("family", [path.stem.removeprefix("routing_") for path in FILES])
@pytest.mark.parametrize("rule", RULES)
def test_the_model_s_own_routing_is_that_of_transformers(family: str, rule: str) -> None:
    golden = recorded(family)
    tokens, num_experts = golden["logits"].shape
    top_k = golden["ids"].shape[1]
    assert tokens == 64
    router_config = RouterConfig(
        rule=rule, cache_bonus=0.0, max_rank=num_experts if rule == "max-rank" else 0,
        **json.loads(str(golden["settings"])),
    )  # fmt: skip
    config = small_config(num_experts=num_experts, top_k=top_k, slots=num_experts, router=router_config)
    with create(unique_name(), config, progress=None) as runtime:
        Residency(runtime).load(0, *range(0, num_experts, 2))
        router = runtime.router(0)
        if "bias" in golden:
            router.correction_bias = golden["bias"]
        decision = router.route(golden["logits"])
        experts, weights = np.zeros_like(golden["ids"]), np.zeros_like(golden["weights"])
        router.route_into(golden["logits"], experts, weights)
        assert runtime.metrics().total.counters["changed"] == 0
    assert decision.experts.tolist() == golden["ids"].tolist() == experts.tolist()
    assert decision.weights == pytest.approx(golden["weights"], rel=1e-6, abs=1e-6)
    assert weights.tolist() == decision.weights.tolist()
