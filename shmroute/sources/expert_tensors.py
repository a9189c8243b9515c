"""Which tensors of a checkpoint hold each expert, and where in which file they lie.

Three spellings are read, the first two layer by layer:

- one tensor per projection and expert, ``LAYER.BLOCK.experts.N.gate_proj.weight`` [I, H], ``up_proj`` [I, H],
  ``down_proj`` [H, I], or under Mixtral's names ``w1`` (gate), ``w3`` (up) and ``w2`` (down);
- fused over the experts, ``LAYER.BLOCK.experts.gate_up_proj`` [E, 2I, H], gate rows first, and
  ``LAYER.BLOCK.experts.down_proj`` [E, H, I];
- gpt-oss's, fused, transposed, with biases and interleaved: ``LAYER.BLOCK.experts.gate_up_proj`` [E, H, 2I] and
  ``gate_up_proj_bias`` [E, 2I], whose even columns are the gate's and odd ones the up projection's, ``down_proj``
  [E, I, H] and ``down_proj_bias`` [E, H];

with ``BLOCK`` either ``mlp`` or ``block_sparse_moe``, and the router's ``LAYER.BLOCK.gate.weight`` [E, H], in some
families also ``LAYER.BLOCK.gate.e_score_correction_bias`` [E]; gpt-oss has ``LAYER.BLOCK.router.weight`` [E, H] and
``LAYER.BLOCK.router.bias`` [E]. E experts, hidden size H, an expert's intermediate size I. Any other tensor under
``experts.`` is an error: it would change what the experts compute, and nobody would notice its absence.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from shmroute.errors import CheckpointError, UnsupportedDtypeError, UnsupportedScoringError
from shmroute.sources.base import DTYPES
from shmroute.sources.bounded_json import shown
from shmroute.sources.model_config import ModelConfig
from shmroute.sources.safetensors_header import TensorEntry

DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""The dtypes that can be served, from the format's name to the key of `DTYPES`."""

_MOE_NAME = re.compile(
    r"(?P<prefix>|model\.|language_model\.model\.|model\.language_model\.)layers\.(?P<layer>0|[1-9][0-9]{0,5})\."
    r"(?P<rest>(?P<block>mlp|block_sparse_moe)\.(?P<kind>experts\.|gate\.|router\.|e_score_correction_bias).*)",
    re.DOTALL,
)
_QUANTIZED = re.compile(
    r"[._](scale|scales|scale_inv|blocks|qweight|qzeros|g_idx|absmax|packed|zero_point)(_[0-9]+)?\b"
)
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
_MIXTRAL_PROJECTIONS = ("w1", "w3", "w2")
_INTERLEAVED = ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")


def expert_parts(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of which a model's experts are served, in this order everywhere, and their shapes.

    They follow from the family, not from which of its spellings a layer has.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    if config.interleaved:
        return {"gate_up": (hidden, 2 * inner), "gate_up_bias": (2 * inner,), "down": (inner, hidden),
                "down_bias": (hidden,)}  # fmt: skip
    return {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor and the file that holds it.

    Attributes
    ----------
    file : int
        Index into the checkpoint's files.
    path : str
    entry : TensorEntry
    """

    file: int
    path: str
    entry: TensorEntry


@dataclass(frozen=True)
class ExpertTensors:
    """Where everything is: 10 bytes for each part of an expert (470 KB for 61 layers of 256), whatever its size.

    Attributes
    ----------
    dtype : str
        A key of `DTYPES`; the same for all experts.
    file : int16 array [layers, experts, parts]
        Index of the file that holds each of an expert's `expert_parts`.
    begin : int64 array [layers, experts, parts]
        Their absolute offsets, in bytes.
    names : tuple of tuple of str
        For each layer the name of the tensor that holds each part, with ``{}`` for the expert's number where it is
        part of the name.
    gates : tuple of (str, StoredTensor)
        For each layer the router's name and place.
    gate_biases, correction_biases : tuple of (str, StoredTensor)
        For each layer those of the bias on the router's logits, and of the one for choosing only; empty if the family
        has none.
    """

    dtype: str
    file: npt.NDArray[np.int16]
    begin: npt.NDArray[np.int64]
    names: tuple[tuple[str, ...], ...]
    gates: tuple[tuple[str, StoredTensor], ...]
    gate_biases: tuple[tuple[str, StoredTensor], ...]
    correction_biases: tuple[tuple[str, StoredTensor], ...]


def is_moe_tensor(name: str) -> bool:
    """Whether a tensor of this name belongs to experts or a router."""
    return _MOE_NAME.fullmatch(name) is not None


def find_expert_tensors(
    config: ModelConfig, tensors: Mapping[str, StoredTensor], listing: str, config_path: str
) -> ExpertTensors:
    """Find every expert of every MoE layer, and check dtype and shape of all their tensors.

    Parameters
    ----------
    config : ModelConfig
    tensors : mapping of str to StoredTensor
        All tensors of the checkpoint for which `is_moe_tensor`; others are ignored.
    listing : str
        Path of the file that lists the tensors (the index or the only file): named where one is missing.
    config_path : str
        Named where the checkpoint contradicts it.

    Raises
    ------
    UnsupportedDtypeError
        If experts are quantised.
    UnsupportedScoringError
        If the router has more than a weight, and the bias that its family has.
    CheckpointError
        If a tensor is missing or unknown, or has not the shape or dtype that it should.
    """
    layers = _by_layer(config, tensors, listing)
    dense = sorted(set(layers) - set(config.moe_layers))
    for number in dense:
        for name in layers[number].values():
            if ".experts." in name:
                raise CheckpointError(
                    config_path,
                    f"by its keys layer {number} has no experts, but the checkpoint has some",
                    name,
                )

    # One layer at a time: config.json may promise a thousand times what the files have.
    files: list[npt.NDArray[np.int16]] = []
    begins: list[npt.NDArray[np.int64]] = []
    names: list[tuple[str, ...]] = []
    gates: list[tuple[str, StoredTensor]] = []
    gate_biases: list[tuple[str, StoredTensor]] = []
    correction_biases: list[tuple[str, StoredTensor]] = []
    dtype: str | None = None
    parts = len(expert_parts(config))
    for number in config.moe_layers:
        layer = _Layer(config, number, layers.get(number, {}), tensors, listing)
        files.append(np.empty((config.num_experts, parts), np.int16))
        begins.append(np.empty((config.num_experts, parts), np.int64))
        dtype = layer.place(files[-1], begins[-1], dtype)
        names.append(layer.templates)
        gates.append(layer.gate())
        if config.has_gate_bias:
            gate_biases.append(layer.gate_bias())
        if config.has_correction_bias:
            correction_biases.append(layer.correction_bias())
    assert dtype is not None, "a ModelConfig has at least one MoE layer"
    return ExpertTensors(
        DTYPE_NAMES[dtype], np.stack(files), np.stack(begins), tuple(names), tuple(gates), tuple(gate_biases),
        tuple(correction_biases),
    )  # fmt: skip


def _by_layer(config: ModelConfig, names: Iterable[str], listing: str) -> dict[int, dict[str, str]]:
    """For each layer of the model, its MoE tensors' full names by the part after ``layers.N.``."""
    layers: dict[int, dict[str, str]] = {}
    prefixes: set[str] = set()
    for name in names:
        match = _MOE_NAME.fullmatch(name)
        if match is None:
            continue
        number = int(match["layer"])
        if number >= config.num_hidden_layers:
            # Heads for multi-token prediction are numbered on from the last layer; they are not routed here.
            continue
        prefixes.add(match["prefix"])
        layers.setdefault(number, {})[match["rest"]] = name
    if not prefixes:
        raise CheckpointError(
            listing,
            "no experts found: no tensor's name is like 'model.layers.0.mlp.experts.0.gate_proj.weight'",
        )
    if len(prefixes) > 1:
        raise CheckpointError(
            listing, f"experts of several models found: their names begin with {shown(sorted(prefixes))}"
        )
    return layers


class _Layer:
    """One MoE layer's tensors: which spelling it uses, and whether all are there and as they should be."""

    def __init__(
        self,
        config: ModelConfig,
        number: int,
        own: dict[str, str],
        tensors: Mapping[str, StoredTensor],
        listing: str,
    ) -> None:
        self._config, self._tensors, self._listing = config, tensors, listing
        experts = {rest: name for rest, name in own.items() if ".experts." in rest}
        blocks = sorted({rest.partition(".")[0] for rest in own})
        if not experts:
            raise CheckpointError(listing, f"layer {number} has experts by config.json, but none are listed")
        if len(blocks) > 1:
            raise CheckpointError(listing, f"layer {number} has tensors both under {' and '.join(blocks)}")
        first_rest, first_name = next(iter(experts.items()))
        stem = first_name.removesuffix(first_rest) + blocks[0] + "."
        router = "router" if config.interleaved else "gate"
        self._gate_name = f"{stem}{router}.weight"
        self._gate_bias_name = f"{stem}{router}.bias"
        self._correction_bias_name = f"{stem}{router}.e_score_correction_bias"
        for rest, name in own.items():
            # First, since an encoding's tensors stand in for the ones that would be missed below.
            self._refuse_quantized(rest, name)

        self.templates: tuple[str, ...]
        self._fused = config.interleaved or f"{blocks[0]}.experts.gate_up_proj" in experts
        if config.interleaved:
            self.templates = tuple(f"{stem}experts.{name}" for name in _INTERLEAVED)
        elif self._fused:
            pair = f"{stem}experts.gate_up_proj"
            self.templates = (pair, pair, f"{stem}experts.down_proj")
        else:
            mixtral = any(rest.endswith(tuple(f".{part}.weight" for part in _MIXTRAL_PROJECTIONS)) for rest in experts)
            gate, up, down = _MIXTRAL_PROJECTIONS if mixtral else _PROJECTIONS
            self.templates = (
                f"{stem}experts.{{}}.{gate}.weight",
                f"{stem}experts.{{}}.{up}.weight",
                f"{stem}experts.{{}}.{down}.weight",
            )
        known = set(self._expected()) | {self._gate_name}
        known |= {self._gate_bias_name} if config.has_gate_bias else set()
        known |= {self._correction_bias_name} if config.has_correction_bias else set()
        for rest, name in own.items():
            if name not in known:
                self._refuse_unknown(rest, name)

    def _expected(self) -> Iterable[str]:
        if self._fused:
            return self.templates
        return (part.replace("{}", str(n)) for n in range(self._config.num_experts) for part in self.templates)

    def _refuse_quantized(self, rest: str, name: str) -> None:
        if _QUANTIZED.search(rest):
            what = "experts are" if ".experts." in rest else "router is"
            raise UnsupportedDtypeError(
                self._tensors[name].path, f"the {what} quantised; this tensor belongs to the encoding", name
            )

    def _refuse_unknown(self, rest: str, name: str) -> NoReturn:
        path = self._tensors[name].path
        if ".experts." in rest:
            raise CheckpointError(
                path,
                f"not expected: config.json says {self._config.num_experts} experts, and those of a "
                f"{self._config.model_type} model have {', '.join(expert_parts(self._config))} each",
                name,
            )
        raise UnsupportedScoringError(
            path,
            f"the router has more than a weight{' and a bias' * self._config.has_gate_bias}; that is not supported",
            name,
        )

    def _require(self, name: str) -> StoredTensor:
        tensor = self._tensors.get(name)
        if tensor is None:
            raise CheckpointError(self._listing, "the tensor is missing", name)
        if tensor.entry.dtype not in DTYPE_NAMES:
            raise UnsupportedDtypeError(
                tensor.path,
                f"its dtype is {shown(tensor.entry.dtype)}; {', '.join(DTYPE_NAMES)} can be served",
                name,
            )
        return tensor

    def _expert_tensor(self, name: str, shape: tuple[int, ...], dtype: str | None) -> StoredTensor:
        tensor = self._require(name)
        if dtype is not None and tensor.entry.dtype != dtype:
            raise CheckpointError(
                tensor.path, f"its dtype is {tensor.entry.dtype}, but that of other experts is {dtype}", name
            )
        if tensor.entry.shape != shape:
            raise CheckpointError(
                tensor.path,
                f"its shape is {list(tensor.entry.shape)}, but by config.json it is {list(shape)}",
                name,
            )
        return tensor

    def place(self, file: npt.NDArray[np.int16], begin: npt.NDArray[np.int64], dtype: str | None) -> str:
        """Fill in where this layer's experts are ([experts, parts] each), and return their dtype.

        `dtype` is that of the layers before, which this one's must be too; None for the first.
        """
        if self._fused:
            return self._place_fused(file, begin, dtype)
        shapes = expert_parts(self._config).values()
        for expert in range(self._config.num_experts):
            for part, (template, shape) in enumerate(zip(self.templates, shapes, strict=True)):
                tensor = self._expert_tensor(template.replace("{}", str(expert)), shape, dtype)
                dtype = tensor.entry.dtype
                file[expert, part], begin[expert, part] = tensor.file, tensor.entry.begin
        assert dtype is not None, "a ModelConfig has at least one expert"
        return dtype

    def _place_fused(self, file: npt.NDArray[np.int16], begin: npt.NDArray[np.int64], dtype: str | None) -> str:
        if not self._config.interleaved:
            self._refuse_transposed()
        count, shapes = self._config.num_experts, list(expert_parts(self._config).values())
        # Parts of one tensor lie one after the other along an expert's first axis, and are of one shape.
        for name, held in groupby(range(len(shapes)), self.templates.__getitem__):
            parts = list(held)
            first, *others = shapes[parts[0]]
            tensor = self._expert_tensor(name, (count, len(parts) * first, *others), dtype)
            dtype = tensor.entry.dtype
            one = math.prod(shapes[parts[0]]) * DTYPES[DTYPE_NAMES[dtype]].itemsize
            file[:, parts] = tensor.file
            begin[:, parts] = tensor.entry.begin + one * np.arange(count * len(parts)).reshape(count, len(parts))
        assert dtype is not None, "an expert has at least one part"
        return dtype

    def _refuse_transposed(self) -> None:
        """Say so where a family's fused experts are stored as only gpt-oss's should be."""
        experts, hidden, inner = (
            self._config.num_experts,
            self._config.hidden_size,
            self._config.intermediate_size,
        )
        # One of the two shapes may read either way (2I = H, or I = H), never both.
        pair, down = self._require(self.templates[0]), self._require(self.templates[-1])
        if (pair.entry.shape, down.entry.shape) == ((experts, hidden, 2 * inner), (experts, inner, hidden)):
            raise CheckpointError(
                pair.path,
                f"the fused experts are stored transposed, as [experts, hidden, 2 * intermediate] "
                f"{list(pair.entry.shape)}; of a {self._config.model_type} model only "
                f"[experts, 2 * intermediate, hidden] is supported",
                self.templates[0],
            )

    def gate(self) -> tuple[str, StoredTensor]:
        """The router's name and place."""
        return self._router_tensor(self._gate_name, (self._config.num_experts, self._config.hidden_size))

    def gate_bias(self) -> tuple[str, StoredTensor]:
        """The name and place of the bias on the router's logits."""
        return self._router_tensor(self._gate_bias_name, (self._config.num_experts,))

    def correction_bias(self) -> tuple[str, StoredTensor]:
        """The name and place of the router's correction bias."""
        return self._router_tensor(self._correction_bias_name, (self._config.num_experts,))

    def _router_tensor(self, name: str, shape: tuple[int, ...]) -> tuple[str, StoredTensor]:
        tensor = self._require(name)
        if tensor.entry.shape != shape:
            raise CheckpointError(
                tensor.path,
                f"its shape is {list(tensor.entry.shape)}, but by config.json it is {list(shape)}",
                name,
            )
        return name, tensor
