"""Which experts one worker has in the memory of its GPU: a tier before the slots that all share.

The same words, bitmap and eviction as the pager's, but in private memory, with this worker as their only user: its
tokens alone say what is kept, by the policy of `PagerConfig.eviction`. Nothing of it is in the segment but two
counters, so nothing remains of a worker that dies. An expert may be in the GPU, in a shared slot, in both or in
neither: the tier holds no lease, and the pager may evict what was copied.

Whoever fills it (`shmroute.integrations.transformers.device_cache`) does so in two steps, so that no router takes for
present what is not: `make_room` gives a slot that holds nothing from then on, `arrived` says that the expert is in it.

Threads of the process use it one at a time; a routing call on another thread may read the bitmap meanwhile.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from shmroute.attachment import Attachment
from shmroute.budget import slots_of_budget
from shmroute.config import RuntimeConfig
from shmroute.errors import ConfigError
from shmroute.pager.eviction.policy import Eviction
from shmroute.routing import MemoryAwareRouter
from shmroute.shared.affinity import update_layer
from shmroute.shared.atomic import WORD
from shmroute.shared.experts import publish, write_word
from shmroute.shared.layout import LANE_CURSOR, LINE
from shmroute.shared.metrics import LaneCounter, add
from shmroute.shared.private_tables import PrivateTables
from shmroute.shared.words import ABSENT, LOADING, pack_expert

Ids = npt.NDArray[np.int64]

NOBODY: Ids = np.zeros(0, np.int64)


def device_slots(config: RuntimeConfig, budget: str | int) -> int:
    """How many experts a budget of GPU memory holds.

    Parameters
    ----------
    config : RuntimeConfig
    budget : str or int
        As the budget of host memory: a share of all experts (``"25%"``), a size (``"2GiB"``) or bytes.

    Raises
    ------
    ConfigError
        If it is no budget, or one token's experts of a layer and one more do not fit.
    """
    experts = config.num_layers * config.num_experts
    slots = slots_of_budget(budget, experts, config.expert_bytes)
    least = min(config.top_k + 1, experts)
    if slots < least:
        raise ConfigError(
            f"a device budget of {budget!r} holds {slots} experts, but a token's {config.top_k} of a layer and one to "
            f"come need {least} slots of {config.slot_bytes} bytes: give {least * config.slot_bytes} bytes or more"
        )
    return slots


class DeviceTier:
    """The experts that one process has in its GPU.

    Parameters
    ----------
    attachment : Attachment
        The process's; its routers are told what is in the GPU. Claims a lane.
    slots : int
        Experts that the GPU holds at once, at least 2 unless there is one expert in all.
    """

    def __init__(self, attachment: Attachment, slots: int) -> None:
        config = attachment.segment.config
        self._attachment = attachment
        self._config = dataclasses.replace(config, slots=slots, max_workers=1, trace=None)
        self._tables = PrivateTables(self._config)
        self._powers = attachment.powers
        self._eviction = Eviction(self._tables, self._powers)
        self._free = list(range(slots))[::-1]
        self._slot_of: dict[int, int] = {}
        self._copies = attachment.lane().counter(LaneCounter.DEVICE_COPIES)
        self._routers = [attachment.one(MemoryAwareRouter, layer) for layer in range(config.num_layers)]
        for layer, router in enumerate(self._routers):
            router.set_device_residency(self._tables.resident_row(layer))

    def slot_of(self, layer: int, expert: int) -> int | None:
        """The slot that an expert is in, if it is there."""
        return self._slot_of.get(self._key(layer, expert))

    def use(self, layer: int, choices: Ids) -> None:
        """Take in what some tokens of a layer chose, int64 [T, k]: eviction goes by it."""
        tables, layout, affinity = self._tables, self._tables.layout, self._config.affinity
        row, clock = tables.address + layout.use_row(layer), tables.address + layout.clock + layer * LINE
        ids, powers = np.ascontiguousarray(choices), self._powers.ctypes.data
        for token_at in range(ids.ctypes.data, ids.ctypes.data + ids.nbytes, ids.shape[1] * WORD):
            update_layer(
                row, clock, powers, self._config.num_experts, token_at, ids.shape[1], affinity.activation_boost,
                affinity.max_score,
            )  # fmt: skip
        write_word(tables.address + layout.lane(0) + LANE_CURSOR, layer)
        self._eviction.observe()

    def make_room(self, layer: int, expert: int, wanted: Ids) -> int:
        """A slot for an expert that is not there; what it held is gone.

        To be followed by `arrived` or `left_out` before the next one.

        Parameters
        ----------
        layer, expert : int
        wanted : ndarray
            int64, other experts of the layer, which are kept if anything else can go.
        """
        if self._free:
            slot = self._free.pop()
        else:
            found = self._eviction.evict(layer * self._config.num_experts + wanted) or self._eviction.evict(NOBODY)
            assert found is not None, "every slot holds an expert that can go"
            key, slot = found
            del self._slot_of[key]
        write_word(self._word(layer, expert), pack_expert(LOADING, 0, slot, 0))
        return slot

    def arrived(self, layer: int, expert: int, slot: int) -> None:
        """An expert's bytes are in the slot that `make_room` gave for it."""
        key = self._key(layer, expert)
        self._slot_of[key] = slot
        self._eviction.loaded(slot, key)
        publish(self._word(layer, expert), self._tables.address + self._resident_row(layer), expert, slot)
        with self._attachment.in_use():
            add(self._copies, 1)

    def left_out(self, layer: int, expert: int, slot: int) -> None:
        """It will not come: the slot is free."""
        write_word(self._word(layer, expert), pack_expert(ABSENT, 0, 0, 0))
        self._free.append(slot)

    def close(self) -> None:
        """Have the routers forget it."""
        for router in self._routers:
            router.set_device_residency(None)

    def _key(self, layer: int, expert: int) -> int:
        return layer * self._config.num_experts + expert

    def _word(self, layer: int, expert: int) -> int:
        layout = self._tables.layout
        return self._tables.address + layout.row(layout.experts, layer) + expert * WORD

    def _resident_row(self, layer: int) -> int:
        return self._tables.layout.resident + layer * self._tables.layout.resident_row_bytes
