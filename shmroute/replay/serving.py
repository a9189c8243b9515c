"""The pager's eviction policies over a replay's tables: the very code of `shmroute.pager.eviction`.

In each step the worker publishes what routing publishes (clock, affinity, activations, cursor), then wants its experts
one after the other; what is not resident is loaded at once, into a free slot or that of a victim. Nothing is loaded
ahead of demand: `player` does that.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import types

from shmroute.config import PagerConfig
from shmroute.pager.eviction import table as t
from shmroute.pager.eviction.history import observe_history
from shmroute.pager.eviction.policy import Eviction
from shmroute.pager.eviction.victims import admit, find_victim
from shmroute.replay.accesses import Accesses
from shmroute.replay.publishing import publish
from shmroute.shared.affinity import power_table
from shmroute.shared.atomic import WORD, i64_array, load, store
from shmroute.shared.kernel import inner, kernel, load_kernels
from shmroute.shared.private_tables import PrivateTables
from shmroute.shared.words import ABSENT, RESIDENT, expert_slot, expert_state, pack_expert

_ARRAY = types.int64[::1]

# Columns of the log of loads.
LOAD_STEP, LOAD_KEY = range(2)
_LOG_COLUMNS = 2


@dataclass(frozen=True)
class Served:
    """What serving all accesses came to.

    Attributes
    ----------
    hits : ndarray
        bool [accesses]: whether its expert was resident, or asked for.
    loads : ndarray
        int64 [loads, 2], in order: after which step's routing, and which key.
    """

    hits: npt.NDArray[np.bool_]
    loads: npt.NDArray[np.int64]


@inner
def bring(table: int, key: int, used: int) -> int:
    """Make an expert resident that is not; how many slots have been used so far."""
    words = i64_array(table, t.TABLE_WORDS)
    experts, row_bytes = words[t.NUM_EXPERTS], words[t.ROW_BYTES]
    slot = used
    if used < words[t.SLOTS]:
        used += 1
    else:
        victim = find_victim(table, 0, 0)
        gone = words[t.EXPERTS] + victim // experts * row_bytes + victim % experts * WORD
        slot = expert_slot(load(gone))
        store(gone, pack_expert(ABSENT, 0, 0, 0))
    i64_array(words[t.OWNERS], words[t.SLOTS])[slot] = key
    admit(table, key)
    store(words[t.EXPERTS] + key // experts * row_bytes + key % experts * WORD, pack_expert(RESIDENT, 0, slot, 0))
    return used


@inner
def is_resident(table: int, key: int) -> bool:
    """Whether an expert is resident."""
    words = i64_array(table, t.TABLE_WORDS)
    experts = words[t.NUM_EXPERTS]
    word = load(words[t.EXPERTS] + key // experts * words[t.ROW_BYTES] + key % experts * WORD)
    return expert_state(word) == RESIDENT


@kernel(
    types.int64(types.int64, _ARRAY, _ARRAY, _ARRAY, _ARRAY, _ARRAY, types.int64[:, ::1], types.int64)
)  # fmt: skip
def serve(
    table: int,
    keys: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    layers: npt.NDArray[np.int64],
    workers: npt.NDArray[np.int64],
    hits: npt.NDArray[np.int64],
    loads: npt.NDArray[np.int64],
    observe_every: int,
) -> int:
    """Serve all accesses; how many loads that took.

    Parameters
    ----------
    hits : ndarray
        int64 [accesses], 0: set to 1 where the expert was resident.
    loads : ndarray
        int64 [enough, 2]: filled as `Served.loads`.
    """
    used, loaded = 0, 0
    for step in range(len(layers)):
        publish(table, workers[step], layers[step], keys, starts[step], starts[step + 1])
        if step % observe_every == 0:
            observe_history(table)
        for i in range(starts[step], starts[step + 1]):
            key = keys[i]
            if is_resident(table, key):
                hits[i] = 1
                continue
            used = bring(table, key, used)
            loads[loaded, LOAD_STEP], loads[loaded, LOAD_KEY] = step, key
            loaded += 1
    return loaded


def serve_accesses(accesses: Accesses, slots: int, policy: str, observe_every: int = 1) -> Served:
    """Serve all accesses by one policy.

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
    tables = PrivateTables(accesses.settings(slots, PagerConfig(eviction=policy)))
    eviction = Eviction(tables, power_table(tables.config.affinity.decay))
    hits = np.zeros(len(accesses.keys), np.int64)
    loads = np.zeros((len(accesses.keys), _LOG_COLUMNS), np.int64)
    count = serve(
        eviction.table, accesses.keys, accesses.starts, accesses.layers, accesses.workers, hits, loads, observe_every
    )
    return Served(hits.astype(np.bool_), loads[:count])


def on_demand(accesses: Accesses, hits: npt.NDArray[np.bool_]) -> Served:
    """The loads of a policy that asks for what is missed, and for nothing else."""
    steps = np.repeat(np.arange(len(accesses.layers)), np.diff(accesses.starts))
    missed = np.flatnonzero(~hits)
    return Served(hits, np.stack([steps[missed], accesses.keys[missed]], axis=1))
