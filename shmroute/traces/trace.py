"""A trace in memory, checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from shmroute.errors import TraceError
from shmroute.shared.words import MAX_EXPERTS, MAX_LAYERS

NOT_RECORDED = -1
"""The id of a choice that the recorder missed."""


@dataclass(frozen=True)
class Trace:
    """Which experts each token chose, in the order in which the tokens were computed.

    Attributes
    ----------
    name : str
        For tables.
    path : str
        For errors.
    ids : ndarray
        int32 [tokens, layers, k]: experts of each layer, -1 where not recorded. None twice in one layer of a token.
    num_experts : int
        In each layer.
    weights : ndarray or None
        float32 [tokens, layers, k].
    logits : ndarray or None
        float32 [tokens, layers, num_experts], of all experts.
    seq_id : ndarray
        int64 [tokens]: which sequence each token belongs to.
    meta : dict
        Whatever else is known.

    Raises
    ------
    TraceError
        If an array is not what is said here.
    """

    name: str
    path: str
    ids: npt.NDArray[np.int32]
    num_experts: int
    weights: npt.NDArray[np.float32] | None = None
    logits: npt.NDArray[np.float32] | None = None
    seq_id: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))
    meta: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ids = self._array("ids", self.ids, "iu", 3)
        self._require(
            min(ids.shape) > 0, f"ids must have at least one token, layer and choice, but its shape is {ids.shape}"
        )
        tokens, layers, k = ids.shape
        self._require(layers <= MAX_LAYERS, f"{layers} layers are more than the {MAX_LAYERS} that are supported")
        experts = self.num_experts
        self._require(
            k <= experts <= MAX_EXPERTS,
            f"{experts} experts a layer, with {k} chosen, is not from {k} to {MAX_EXPERTS}",
        )
        if ids.min() < NOT_RECORDED or ids.max() >= experts:
            token, layer, rank = np.argwhere((ids < NOT_RECORDED) | (ids >= experts))[0].tolist()
            self._require(
                False,
                f"ids[{token}, {layer}, {rank}] is {ids[token, layer, rank]}, outside 0 … {experts - 1} "
                f"(-1 stands for not recorded); does the file say the right number of experts?",
            )
        ordered = np.sort(ids, axis=2)
        twice = (ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] >= 0)
        if twice.any():
            token, layer, _ = np.argwhere(twice)[0].tolist()
            self._require(
                False, f"token {token} chooses an expert of layer {layer} twice: {ids[token, layer].tolist()}"
            )
        put = object.__setattr__
        put(self, "ids", np.ascontiguousarray(ids, np.int32))
        if self.weights is not None:
            put(self, "weights", self._floats("weights", self.weights, ids.shape))
        if self.logits is not None:
            put(self, "logits", self._floats("logits", self.logits, (tokens, layers, experts)))
        if self.seq_id.size == 0:
            put(self, "seq_id", np.zeros(tokens, np.int64))
        sequence = self._array("seq_id", self.seq_id, "iu", 1)
        self._require(len(sequence) == tokens, f"seq_id must have one entry for each of {tokens} tokens")
        put(self, "seq_id", np.ascontiguousarray(sequence, np.int64))

    def _require(self, condition: bool, reason: str) -> None:
        if not condition:
            raise TraceError(self.path, reason)

    def _array(self, name: str, array: npt.NDArray[Any], kinds: str, dimensions: int) -> npt.NDArray[Any]:
        self._require(
            isinstance(array, np.ndarray) and array.dtype.kind in kinds and array.ndim == dimensions,
            f"{name} must be an array of {'integers' if 'i' in kinds else 'floats'} with {dimensions} dimensions, "
            f"not {getattr(array, 'dtype', type(array).__name__)} {getattr(array, 'shape', '')}",
        )
        return array

    def _floats(self, name: str, array: npt.NDArray[Any], shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        self._array(name, array, "f", 3)
        self._require(array.shape == shape, f"{name} must have the shape {shape}, not {array.shape}")
        return np.ascontiguousarray(array, np.float32)

    @property
    def num_tokens(self) -> int:
        """Tokens."""
        return int(self.ids.shape[0])

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return int(self.ids.shape[1])

    @property
    def top_k(self) -> int:
        """Experts chosen per token and layer."""
        return int(self.ids.shape[2])

    def tokens(self, start: int, stop: int) -> Trace:
        """The tokens [start, stop) alone."""

        def cut(array: npt.NDArray[Any] | None) -> Any:
            return None if array is None else array[start:stop]

        return Trace(
            self.name, self.path, cut(self.ids), self.num_experts, cut(self.weights), cut(self.logits),
            cut(self.seq_id), self.meta,
        )  # fmt: skip
