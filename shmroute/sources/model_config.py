"""What a Hugging Face ``config.json`` says of a model's experts.

The keys differ by family and by the version of Transformers that wrote the file. What is read here is the
shape of the MoE layers and the rule by which experts are chosen; a rule that the router does not have is an
error, never an approximation. The experts' dtype is not read here: ``dtype`` (or ``torch_dtype``) names the
one in which a model was *run*, and is often not the one in which it is stored. The tensors say their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shmroute.errors import CheckpointError, UnsupportedDtypeError, UnsupportedScoringError
from shmroute.shared.words import MAX_EXPERTS, MAX_LAYERS
from shmroute.sources.bounded_json import read_json_object, shown

MAX_CONFIG_BYTES = 16 * 2**20
MAX_EXTENT = 2**24


@dataclass(frozen=True)
class ModelConfig:
    """A model's MoE layers and routing rule (softmax over all experts, then the `top_k` largest).

    Attributes
    ----------
    model_type : str
    num_hidden_layers : int
        All layers, dense ones too.
    moe_layers : tuple of int
        The numbers of those with experts, ascending.
    num_experts, top_k : int
    renormalize : bool
        Whether the chosen weights are scaled to sum to 1.
    hidden_size, intermediate_size : int
        The latter of one expert.
    """

    model_type: str
    num_hidden_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    renormalize: bool
    hidden_size: int
    intermediate_size: int


class _Keys:
    """The parsed file, read key by key; a JSON null counts as an absent key, as it does in Transformers."""

    def __init__(self, path: str, values: dict[str, Any]) -> None:
        self.path, self._values = path, values

    def get(self, key: str) -> Any:
        return self._values.get(key)

    def integer(self, *names: str, low: int, high: int, default: int | None = None) -> int:
        """The one value of a key that has several names; required if there is no default."""
        present = {name: self._values[name] for name in names if self._values.get(name) is not None}
        if not present:
            if default is not None:
                return default
            others = f" (also known as {', '.join(names[1:])})" if len(names) > 1 else ""
            raise CheckpointError(self.path, f"the key {names[0]!r}{others} is missing")
        for name, value in present.items():
            if type(value) is not int or not low <= value <= high:
                raise CheckpointError(
                    self.path,
                    f"the key {name!r} is {shown(value)}; an integer from {low} to {high} is expected",
                )
        if len(set(present.values())) > 1:
            raise CheckpointError(self.path, f"keys of one meaning contradict each other: {shown(present)}")
        return int(next(iter(present.values())))

    def boolean(self, name: str, default: bool) -> bool:
        value = self._values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise CheckpointError(self.path, f"the key {name!r} is {shown(value)}; true or false is expected")
        return value


def _every_layer(keys: _Keys, layers: int) -> tuple[int, ...]:
    return tuple(range(layers))


def _qwen_layers(keys: _Keys, layers: int) -> tuple[int, ...]:
    step = keys.integer("decoder_sparse_step", low=1, high=MAX_LAYERS, default=1)
    dense = keys.get("mlp_only_layers")
    if dense is None:
        dense = []
    if not isinstance(dense, list) or not all(type(layer) is int for layer in dense):
        raise CheckpointError(keys.path, f"the key 'mlp_only_layers' is {shown(dense)}; a list of integers is expected")
    excluded = frozenset(dense)
    return tuple(layer for layer in range(layers) if (layer + 1) % step == 0 and layer not in excluded)


def _deepseek_layers(keys: _Keys, layers: int) -> tuple[int, ...]:
    first = keys.integer("first_k_dense_replace", low=0, high=MAX_LAYERS, default=0)
    step = keys.integer("moe_layer_freq", low=1, high=MAX_LAYERS, default=1)
    return tuple(layer for layer in range(first, layers) if layer % step == 0)


@dataclass(frozen=True)
class _Family:
    """How one family's file differs.

    `always_renormalizes`: its modelling code does so and reads no key. `intermediate_key`: an expert's size,
    which is not the size of the family's dense layers where it has any.
    """

    always_renormalizes: bool
    intermediate_key: str
    layers: Callable[[_Keys, int], tuple[int, ...]]


_FAMILIES: dict[str, _Family] = {
    "mixtral": _Family(True, "intermediate_size", _every_layer),
    "qwen2_moe": _Family(False, "moe_intermediate_size", _qwen_layers),
    "qwen3_moe": _Family(False, "moe_intermediate_size", _qwen_layers),
    "olmoe": _Family(False, "intermediate_size", _every_layer),
    "deepseek_v2": _Family(False, "moe_intermediate_size", _deepseek_layers),
}
SUPPORTED_MODEL_TYPES = tuple(_FAMILIES)
_SIGMOID_MODEL_TYPES = frozenset({"deepseek_v3", "deepseek_v32", "kimi_k2", "glm4_moe", "dots1"})


def read_model_config(path: str) -> ModelConfig:
    """Read and check a ``config.json``.

    Parameters
    ----------
    path : str

    Raises
    ------
    UnsupportedScoringError
        If experts are chosen by another rule than softmax and top-k over all of them.
    UnsupportedDtypeError
        If the model is quantised.
    CheckpointError
        If the file is missing or not JSON, the family is not supported, or a key is missing or out of range.
    """
    keys = _Keys(path, read_json_object(path, MAX_CONFIG_BYTES))
    model_type = keys.get("model_type")
    if model_type is None:
        raise CheckpointError(path, "the key 'model_type' is missing")
    _refuse_other_scoring(keys, model_type)
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise CheckpointError(
            path,
            f"model_type {shown(model_type)} is not supported; supported are {', '.join(SUPPORTED_MODEL_TYPES)}",
        )
    if keys.get("quantization_config") is not None:
        raise UnsupportedDtypeError(
            path,
            "the model is quantised (quantization_config); float32, float16 and bfloat16 can be served",
        )
    family = _FAMILIES[model_type]
    layers = keys.integer("num_hidden_layers", low=1, high=MAX_LAYERS)
    experts = keys.integer("num_experts", "num_local_experts", "n_routed_experts", low=1, high=MAX_EXPERTS)
    moe_layers = family.layers(keys, layers)
    if not moe_layers:
        raise CheckpointError(path, f"by its keys, none of the model's {layers} layers has experts")
    return ModelConfig(
        model_type=model_type,
        num_hidden_layers=layers,
        moe_layers=moe_layers,
        num_experts=experts,
        top_k=keys.integer("num_experts_per_tok", low=1, high=experts),
        renormalize=family.always_renormalizes or keys.boolean("norm_topk_prob", default=False),
        hidden_size=keys.integer("hidden_size", low=1, high=MAX_EXTENT),
        intermediate_size=keys.integer(family.intermediate_key, low=1, high=MAX_EXTENT),
    )


def _refuse_other_scoring(keys: _Keys, model_type: Any) -> None:
    """Raise if the file asks for anything but softmax over all experts, then top-k."""
    scoring = keys.get("scoring_func")
    if isinstance(model_type, str) and model_type in _SIGMOID_MODEL_TYPES:
        raise UnsupportedScoringError(keys.path, f"model_type {model_type!r} scores experts by a sigmoid, not softmax")
    if scoring is not None and scoring != "softmax":
        raise UnsupportedScoringError(keys.path, f"scoring_func is {shown(scoring)}; only 'softmax' is supported")
    factor = keys.get("routed_scaling_factor")
    if factor is not None:
        if isinstance(factor, bool) or not isinstance(factor, int | float):
            raise CheckpointError(keys.path, f"the key 'routed_scaling_factor' is {shown(factor)}, not a number")
        if factor != 1:
            raise UnsupportedScoringError(keys.path, f"routed_scaling_factor is {shown(factor)}; only 1 is supported")
    method = keys.get("topk_method")
    if method is None or method == "greedy":
        return
    if method != "group_limited_greedy":
        raise UnsupportedScoringError(keys.path, f"topk_method is {shown(method)}; only 'greedy' is supported")
    groups = keys.integer("n_group", low=1, high=MAX_EXPERTS)
    chosen = keys.integer("topk_group", low=1, high=MAX_EXPERTS)
    if chosen < groups:
        raise UnsupportedScoringError(
            keys.path,
            f"experts are chosen from {chosen} of {groups} groups (topk_group, n_group); "
            f"only a choice among all experts is supported",
        )
