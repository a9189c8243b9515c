"""What a Hugging Face ``config.json`` says of a model's experts.

The keys differ by family and by the version of Transformers that wrote the file. What is read here is the
shape of the MoE layers and the rule by which experts are chosen and weighted; one that the router does not have
is an error, never an approximation. The experts' dtype is not read here: ``dtype`` (or ``torch_dtype``) names the
one in which a model was *run*, and is often not the one in which it is stored. The tensors say their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shmroute.errors import CheckpointError, UnsupportedDtypeError, UnsupportedScoringError
from shmroute.shared.words import MAX_EXPERTS, MAX_LAYERS
from shmroute.sources.base import ModelScoring
from shmroute.sources.bounded_json import read_json_object, shown

MAX_CONFIG_BYTES = 16 * 2**20
MAX_EXTENT = 2**24
MAX_CONTEXT = 2**31 - 1
MAX_SCALING = 1e6


@dataclass(frozen=True)
class ModelConfig:
    """A model's MoE layers and the rule by which it chooses and weighs experts.

    Attributes
    ----------
    model_type : str
    num_hidden_layers : int
        All layers, dense ones too.
    moe_layers : tuple of int
        The numbers of those with experts, ascending.
    num_experts, top_k : int
    scoring : ModelScoring
    has_correction_bias : bool
        Whether the router has one, for choosing only.
    has_gate_bias : bool
        Whether the router adds one to its logits.
    interleaved : bool
        Whether the weights are spelt as gpt-oss spells them; see `expert_tensors`.
    hidden_size, intermediate_size : int
        The latter of one expert.
    """

    model_type: str
    num_hidden_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    top_k: int
    scoring: ModelScoring
    has_correction_bias: bool
    has_gate_bias: bool
    interleaved: bool
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

    def number(self, name: str, default: float) -> float:
        value = self._values.get(name)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MAX_SCALING:
            raise CheckpointError(
                self.path, f"the key {name!r} is {shown(value)}; a number above 0 and up to {MAX_SCALING:g} is expected"
            )
        return float(value)

    def one_of(self, name: str, allowed: tuple[str, ...]) -> str:
        """The value of a key that names a rule; the first of those allowed if it is absent."""
        value = self._values.get(name)
        if value is None:
            return allowed[0]
        if value not in allowed:
            raise UnsupportedScoringError(
                self.path,
                f"{name} is {shown(value)}; for this family, {' and '.join(map(repr, allowed))} can be routed",
            )
        return str(value)

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


def _after_dense_layers(default: int) -> Callable[[_Keys, int], tuple[int, ...]]:
    """Layers from a certain one on; `default` is how many are dense if the file does not say."""

    def layers_of(keys: _Keys, layers: int) -> tuple[int, ...]:
        first = keys.integer("first_k_dense_replace", low=0, high=MAX_LAYERS, default=default)
        step = keys.integer("moe_layer_freq", low=1, high=MAX_LAYERS, default=1)
        return tuple(layer for layer in range(first, layers) if layer % step == 0)

    return layers_of


def _softmax(keys: _Keys, renormalize: bool) -> ModelScoring:
    """Softmax over all experts, then the k largest."""
    keys.one_of("scoring_func", ("softmax",))
    keys.one_of("topk_method", ("greedy",))
    if keys.number("routed_scaling_factor", 1.0) != 1:
        raise UnsupportedScoringError(
            keys.path, f"routed_scaling_factor is {shown(keys.get('routed_scaling_factor'))}; this family knows only 1"
        )
    return ModelScoring(renormalize)


def _always_renormalized(keys: _Keys) -> ModelScoring:
    """The family's modelling code renormalises and reads no key."""
    return _softmax(keys, True)


def _renormalized_by_key(default: bool) -> Callable[[_Keys], ModelScoring]:
    return lambda keys: _softmax(keys, keys.boolean("norm_topk_prob", default))


def _groups(keys: _Keys, default: tuple[int, int]) -> tuple[int, int]:
    groups = keys.integer("n_group", low=1, high=MAX_EXPERTS, default=default[0])
    chosen = keys.integer("topk_group", low=1, high=MAX_EXPERTS, default=default[1])
    if chosen > groups:
        raise CheckpointError(keys.path, f"topk_group is {chosen}, but there are only n_group = {groups} groups")
    return groups, chosen


def _deepseek_v2(keys: _Keys) -> ModelScoring:
    """Softmax over all experts, then the k largest, of all or of the groups with the largest ones."""
    keys.one_of("scoring_func", ("softmax",))
    limited = keys.one_of("topk_method", ("greedy", "group_limited_greedy")) == "group_limited_greedy"
    renormalize, factor = keys.boolean("norm_topk_prob", default=False), keys.number("routed_scaling_factor", 1.0)
    if renormalize and factor != 1:
        raise UnsupportedScoringError(
            keys.path, f"norm_topk_prob is true and routed_scaling_factor {factor:g}: this family applies only one"
        )
    for key in ("n_group", "topk_group"):
        if limited and keys.get(key) is None:
            raise CheckpointError(keys.path, f"the key {key!r} is missing, but topk_method is 'group_limited_greedy'")
    groups, chosen = _groups(keys, (1, 1)) if limited else (1, 1)
    return ModelScoring(renormalize, "softmax", groups, chosen, "max", factor)


def _deepseek_v3(groups: tuple[int, int], factor: float, renormalize: bool = True) -> Callable[[_Keys], ModelScoring]:
    """Sigmoids plus a correction bias, of the groups whose two best sum up to most; what absent keys stand for."""

    def scoring_of(keys: _Keys) -> ModelScoring:
        keys.one_of("scoring_func", ("sigmoid",))
        keys.one_of("topk_method", ("noaux_tc",))
        return ModelScoring(
            keys.boolean("norm_topk_prob", renormalize), "sigmoid", *_groups(keys, groups), "top2-sum",
            keys.number("routed_scaling_factor", factor),
        )  # fmt: skip

    return scoring_of


@dataclass(frozen=True)
class _Family:
    """How one family's file differs.

    `intermediate_key`: an expert's size, which is not the size of the family's dense layers where it has any.
    `gate_bias`, `interleaved`: see `ModelConfig`.
    """

    scoring: Callable[[_Keys], ModelScoring]
    intermediate_key: str
    layers: Callable[[_Keys, int], tuple[int, ...]]
    gate_bias: bool = False
    interleaved: bool = False


_FAMILIES: dict[str, _Family] = {
    "mixtral": _Family(_always_renormalized, "intermediate_size", _every_layer),
    "minimax": _Family(_always_renormalized, "intermediate_size", _every_layer),
    "qwen2_moe": _Family(_renormalized_by_key(False), "moe_intermediate_size", _qwen_layers),
    "qwen3_moe": _Family(_renormalized_by_key(False), "moe_intermediate_size", _qwen_layers),
    "qwen3_next": _Family(_renormalized_by_key(True), "moe_intermediate_size", _qwen_layers),
    "olmoe": _Family(_renormalized_by_key(False), "intermediate_size", _every_layer),
    "flex_olmo": _Family(_renormalized_by_key(False), "intermediate_size", _every_layer),
    "deepseek_v2": _Family(_deepseek_v2, "moe_intermediate_size", _after_dense_layers(0)),
    "deepseek_v3": _Family(_deepseek_v3((8, 4), 2.5), "moe_intermediate_size", _after_dense_layers(3)),
    "glm4_moe": _Family(_deepseek_v3((1, 1), 1.0), "moe_intermediate_size", _after_dense_layers(1)),
    "dots1": _Family(_deepseek_v3((1, 1), 1.0, False), "moe_intermediate_size", _after_dense_layers(0)),
    "solar_open": _Family(_deepseek_v3((1, 1), 1.0), "moe_intermediate_size", _every_layer),
    # Softmax over the chosen logits alone: the same as renormalised softmax over all of them.
    "gpt_oss": _Family(_always_renormalized, "intermediate_size", _every_layer, gate_bias=True, interleaved=True),
}
SUPPORTED_MODEL_TYPES = tuple(_FAMILIES)


def read_sizes(path: str) -> tuple[int | None, int | None]:
    """Of any causal language model's ``config.json``: tokens in its vocabulary, and positions that it was made for.

    Either is None if the file does not say.

    Raises
    ------
    CheckpointError
        If the file is missing or not JSON, or what it says is no positive integer.
    """
    values = read_json_object(path, MAX_CONFIG_BYTES)
    text = values.get("text_config")
    keys = _Keys(path, text if isinstance(text, dict) else values)
    return tuple(  # type: ignore[return-value] # there are two
        None if keys.get(key) is None else keys.integer(key, low=1, high=MAX_CONTEXT)
        for key in ("vocab_size", "max_position_embeddings")
    )


def read_model_config(path: str) -> ModelConfig:
    """Read and check a ``config.json``.

    Parameters
    ----------
    path : str

    Raises
    ------
    UnsupportedScoringError
        If experts are chosen by a rule that the router does not have.
    UnsupportedDtypeError
        If the model is quantised.
    CheckpointError
        If the file is missing or not JSON, the family is not supported, or a key is missing or out of range.
    """
    keys = _Keys(path, read_json_object(path, MAX_CONFIG_BYTES))
    model_type = keys.get("model_type")
    if model_type is None:
        raise CheckpointError(path, "the key 'model_type' is missing")
    if not isinstance(model_type, str) or model_type not in _FAMILIES:
        raise CheckpointError(
            path,
            f"model_type {shown(model_type)} is not supported; supported are {', '.join(SUPPORTED_MODEL_TYPES)}",
        )
    if keys.get("quantization_config") is not None:
        raise UnsupportedDtypeError(
            path,
            "the model is quantised (quantization_config); float32, float16 and bfloat16 can be served, so "
            "dequantise it and save it as one of them",
        )
    family = _FAMILIES[model_type]
    layers = keys.integer("num_hidden_layers", low=1, high=MAX_LAYERS)
    experts = keys.integer("num_experts", "num_local_experts", "n_routed_experts", low=1, high=MAX_EXPERTS)
    moe_layers = family.layers(keys, layers)
    if not moe_layers:
        raise CheckpointError(path, f"by its keys, none of the model's {layers} layers has experts")
    top_k = keys.integer("num_experts_per_tok", "experts_per_token", low=1, high=experts)
    scoring = family.scoring(keys)
    _check_groups(keys, scoring, experts, top_k)
    return ModelConfig(
        model_type=model_type,
        num_hidden_layers=layers,
        moe_layers=moe_layers,
        num_experts=experts,
        top_k=top_k,
        scoring=scoring,
        has_correction_bias=scoring.scoring == "sigmoid",
        has_gate_bias=family.gate_bias,
        interleaved=family.interleaved,
        hidden_size=keys.integer("hidden_size", low=1, high=MAX_EXTENT),
        intermediate_size=keys.integer(family.intermediate_key, low=1, high=MAX_EXTENT),
    )


def _check_groups(keys: _Keys, scoring: ModelScoring, experts: int, top_k: int) -> None:
    """Raise if the groups cannot be what the file says."""
    if experts % scoring.n_group:
        raise CheckpointError(keys.path, f"n_group is {scoring.n_group}, which does not divide {experts} experts")
    size = experts // scoring.n_group
    if scoring.topk_group * size < top_k:
        raise CheckpointError(
            keys.path,
            f"num_experts_per_tok is {top_k}, but topk_group = {scoring.topk_group} groups of {size} experts hold "
            f"only {scoring.topk_group * size}",
        )
    if scoring.group_score == "top2-sum" and scoring.topk_group < scoring.n_group and size < 2:
        raise CheckpointError(
            keys.path, f"n_group is {scoring.n_group}: groups of one expert have no two best to choose them by"
        )
