"""The pager's eviction policies over a replay's tables: the very code of `shmroute.pager.eviction`.

In each step the worker publishes what routing publishes (clock, affinity, activations, cursor), then wants its experts
one after the other; what is not resident is loaded at once, into a free slot or that of a victim.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import types

from shmroute.config import PagerConfig, RuntimeConfig
from shmroute.pager.eviction import table as t
from shmroute.pager.eviction.history import observe_history
from shmroute.pager.eviction.victims import Eviction, admit, find_victim
from shmroute.replay.accesses import Accesses
from shmroute.replay.memory import PrivateTables
from shmroute.shared.affinity import activate, advance_clock, count_activation, power_table
from shmroute.shared.atomic import WORD, f64_array, i64_array, load, store
from shmroute.shared.kernel import kernel, load_kernels
from shmroute.shared.layout import LANE_CURSOR, LINE
from shmroute.shared.words import ABSENT, RESIDENT, expert_slot, expert_state, pack_expert

_ARRAY = types.int64[::1]


@kernel(types.int64(types.int64, _ARRAY, _ARRAY, _ARRAY, _ARRAY, _ARRAY, types.int64))
def serve(
    table: int,
    keys: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    layers: npt.NDArray[np.int64],
    workers: npt.NDArray[np.int64],
    hits: npt.NDArray[np.int64],
    observe_every: int,
) -> int:
    """Serve all accesses; `hits` is set to 1 where the expert was resident. How many evictions it took."""
    words = i64_array(table, t.TABLE_WORDS)
    experts, row_bytes = words[t.NUM_EXPERTS], words[t.ROW_BYTES]
    owners = i64_array(words[t.OWNERS], words[t.SLOTS])
    boost = f64_array(words[t.NUMBERS], 4)[t.BOOST]
    used, evictions = 0, 0
    for step in range(len(layers)):
        layer = layers[step]
        clock = words[t.CLOCK] + layer * LINE
        start = advance_clock(clock, 1)
        for i in range(starts[step], starts[step + 1]):
            offset = layer * row_bytes + keys[i] % experts * WORD
            activate(words[t.AFFINITY] + offset, clock, words[t.POWERS], start, start + 1, boost, 1.0, 1.0)
            count_activation(words[t.ACTIVATIONS] + offset, 1)
        store(words[t.LANES] + workers[step] * words[t.LANE_BYTES] + LANE_CURSOR, layer)
        if step % observe_every == 0:
            observe_history(table)
        for i in range(starts[step], starts[step + 1]):
            key = keys[i]
            address = words[t.EXPERTS] + layer * row_bytes + key % experts * WORD
            if expert_state(load(address)) == RESIDENT:
                hits[i] = 1
                continue
            slot = used
            if used < words[t.SLOTS]:
                used += 1
            else:
                victim = find_victim(table, 0, 0)
                gone = words[t.EXPERTS] + victim // experts * row_bytes + victim % experts * WORD
                slot = expert_slot(load(gone))
                store(gone, pack_expert(ABSENT, 0, 0, 0))
                evictions += 1
            owners[slot] = key
            admit(table, key)
            store(address, pack_expert(RESIDENT, 0, slot, 0))
    return evictions


def hits_of(accesses: Accesses, slots: int, policy: str, observe_every: int = 1) -> npt.NDArray[np.bool_]:
    """Which accesses, bool [accesses], find their expert resident.

    Parameters
    ----------
    accesses : Accesses
    slots : int
    policy : str
        One of `shmroute.pager.eviction.names.POLICIES`.
    observe_every : int
        The pager looks at what was published once in so many steps.
    """
    load_kernels()
    tables = PrivateTables(
        RuntimeConfig(
            num_layers=accesses.num_layers,
            num_experts=accesses.num_experts,
            top_k=accesses.top_k,
            expert_bytes=1,
            slots=slots,
            max_workers=accesses.num_workers,
            pager=PagerConfig(eviction=policy),
        )
    )
    eviction = Eviction(tables, power_table(tables.config.affinity.decay))
    hits = np.zeros(len(accesses.keys), np.int64)
    serve(eviction.table, accesses.keys, accesses.starts, accesses.layers, accesses.workers, hits, observe_every)
    return hits.astype(np.bool_)
