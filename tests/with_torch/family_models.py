"""A model of random weights for every supported family, made on the spot, and the same as Transformers loads it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

SHIPPED = Path(__file__).resolve().parents[2] / "examples" / "tiny-mixtral"

_COMMON: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 3,
    "n_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "norm_topk_prob": False,
         "shared_expert_intermediate_size": 40, "mlp_only_layers": [1], "decoder_sparse_step": 1},
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 24, "norm_topk_prob": True,
         "head_dim": 8, "decoder_sparse_step": 1},
    ),
    "olmoe": ("OlmoeConfig", {"num_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": False}),
    "deepseek_v2": (
        "DeepseekV2Config",
        {**_MLA, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 4.0},
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {**_MLA, "n_group": 4, "topk_group": 2, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "n_shared_experts": 1,
         "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "norm_topk_prob": True, "head_dim": 8,
         "routed_scaling_factor": 1.5},
    ),
    "minimax": (
        "MiniMaxConfig",
        {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8, "block_size": 8,
         "layer_types": ["full_attention", "linear_attention", "full_attention"]},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 24, "head_dim": 8,
         "shared_expert_intermediate_size": 40, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
         "linear_key_head_dim": 8, "linear_value_head_dim": 8,
         "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    ),
    "flex_olmo": ("FlexOlmoConfig", {"num_experts": 7, "num_experts_per_tok": 3, "norm_topk_prob": False}),
    "dots1": (
        "Dots1Config",
        {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "n_shared_experts": 1,
         "first_k_dense_replace": 1, "norm_topk_prob": True, "head_dim": 8, "routed_scaling_factor": 2.5,
         "layer_types": ["full_attention"] * 3},
    ),
    "solar_open": (
        "SolarOpenConfig",
        {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "n_shared_experts": 1,
         "head_dim": 8, "routed_scaling_factor": 1.5},
    ),
    "gpt_oss": (
        "GptOssConfig",
        {"num_local_experts": 8, "num_experts_per_tok": 3, "head_dim": 8, "sliding_window": 6},
    ),
}  # fmt: skip
"""model_type -> its config class and what its config says beside `_COMMON`."""


def make_checkpoint(folder: Path, family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
    """A model of random weights as Transformers saves it. Its routers are sure of themselves, as trained ones are.

    `settings` are keys of its config.
    """
    config_class, own = FAMILIES[family]
    torch.manual_seed(list(FAMILIES).index(family))
    config = getattr(transformers, config_class)(**{**_COMMON, **own, **settings})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("gate.weight", "router.weight")):
                tensor.normal_(std=0.7)
            elif name.endswith("e_score_correction_bias"):
                tensor.normal_(std=0.1)
            elif name.endswith(("router.bias", "experts.gate_up_proj_bias")):
                tensor.normal_(std=3.0)  # the latter beyond the limits at which gpt-oss clamps what enters activations
            elif tensor.dim() > 1:
                tensor.normal_(std=0.15)
    model.to(dtype).save_pretrained(folder)
    return folder


def stock(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model as Transformers itself loads it."""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
