"""A trace in memory, checked."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from shmroute.errors import TraceError
from shmroute.shared.words import MAX_EXPERTS, MAX_LAYERS

NOT_RECORDED = -1
"""The id of a choice that the recorder missed."""


PER_TOKEN = ("ids", "weights", "logits", "seq_id", "resident", "lane", "tick", "strength", "spread", "stall_ns")
"""The arrays of a trace; of each, the first axis is the tokens."""


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
    resident : ndarray or None
        uint8 [tokens, layers, ⌈experts/8⌉]: the residency that the router consulted, a bit an expert, lowest first.
    lane : ndarray or None
        int64 [tokens]: the worker lane that routed each token.
    tick : ndarray or None
        int64 [tokens, layers]: the layer's clock as the token was routed, -1 where not recorded.
    strength : ndarray or None
        float64 [tokens, layers]: the cache bonus in force.
    spread : ndarray or None
        float64 [tokens, layers]: the layer's spread in force (`shmroute.routing.spread`); 0 but for cache-prior.
    stall_ns : ndarray or None
        int64 [tokens, layers]: nanoseconds that leases waited for what the token had chosen; of a batch, the first
        token that had.

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
    resident: npt.NDArray[np.uint8] | None = None
    lane: npt.NDArray[np.int64] | None = None
    tick: npt.NDArray[np.int64] | None = None
    strength: npt.NDArray[np.float64] | None = None
    spread: npt.NDArray[np.float64] | None = None
    stall_ns: npt.NDArray[np.int64] | None = None

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
        for name, kinds, shape, dtype in (
            ("resident", "u", (tokens, layers, -(-experts // 8)), np.uint8),
            ("lane", "iu", (tokens,), np.int64),
            ("tick", "iu", (tokens, layers), np.int64),
            ("strength", "f", (tokens, layers), np.float64),
            ("spread", "f", (tokens, layers), np.float64),
            ("stall_ns", "iu", (tokens, layers), np.int64),
        ):
            given = getattr(self, name)
            if given is not None:
                array = self._array(name, given, kinds, len(shape))
                self._require(array.shape == shape, f"{name} must have the shape {shape}, not {array.shape}")
                put(self, name, np.ascontiguousarray(array, dtype))

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

    def misses(self) -> npt.NDArray[np.int64]:
        """int64 [tokens, layers]: chosen experts that were not resident when routed.

        Raises
        ------
        TraceError
            If no residency was recorded.
        """
        if self.resident is None:
            raise TraceError(self.path, "it has no residency: only what shmroute recorded itself has")
        bits = np.unpackbits(self.resident, axis=2, bitorder="little")
        present = np.take_along_axis(bits, np.maximum(self.ids, 0), axis=2)
        missed: npt.NDArray[np.int64] = ((self.ids >= 0) & (present == 0)).sum(axis=2)
        return missed

    def tokens(self, start: int, stop: int) -> Trace:
        """The tokens [start, stop) alone."""
        arrays = {name: getattr(self, name) for name in PER_TOKEN}
        cut = {name: array[start:stop] for name, array in arrays.items() if array is not None}
        return dataclasses.replace(self, **cut)
