"""The pager's eviction policies over a replay's tables: the very code of `shmroute.pager.eviction`.

In each step the worker publishes what routing publishes (clock, affinity, activations, cursor), then wants its experts
one after the other; what is not resident is loaded at once, into a free slot or that of a victim. Then what a
prefetcher proposes for that step is loaded likewise.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import types

from shmroute.config import PagerConfig
from shmroute.pager.eviction import table as t
from shmroute.pager.eviction.history import observe_history
from shmroute.pager.eviction.victims import Eviction, admit, find_victim
from shmroute.replay.accesses import Accesses
from shmroute.replay.memory import PrivateTables
from shmroute.shared.affinity import activate, advance_clock, count_activation, power_table
from shmroute.shared.atomic import WORD, f64_array, i64_array, load, store
from shmroute.shared.kernel import inner, kernel, load_kernels
from shmroute.shared.layout import LANE_CURSOR, LINE, USE_ACTIVATIONS, USE_AFFINITY, USE_BYTES
from shmroute.shared.words import ABSENT, RESIDENT, expert_slot, expert_state, pack_expert

_ARRAY = types.int64[::1]

# Columns of the log of loads.
LOAD_STEP, LOAD_KEY, LOAD_AHEAD = range(3)
_LOG_COLUMNS = 3


@dataclass(frozen=True)
class Served:
    """What serving all accesses came to.

    Attributes
    ----------
    hits : ndarray
        bool [accesses]: whether its expert was resident, or asked for.
    loads : ndarray
        int64 [loads, 3], in order: after which step's routing, which key, and 1 if ahead of demand.
    useful : int
        Loads ahead of demand whose expert was wanted before it went.
    """

    hits: npt.NDArray[np.bool_]
    loads: npt.NDArray[np.int64]
    useful: int


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
    types.int64(
        types.int64, _ARRAY, _ARRAY, _ARRAY, _ARRAY, types.int64[:, ::1], _ARRAY, types.int64[:, ::1], _ARRAY,
        types.int64,
    )
)  # fmt: skip
def serve(
    table: int,
    keys: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    layers: npt.NDArray[np.int64],
    workers: npt.NDArray[np.int64],
    proposals: npt.NDArray[np.int64],
    hits: npt.NDArray[np.int64],
    loads: npt.NDArray[np.int64],
    ahead: npt.NDArray[np.int64],
    observe_every: int,
) -> int:
    """Serve all accesses; how many loads that took.

    Parameters
    ----------
    proposals : ndarray
        int64 [steps, width]: what a prefetcher asks for after each step.
    hits : ndarray
        int64 [accesses], 0: set to 1 where the expert was resident.
    loads : ndarray
        int64 [enough, 3]: filled as `Served.loads`.
    ahead : ndarray
        int64 [experts of all layers + 1], 0: what was loaded ahead of demand and not wanted yet; in the last, in the
        end, how many were wanted.
    """
    words = i64_array(table, t.TABLE_WORDS)
    experts = words[t.NUM_EXPERTS]
    boost = f64_array(words[t.NUMBERS], 4)[t.BOOST]
    used, loaded, useful = 0, 0, 0
    for step in range(len(layers)):
        layer = layers[step]
        clock = words[t.CLOCK] + layer * LINE
        start = advance_clock(clock, 1)
        for i in range(starts[step], starts[step + 1]):
            use = words[t.USES] + layer * words[t.USE_ROW_BYTES] + keys[i] % experts * USE_BYTES
            activate(use + USE_AFFINITY, clock, words[t.POWERS], start, start + 1, boost, 1.0, 1.0)
            count_activation(use + USE_ACTIVATIONS, 1)
        store(words[t.LANES] + workers[step] * words[t.LANE_BYTES] + LANE_CURSOR, layer)
        if step % observe_every == 0:
            observe_history(table)
        for i in range(starts[step], starts[step + 1]):
            key = keys[i]
            if is_resident(table, key):
                hits[i] = 1
                useful += ahead[key]
                ahead[key] = 0
                continue
            used = bring(table, key, used)
            ahead[key] = 0
            loads[loaded, LOAD_STEP], loads[loaded, LOAD_KEY], loads[loaded, LOAD_AHEAD] = step, key, 0
            loaded += 1
        for i in range(proposals.shape[1]):
            key = proposals[step, i]
            if key < 0 or is_resident(table, key):
                continue
            used = bring(table, key, used)
            ahead[key] = 1
            loads[loaded, LOAD_STEP], loads[loaded, LOAD_KEY], loads[loaded, LOAD_AHEAD] = step, key, 1
            loaded += 1
    ahead[len(ahead) - 1] = useful
    return loaded


def serve_accesses(
    accesses: Accesses, slots: int, policy: str, proposals: npt.NDArray[np.int64], observe_every: int = 1
) -> Served:
    """Serve all accesses by one policy.

    Parameters
    ----------
    accesses : Accesses
    slots : int
    policy : str
        One of `shmroute.pager.eviction.names.POLICIES`.
    proposals : ndarray
        What a `Prefetcher` makes of the accesses.
    observe_every : int
        The pager looks at what was published once in so many steps.
    """
    load_kernels()
    tables = PrivateTables(accesses.settings(slots, PagerConfig(eviction=policy)))
    eviction = Eviction(tables, power_table(tables.config.affinity.decay))
    hits = np.zeros(len(accesses.keys), np.int64)
    loads = np.zeros((len(accesses.keys) + proposals.size, _LOG_COLUMNS), np.int64)
    ahead = np.zeros(accesses.num_layers * accesses.num_experts + 1, np.int64)
    count = serve(
        eviction.table, accesses.keys, accesses.starts, accesses.layers, accesses.workers, proposals, hits, loads,
        ahead, observe_every,
    )  # fmt: skip
    return Served(hits.astype(np.bool_), loads[:count], int(ahead[-1]))


def on_demand(accesses: Accesses, hits: npt.NDArray[np.bool_]) -> Served:
    """The loads of a policy that asks for what is missed, and for nothing else."""
    steps = np.repeat(np.arange(len(accesses.layers)), np.diff(accesses.starts))
    missed = np.flatnonzero(~hits)
    return Served(hits, np.stack([steps[missed], accesses.keys[missed], np.zeros_like(missed)], axis=1), 0)
