"""Where experts come from: the one interface between the pager and whatever holds the weights.

A source knows the *geometry* of its experts and reads the bytes of one into a buffer. Sources are opened in
several processes (the pager reads experts, workers read gates), so each can be described by a `SourceSpec`:
a plain, JSON-able recipe from which another process opens the same source.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
import numpy.typing as npt

from shmroute.errors import ConfigError
from shmroute.sources.bounded_json import shown

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""The dtypes in which experts are served, by name."""

MAX_DIMENSIONS = 64
"""As many as NumPy has; it also keeps products of hostile shapes cheap."""
MAX_EXTENT = 1 << 40


@dataclass(frozen=True)
class TensorLayout:
    """One tensor inside an expert's bytes.

    Attributes
    ----------
    name : str
        Of gated feed-forward experts, of hidden size H and intermediate size I: ``"gate"`` and ``"up"`` [I, H] and
        ``"down"`` [H, I]; or, as gpt-oss stores them, to be multiplied from the right, ``"gate_up"`` [H, 2I] with
        ``"gate_up_bias"`` [2I], whose even columns are the gate's and odd ones the up projection's, and ``"down"``
        [I, H] with ``"down_bias"`` [H].
    offset : int
        Bytes from the start of the expert.
    shape : tuple of int
    dtype : str
        A key of `DTYPES`.

    Raises
    ------
    ConfigError
        If a field is of another type, or the shape impossible. Whether it fits an expert is the runtime's to check.
    """

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ConfigError(f"a tensor's name must be a str, not {shown(self.name)}")
        if type(self.offset) is not int:
            raise ConfigError(f"the offset of tensor {shown(self.name)} must be an integer, not {shown(self.offset)}")
        if (
            not isinstance(self.shape, tuple)
            or len(self.shape) > MAX_DIMENSIONS
            or not all(type(extent) is int and 1 <= extent <= MAX_EXTENT for extent in self.shape)
        ):
            raise ConfigError(
                f"the shape of tensor {shown(self.name)} must be at most {MAX_DIMENSIONS} extents from 1, "
                f"not {shown(self.shape)}"
            )
        if not isinstance(self.dtype, str) or self.dtype not in DTYPES:
            raise ConfigError(
                f"the dtype of tensor {shown(self.name)} must be one of {', '.join(DTYPES)}, not {shown(self.dtype)}"
            )

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def view(self, expert: memoryview) -> npt.NDArray[Any]:
        """The tensor as an array over `expert`'s bytes: no copy, writable only if `expert` is."""
        count = math.prod(self.shape)
        return np.frombuffer(expert, DTYPES[self.dtype], count, self.offset).reshape(self.shape)


@dataclass(frozen=True)
class ModelScoring:
    """By which rule a model chooses and weighs experts; each field is one of `RouterConfig`'s, and named alike.

    Attributes
    ----------
    renormalize : bool
    scoring : {"softmax", "sigmoid"}
    n_group, topk_group : int
    group_score : {"max", "top2-sum"}
    routed_scaling_factor : float
    """

    renormalize: bool
    scoring: str = "softmax"
    n_group: int = 1
    topk_group: int = 1
    group_score: str = "max"
    routed_scaling_factor: float = 1.0


@dataclass(frozen=True)
class ExpertGeometry:
    """What a source says of its experts, the same for all of them.

    Attributes
    ----------
    num_layers, num_experts, top_k : int
        MoE layers, experts in each, experts chosen per token.
    scoring : ModelScoring
    layer_numbers : tuple of int
        The model's own number of each MoE layer (dense layers are skipped).
    hidden_size : int
    expert_bytes : int
        Bytes of one expert: its tensors back to back in the order of `tensors`.
    tensors : tuple of TensorLayout
    fingerprint : str
        Hex digest that differs whenever the weights' files or their layout do.
    """

    num_layers: int
    num_experts: int
    top_k: int
    scoring: ModelScoring
    layer_numbers: tuple[int, ...]
    hidden_size: int
    expert_bytes: int
    tensors: tuple[TensorLayout, ...]
    fingerprint: str


@dataclass(frozen=True)
class SourceSpec:
    """How another process opens the same source.

    Attributes
    ----------
    factory : str
        ``"package.module:callable"``, importable wherever the runtime is attached.
    arguments : dict
        Keyword arguments of the callable; JSON types only.

    Raises
    ------
    ConfigError
        If a field is of another type. Nothing is imported before `open`.
    """

    factory: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.factory, str):
            raise ConfigError(f"a source's factory must be a str, not {shown(self.factory)}")
        if not isinstance(self.arguments, dict) or not all(isinstance(name, str) for name in self.arguments):
            raise ConfigError(f"a source's arguments must be a dict by name, not {shown(self.arguments)}")

    def open(self) -> ExpertSource:
        """Open the source.

        Raises
        ------
        ConfigError
            If the factory cannot be imported, does not take the arguments, or makes no source.
        CheckpointError
            If the source refuses.
        """
        module, _, name = self.factory.partition(":")
        try:
            factory = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError, ValueError, TypeError) as error:  # the last two: "" and relative names
            raise ConfigError(
                f"the source factory {shown(self.factory)} cannot be imported here ({error}); "
                f"make its module importable in every process that attaches"
            ) from error
        try:
            source: ExpertSource = factory(**self.arguments)
        except (TypeError, RecursionError) as error:
            raise ConfigError(
                f"the source factory {shown(self.factory)} cannot be called with {shown(self.arguments)} ({error})"
            ) from error
        if not isinstance(source, ExpertSource) or isinstance(source, type):
            raise ConfigError(
                f"the source factory {shown(self.factory)} made a {type(source).__name__}, which is no ExpertSource"
            )
        return source


@runtime_checkable
class ExpertSource(Protocol):
    """The interface. `read_into` is called from several threads at once; everything else from one."""

    @property
    def geometry(self) -> ExpertGeometry: ...

    @property
    def spec(self) -> SourceSpec: ...

    def read_into(
        self, layer: int, expert: int, buffer: memoryview, filled: Callable[[int, int], object] | None = None
    ) -> None:
        """Fill `buffer` (exactly ``geometry.expert_bytes`` writable bytes) with one expert.

        Parameters
        ----------
        layer : int
            MoE layer, counted from 0.
        expert : int
        buffer : memoryview
            Of format ``"B"``; its content is undefined if this raises.
        filled : callable, optional
            Called as ``filled(begin, end)`` with the bounds of each part of `buffer` as soon as it is filled, while it
            may still be in the core's cache: the pager takes the checksum so. The parts make up the whole buffer,
            and are the same, in the same order, at each read of an expert.

        Raises
        ------
        CheckpointError
            If the bytes are not those that were promised (truncated, changed).
        OSError
            As the read gave it.
        """

    def drop_page_cache(self, layer: int, expert: int) -> None:
        """Tell the kernel that the file pages behind this expert are not needed again.

        Does nothing without files.
        """

    def location(self, layer: int, expert: int) -> str:
        """Where the expert's bytes are, for messages: a path and the first tensor's name, say."""

    def gate(self, layer: int) -> npt.NDArray[np.float32]:
        """The router's weights of one MoE layer, float32 [num_experts, hidden_size]."""

    def gate_bias(self, layer: int) -> npt.NDArray[np.float32] | None:
        """What the router adds to its logits, float32 [num_experts]: they are ``x @ gate.T + gate_bias``.

        None if it adds nothing. Unlike `correction_bias` it counts in weights as well as for choosing.
        """

    def correction_bias(self, layer: int) -> npt.NDArray[np.float32] | None:
        """What the router adds to each expert's sigmoid when choosing, float32 [num_experts]; None if it does not."""

    def close(self) -> None:
        """Release descriptors; the source is not used again."""
