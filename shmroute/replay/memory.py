"""The tables of a segment in private memory, for a replay: nothing in ``/dev/shm``, no pool, no other process."""

from __future__ import annotations

import numpy as np

from shmroute.config import PagerConfig, RuntimeConfig
from shmroute.replay.accesses import Accesses
from shmroute.shared.atomic import WORD
from shmroute.shared.layout import LANE_CURSOR, LANE_IDENTITY, Layout
from shmroute.shared.words import LIVE, pack_identity


class PrivateTables:
    """What an `Eviction` reads, all zero but for the identities of the workers.

    Parameters
    ----------
    accesses : Accesses
        For the sizes.
    slots : int
    policy : str
        Of the pager's `eviction` setting.
    """

    def __init__(self, accesses: Accesses, slots: int, policy: str) -> None:
        self.config = RuntimeConfig(
            num_layers=accesses.num_layers,
            num_experts=accesses.num_experts,
            top_k=accesses.top_k,
            expert_bytes=1,
            slots=slots,
            max_workers=accesses.num_workers,
            pager=PagerConfig(eviction=policy),
        )
        self.layout = Layout(
            accesses.num_layers, accesses.num_experts, accesses.num_workers, slots, self.config.slot_bytes, 0
        )
        self._words = np.zeros(self.layout.control_bytes // WORD, np.int64)
        for lane in range(accesses.num_workers):
            offset = self.layout.lane(lane)
            self._words[(offset + LANE_IDENTITY) // WORD] = pack_identity(LIVE, 0, 0, lane + 1)
            self._words[(offset + LANE_CURSOR) // WORD] = accesses.num_layers - 1

    @property
    def address(self) -> int:
        """Where the first byte is."""
        return int(self._words.ctypes.data)
