"""The tables of a segment in private memory: nothing in ``/dev/shm``, no pool, no other process.

For replays and simulations, and for what one worker knows of its own GPU.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shmroute.config import RuntimeConfig
from shmroute.shared.atomic import WORD
from shmroute.shared.layout import LANE_CURSOR, LANE_IDENTITY, Layout
from shmroute.shared.words import LIVE, pack_identity


class PrivateTables:
    """What an `Eviction` or a router's `Plan` reads, all zero but for the identities of the workers.

    Parameters
    ----------
    config : RuntimeConfig
        For the sizes; as many workers as it allows are attached.
    """

    def __init__(self, config: RuntimeConfig) -> None:
        self.config = config
        self.layout = Layout(
            config.num_layers, config.num_experts, config.max_workers, config.slots, config.slot_bytes, 0
        )
        self._words = np.zeros(self.layout.control_bytes // WORD, np.int64)
        for lane in range(config.max_workers):
            offset = self.layout.lane(lane)
            self._words[(offset + LANE_IDENTITY) // WORD] = pack_identity(LIVE, 0, 0, lane + 1)
            self._words[(offset + LANE_CURSOR) // WORD] = config.num_layers - 1

    @property
    def address(self) -> int:
        """Where the first byte is."""
        return int(self._words.ctypes.data)

    def resident_row(self, layer: int) -> npt.NDArray[np.int64]:
        """int64 [⌈E/64⌉], a layer's residency bitmap: a view that keeps the tables."""
        first = (self.layout.resident + layer * self.layout.resident_row_bytes) // WORD
        return self._words[first : first + -(-self.config.num_experts // 64)]
