"""The pager's access to the tables of a segment, by *key*: ``layer * num_experts + expert``."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shmroute.shared.atomic import WORD
from shmroute.shared.experts import read_word, rebuild_bitmap, recover, scan_table
from shmroute.shared.segment import Segment


class ExpertTable:
    """Words and rows of a segment's experts.

    Parameters
    ----------
    segment : Segment
    """

    def __init__(self, segment: Segment) -> None:
        self._segment = segment
        self._layout = segment.layout
        self._experts = segment.address + segment.layout.experts
        self._row_bytes = segment.layout.row_bytes
        self._num_experts = segment.config.num_experts
        self._requested = np.zeros(segment.config.num_layers * self._num_experts, np.int64)

    def key(self, layer: int, expert: int) -> int:
        """The key of an expert."""
        return layer * self._num_experts + expert

    def split(self, key: int) -> tuple[int, int]:
        """The (layer, expert) of a key."""
        return divmod(key, self._num_experts)

    def offset(self, region: int, key: int) -> int:
        """Offset of an expert's word in a region of L × E words."""
        layer, expert = divmod(key, self._num_experts)
        return self._layout.row(region, layer) + expert * WORD

    def address(self, key: int) -> int:
        """Address of an expert's word."""
        layer, expert = divmod(key, self._num_experts)
        return self._experts + layer * self._row_bytes + expert * WORD

    def failure_address(self, key: int) -> int:
        """Address of an expert's failure word."""
        return self._segment.address + self.offset(self._layout.failures, key)

    def word(self, key: int) -> int:
        """An expert's word, now."""
        return int(read_word(self.address(key)))

    def resident_row(self, layer: int) -> int:
        """Address of a layer's bitmap."""
        return self._segment.address + self._layout.resident + layer * self._layout.resident_row_bytes

    def scan(self, owners: npt.NDArray[np.int64]) -> list[int]:
        """Read the whole table once: the keys that are requested.

        Parameters
        ----------
        owners : ndarray
            int64 [slots], written: the key in each slot, -1 where none is.
        """
        count = scan_table(
            self._experts, self._layout.row_bytes, self._layout.num_layers, self._num_experts,
            owners.ctypes.data, len(owners), self._requested.ctypes.data,
        )  # fmt: skip
        found: list[int] = self._requested[:count].tolist()
        return found

    def recover(self) -> None:
        """Request again what a dead pager was loading."""
        recover(self._experts, self._layout.row_bytes, self._layout.num_layers)

    def rebuild_bitmaps(self) -> None:
        """Make every layer's bitmap say what its words say."""
        for layer in range(self._layout.num_layers):
            rebuild_bitmap(
                self._segment.address + self._layout.row(self._layout.experts, layer),
                self.resident_row(layer),
                self._num_experts,
            )
