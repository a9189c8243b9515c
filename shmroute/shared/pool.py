"""The weight pool: slots of whole experts, and the views that workers read them through.

A slot's bytes are written by the pager alone, while the expert's word says LOADING(slot), and read under a lease. Its
header says what the bytes are: which expert, encoded how (INV-4), how many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

from shmroute.config import RuntimeConfig
from shmroute.errors import SegmentLayoutError
from shmroute.shared.atomic import store
from shmroute.shared.kernel import inner
from shmroute.shared.layout import SLOT_HEADER_BYTES, SLOT_LENGTH, SLOT_OWNER, SLOT_PRECISION
from shmroute.shared.segment import Segment
from shmroute.shared.words import pack_wait

T = TypeVar("T")

PRECISIONS = {"": 0, "float32": 1, "float16": 2, "bfloat16": 3}
"""How a slot header names the encoding of its bytes; "" is for bytes without a meaning."""


def precision_of(config: RuntimeConfig) -> int:
    """How slot headers name the encoding of a runtime's experts."""
    return PRECISIONS[config.tensors[0].dtype if config.tensors else ""]


@inner
def describe_slot(headers: int, slot: int, layer: int, expert: int, precision: int, length: int) -> None:
    """Write a slot's header, before the expert is published. `headers` is the address of slot 0's."""
    header = headers + slot * SLOT_HEADER_BYTES
    store(header + SLOT_OWNER, pack_wait(layer, expert))
    store(header + SLOT_PRECISION, precision)
    store(header + SLOT_LENGTH, length)


class ExpertWeights(Mapping[str, npt.NDArray[Any]]):
    """One resident expert's tensors by name: read-only, zero-copy, valid while the lease is held.

    For gated feed-forward experts ``w["gate"]`` and ``w["up"]`` are [intermediate, hidden] and ``w["down"]`` is
    [hidden, intermediate], in the checkpoint's dtype; what gpt-oss has instead is told by `TensorLayout`.

    Attributes
    ----------
    raw : ndarray
        uint8 [expert_bytes], all of it.
    """

    __slots__ = ("_derived", "_tensors", "raw")

    def __init__(self, raw: npt.NDArray[np.uint8], tensors: dict[str, npt.NDArray[Any]]) -> None:
        self.raw = raw
        self._tensors = tensors
        self._derived: dict[Callable[[ExpertWeights], Any], Any] = {}

    def derived(self, make: Callable[[ExpertWeights], T]) -> T:
        """What `make` makes of these weights, such as another library's views: made once for the slot, and kept.

        It must hold no bytes of its own: the slot gets other experts' bytes later, and this is not made anew then.
        """
        if make not in self._derived:
            self._derived[make] = make(self)
        return cast(T, self._derived[make])

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Pool:
    """The slots of a segment, as one process sees them."""

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._weights: dict[int, ExpertWeights] = {}

    def weights(self, slot: int) -> ExpertWeights:
        """The tensors in a slot, read-only. Made once for each slot and kept."""
        found = self._weights.get(slot)
        if found is None:
            expert = self._bytes(slot).toreadonly()
            tensors = {tensor.name: tensor.view(expert) for tensor in self._segment.config.tensors}
            found = self._weights[slot] = ExpertWeights(np.frombuffer(expert, np.uint8), tensors)
        return found

    def writable(self, slot: int) -> memoryview:
        """A slot's bytes, for the pager to fill."""
        return self._bytes(slot)

    def forget(self) -> None:
        """Drop the views kept here, so that the segment can be unmapped."""
        self._weights.clear()

    def _bytes(self, slot: int) -> memoryview:
        if slot >= self._segment.config.slots:
            raise SegmentLayoutError(
                f"an expert word of {self._segment.name!r} names slot {slot}, of {self._segment.config.slots}: some "
                f"process has damaged the segment; destroy it and create it anew"
            )
        start = self._segment.layout.slot(slot)
        return self._segment.buffer[start : start + self._segment.config.expert_bytes]
