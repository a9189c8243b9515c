"""Tiny checkpoints of each family, made on the spot, with what a source should say of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

Array = npt.NDArray[Any]

HIDDEN, INNER, EXPERTS, TOP_K = 8, 6, 4, 2
NUMPY_DTYPES: dict[str, Any] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
}


@dataclass(frozen=True)
class Family:
    """A family's own keys, and where its experts are for `layers` layers; `interleaved` is gpt-oss's spelling."""

    config: dict[str, Any]
    layers: int
    moe_layers: tuple[int, ...]
    block: str = "mlp"
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    renormalize: bool = False
    correction_bias: bool = False
    interleaved: bool = False

    @property
    def parts(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors of which an expert is served."""
        if self.interleaved:
            return {"gate_up": (HIDDEN, 2 * INNER), "gate_up_bias": (2 * INNER,), "down": (INNER, HIDDEN),
                    "down_bias": (HIDDEN,)}  # fmt: skip
        return {"gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}


FAMILIES: dict[str, Family] = {
    "mixtral": Family(
        {"num_local_experts": EXPERTS, "intermediate_size": INNER},
        layers=2,
        moe_layers=(0, 1),
        block="block_sparse_moe",
        projections=("w1", "w3", "w2"),
        renormalize=True,
    ),
    "qwen2_moe": Family(
        {
            "num_experts": EXPERTS,
            "moe_intermediate_size": INNER,
            "intermediate_size": 40,
            "decoder_sparse_step": 2,
        },
        layers=5,
        moe_layers=(1, 3),
    ),
    "qwen3_moe": Family(
        {
            "num_experts": EXPERTS,
            "moe_intermediate_size": INNER,
            "intermediate_size": 40,
            "mlp_only_layers": [0, 2],
            "norm_topk_prob": True,
        },
        layers=4,
        moe_layers=(1, 3),
        renormalize=True,
    ),
    "olmoe": Family(
        {"num_experts": EXPERTS, "intermediate_size": INNER, "norm_topk_prob": None},
        layers=2,
        moe_layers=(0, 1),
    ),
    "deepseek_v2": Family(
        {
            "n_routed_experts": EXPERTS,
            "moe_intermediate_size": INNER,
            "intermediate_size": 40,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 2,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "scoring_func": "softmax",
            "routed_scaling_factor": 1.0,
        },
        layers=5,
        moe_layers=(2, 4),
    ),
    "deepseek_v3": Family(
        {
            "n_routed_experts": EXPERTS,
            "moe_intermediate_size": INNER,
            "intermediate_size": 40,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
        },
        layers=3,
        moe_layers=(1, 2),
        renormalize=True,
        correction_bias=True,
    ),
    "glm4_moe": Family(
        {
            "n_routed_experts": EXPERTS,
            "moe_intermediate_size": INNER,
            "intermediate_size": 40,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
        },
        layers=2,
        moe_layers=(1,),
        renormalize=True,
        correction_bias=True,
    ),
    "minimax": Family(
        {"num_local_experts": EXPERTS, "intermediate_size": INNER},
        layers=2,
        moe_layers=(0, 1),
        renormalize=True,
    ),
    "qwen3_next": Family(
        {"num_experts": EXPERTS, "moe_intermediate_size": INNER, "intermediate_size": 40, "mlp_only_layers": [0]},
        layers=3,
        moe_layers=(1, 2),
        renormalize=True,
    ),
    "flex_olmo": Family(
        {"num_experts": EXPERTS, "intermediate_size": INNER, "norm_topk_prob": None},
        layers=2,
        moe_layers=(0, 1),
    ),
    "dots1": Family(
        {
            "n_routed_experts": EXPERTS,
            "moe_intermediate_size": INNER,
            "intermediate_size": 40,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 2.5,
        },
        layers=3,
        moe_layers=(1, 2),
        correction_bias=True,
    ),
    "solar_open": Family(
        {
            "n_routed_experts": EXPERTS,
            "moe_intermediate_size": INNER,
            "intermediate_size": 40,
            "n_group": 1,
            "topk_group": 1,
        },
        layers=2,
        moe_layers=(0, 1),
        renormalize=True,
        correction_bias=True,
    ),
    "gpt_oss": Family(
        {
            "num_local_experts": EXPERTS,
            "intermediate_size": INNER,
            "hidden_act": "silu",
            "swiglu_limit": 7.0,
        },
        layers=2,
        moe_layers=(0, 1),
        renormalize=True,
        interleaved=True,
    ),
}
SPELLINGS = [
    (name, fused) for name, family in FAMILIES.items() for fused in (False, True) if fused or not family.interleaved
]
"""Every family with how its experts may be stored: whether fused."""


@dataclass
class Checkpoint:
    """What was written.

    `experts` maps (MoE layer from 0, expert) to an expert's parts, `gates` the MoE layer to the router, `gate_biases`
    to what it adds to its logits, `correction_biases` to the bias for choosing.
    """

    folder: Path
    family: Family
    config: dict[str, Any]
    tensors: dict[str, Array]
    experts: dict[tuple[int, int], tuple[Array, ...]] = field(default_factory=dict)
    gates: dict[int, Array] = field(default_factory=dict)
    gate_biases: dict[int, Array] = field(default_factory=dict)
    correction_biases: dict[int, Array] = field(default_factory=dict)

    def expert_bytes(self, layer: int, expert: int) -> bytes:
        return b"".join(array.tobytes() for array in self.experts[layer, expert])


def build(
    folder: Path,
    model_type: str = "mixtral",
    *,
    dtype: str = "float32",
    fused: bool = False,
    shards: int = 1,
    prefix: str = "model.",
    config: dict[str, Any] | None = None,
    change: Callable[[dict[str, Array]], object] | None = None,
) -> Checkpoint:
    """Write a checkpoint.

    `config` overrides keys (None removes one); `change` may alter the tensors before they are written, which
    what is returned does not reflect.
    """
    folder.mkdir(exist_ok=True)
    family = FAMILIES[model_type]
    settings: dict[str, Any] = {
        "model_type": model_type,
        "hidden_size": HIDDEN,
        "num_hidden_layers": family.layers,
        "num_experts_per_tok": TOP_K,
        **family.config,
        **(config or {}),
    }
    settings = {key: value for key, value in settings.items() if value is not None}
    made = Checkpoint(folder, family, settings, {})
    random = np.random.default_rng(5)

    def draw(*shape: int) -> Array:
        array: Array = random.standard_normal(shape).astype(NUMPY_DTYPES[dtype])
        return array

    made.tensors[f"{prefix}embed_tokens.weight"] = draw(16, HIDDEN)
    for number in range(family.layers):
        stem = f"{prefix}layers.{number}."
        made.tensors[f"{stem}input_layernorm.weight"] = draw(HIDDEN)
        if number not in family.moe_layers:
            made.tensors[f"{stem}mlp.gate_proj.weight"] = draw(40, HIDDEN)
            continue
        row = family.moe_layers.index(number)
        _add_layer(made, row, f"{stem}{family.block}.", draw, fused)
        made.tensors[f"{stem}mlp.shared_expert.gate_proj.weight"] = draw(INNER, HIDDEN)

    written = dict(made.tensors)
    if change is not None:
        change(written)
    write_weights(folder, written, shards)
    (folder / "config.json").write_text(json.dumps(settings))
    return made


def _add_layer(made: Checkpoint, row: int, stem: str, draw: Callable[..., Array], fused: bool) -> None:
    router = "router" if made.family.interleaved else "gate"
    made.gates[row] = made.tensors[f"{stem}{router}.weight"] = draw(EXPERTS, HIDDEN)
    if made.family.correction_bias:
        made.correction_biases[row] = made.tensors[f"{stem}gate.e_score_correction_bias"] = draw(EXPERTS)
    for expert in range(EXPERTS):
        made.experts[row, expert] = tuple(draw(*shape) for shape in made.family.parts.values())
    experts = [made.experts[row, expert] for expert in range(EXPERTS)]
    if made.family.interleaved:
        made.gate_biases[row] = made.tensors[f"{stem}router.bias"] = draw(EXPERTS)
        for part, name in enumerate(("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")):
            made.tensors[f"{stem}experts.{name}"] = np.stack([parts[part] for parts in experts])
        return
    if fused:
        made.tensors[f"{stem}experts.gate_up_proj"] = np.stack([np.concatenate([gate, up]) for gate, up, _ in experts])
        made.tensors[f"{stem}experts.down_proj"] = np.stack([down for _, _, down in experts])
        return
    for expert, parts in enumerate(experts):
        for name, array in zip(made.family.projections, parts, strict=True):
            made.tensors[f"{stem}experts.{expert}.{name}.weight"] = array


def write_weights(folder: Path, tensors: dict[str, Array], shards: int) -> None:
    """One file, or `shards` of them with an index; dealt out in turn, so that experts straddle files."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for shard in range(shards):
        name = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        own = dict(list(tensors.items())[shard::shards])
        save_file(own, folder / name)
        weight_map |= dict.fromkeys(own, name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def raw_file(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file's bytes with any header at all, and any length given for it."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data
