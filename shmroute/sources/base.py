"""Where experts come from: the one interface between the pager and whatever holds the weights.

A source knows the *geometry* of its experts and reads the bytes of one into a buffer. Sources are opened in
several processes (the pager reads experts, workers read gates), so each can be described by a `SourceSpec`:
a plain, JSON-able recipe from which another process opens the same source.
"""

from __future__ import annotations

import importlib
import math
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import ml_dtypes
import numpy as np
import numpy.typing as npt

from shmroute.errors import ConfigError

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""The dtypes in which experts are served, by name."""


@dataclass(frozen=True)
class TensorLayout:
    """One tensor inside an expert's bytes.

    Attributes
    ----------
    name : str
        ``"gate"``, ``"up"`` or ``"down"`` for gated feed-forward experts.
    offset : int
        Bytes from the start of the expert.
    shape : tuple of int
    dtype : str
        A key of `DTYPES`.
    """

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def view(self, expert: memoryview) -> npt.NDArray[Any]:
        """The tensor as an array over `expert`'s bytes: no copy, writable only if `expert` is."""
        count = math.prod(self.shape)
        return np.frombuffer(expert, DTYPES[self.dtype], count, self.offset).reshape(self.shape)


@dataclass(frozen=True)
class ExpertGeometry:
    """What a source says of its experts, the same for all of them.

    Attributes
    ----------
    num_layers, num_experts, top_k : int
        MoE layers, experts in each, experts chosen per token.
    renormalize : bool
        Whether the chosen experts' softmax weights are scaled to sum to 1.
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
    renormalize: bool
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
    """

    factory: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def open(self) -> ExpertSource:
        """Open the source.

        Raises
        ------
        ConfigError
            If the factory cannot be imported.
        CheckpointError
            If the source refuses.
        """
        module, _, name = self.factory.partition(":")
        try:
            factory = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as error:
            raise ConfigError(
                f"the source factory {self.factory!r} cannot be imported here ({error}); "
                f"make its module importable in every process that attaches"
            ) from error
        source: ExpertSource = factory(**self.arguments)
        return source


@runtime_checkable
class ExpertSource(Protocol):
    """The interface. `read_into` is called from several threads at once; everything else from one."""

    @property
    def geometry(self) -> ExpertGeometry: ...

    @property
    def spec(self) -> SourceSpec: ...

    def read_into(self, layer: int, expert: int, buffer: memoryview) -> None:
        """Fill `buffer` (exactly ``geometry.expert_bytes`` writable bytes) with one expert.

        Parameters
        ----------
        layer : int
            MoE layer, counted from 0.
        expert : int
        buffer : memoryview
            Of format ``"B"``; its content is undefined if this raises.

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

    def close(self) -> None:
        """Release descriptors; the source is not used again."""
