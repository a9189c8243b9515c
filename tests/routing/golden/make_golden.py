"""Makes the golden vectors of `tests/routing/test_golden.py`: what the routers of Transformers choose and weigh.

Not a part of the test suite, which only reads the files: run it where torch and transformers are installed,

    python tests/routing/golden/make_golden.py

and it writes ``tests/data/routing_FAMILY.npz``: logits float32 [T, E], bias float32 [E] (sigmoid families), ids int32
[T, k] by descending choosing score, weights float32 [T, k], and the settings as JSON. Each router is the class that the
family's modelling code uses, with the identity for its gate, so that the hidden states that it gets are its logits.
Rows in which two choosing scores, or two groups, are nearly equal are left out: their order is rounding's.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

DATA = Path(__file__).resolve().parents[2] / "data"
TOKENS = 64
NEAR = 1e-5

# Family -> module, router class, config class, the config's keys, what RouterConfig should say.
FAMILIES: dict[str, tuple[str, str, str, dict[str, Any], dict[str, Any]]] = {
    "mixtral": (
        "mixtral", "MixtralTopKRouter", "MixtralConfig",
        {"num_local_experts": 8, "num_experts_per_tok": 2}, {"renormalize": True},
    ),
    "qwen2_moe": (
        "qwen2_moe", "Qwen2MoeTopKRouter", "Qwen2MoeConfig",
        {"num_experts": 60, "num_experts_per_tok": 4, "norm_topk_prob": False}, {"renormalize": False},
    ),
    "qwen3_moe": (
        "qwen3_moe", "Qwen3MoeTopKRouter", "Qwen3MoeConfig",
        {"num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}, {"renormalize": True},
    ),
    "olmoe": (
        "olmoe", "OlmoeTopKRouter", "OlmoeConfig",
        {"num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False}, {"renormalize": False},
    ),
    "deepseek_v2_lite": (
        "deepseek_v2", "DeepseekV2TopkRouter", "DeepseekV2Config",
        {"n_routed_experts": 64, "num_experts_per_tok": 6, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
         "routed_scaling_factor": 1.0},
        {"renormalize": False},
    ),
    "deepseek_v2": (
        "deepseek_v2", "DeepseekV2TopkRouter", "DeepseekV2Config",
        {"n_routed_experts": 160, "num_experts_per_tok": 6, "topk_method": "group_limited_greedy", "n_group": 8,
         "topk_group": 3, "routed_scaling_factor": 16.0},
        {"renormalize": False, "n_group": 8, "topk_group": 3, "group_score": "max", "routed_scaling_factor": 16.0},
    ),
    "deepseek_v3": (
        "deepseek_v3", "DeepseekV3TopkRouter", "DeepseekV3Config",
        {"n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4, "norm_topk_prob": True,
         "routed_scaling_factor": 2.5},
        {"renormalize": True, "scoring": "sigmoid", "n_group": 8, "topk_group": 4, "group_score": "top2-sum",
         "routed_scaling_factor": 2.5},
    ),
    "glm4_moe": (
        "glm4_moe", "Glm4MoeTopkRouter", "Glm4MoeConfig",
        {"n_routed_experts": 128, "num_experts_per_tok": 8, "n_group": 1, "topk_group": 1, "norm_topk_prob": True,
         "routed_scaling_factor": 1.0},
        {"renormalize": True, "scoring": "sigmoid", "group_score": "top2-sum"},
    ),
    "gpt_oss": (
        "gpt_oss", "GptOssTopKRouter", "GptOssConfig",
        {"num_local_experts": 128, "num_experts_per_tok": 4}, {"renormalize": True},
    ),
}  # fmt: skip


def choosing_scores(logits: np.ndarray, bias: np.ndarray | None) -> np.ndarray:
    """float64 [T, E]"""
    wide = logits.astype(np.float64)
    if bias is None:
        exponents = np.exp(wide - wide.max(1, keepdims=True))
        return exponents / exponents.sum(1, keepdims=True)
    return 1 / (1 + np.exp(-wide)) + bias


def unambiguous(scores: np.ndarray, groups: int) -> np.ndarray:
    """The rows in which the best scores, and all groups', are well apart, bool [T]."""
    best = -np.sort(-scores, axis=1)[:, :20]
    apart = (best[:, :-1] - best[:, 1:] > NEAR * best[:, :-1]).all(1)
    within = -np.sort(-scores.reshape(len(scores), groups, -1), axis=2)
    for worth in (within[..., 0], within[..., :2].sum(2)):
        apart &= (np.diff(np.sort(worth, axis=1), axis=1) > NEAR * worth.max(1, keepdims=True)).all(1)
    return apart


def make(family: str) -> None:
    """Write one family's file."""
    module, router_class, config_class, keys, settings = FAMILIES[family]
    modeling = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
    experts = next(value for key, value in keys.items() if key.endswith("experts"))
    config = getattr(importlib.import_module("transformers"), config_class)(hidden_size=experts, **keys)
    router = getattr(modeling, router_class)(config).eval()
    router.weight.data = torch.eye(experts)
    source = np.random.default_rng(list(FAMILIES).index(family))
    logits = source.normal(scale=1.5, size=(2 * TOKENS, experts)).astype(np.float32)
    bias = None
    if hasattr(router, "e_score_correction_bias"):
        bias = source.normal(scale=0.1, size=experts).astype(np.float32)
        router.e_score_correction_bias.data = torch.from_numpy(bias)
    scores = choosing_scores(logits, bias)
    keep = np.flatnonzero(unambiguous(scores, settings.get("n_group", 1)))[:TOKENS]
    logits, scores = logits[keep], scores[keep]
    with torch.inference_mode():
        seen, weights, ids = router(torch.from_numpy(logits))
    assert np.array_equal(seen.numpy(), logits), "the identity must give the logits back"
    order = np.argsort(-np.take_along_axis(scores, ids.numpy(), 1), axis=1)
    arrays = {
        "logits": logits,
        "ids": np.take_along_axis(ids.numpy(), order, 1).astype(np.int32),
        "weights": np.take_along_axis(weights.numpy(), order, 1).astype(np.float32),
        "settings": np.array(json.dumps(settings)),
    }
    np.savez_compressed(DATA / f"routing_{family}.npz", **arrays, **({} if bias is None else {"bias": bias}))
    print(f"{family}: {len(logits)} tokens")


if __name__ == "__main__":
    DATA.mkdir(exist_ok=True)
    for name in FAMILIES:
        make(name)
