"""Caches without bytes, one for each group of streams: the routing kernel and the pager's eviction over private tables.

Each stream of a pool has a lane, as a worker has. A step routes one token of one stream in one layer, by the very
kernel of `MemoryAwareRouter`. What it misses it requests through the ring, and before the next step the requests are
popped and the experts loaded, in place of those that the pager's policy gives up. An expert that the token has chosen
stays until then, as one that a worker leases or waits for does. What the model of a pool leaves out is time: no load is
late, and the pager has no leisure to prefetch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
from numba import types

from shmroute.config import RuntimeConfig
from shmroute.errors import NonFiniteLogitsError
from shmroute.pager.eviction import table as t
from shmroute.pager.eviction.history import observe_history
from shmroute.pager.eviction.policy import Eviction
from shmroute.pager.eviction.victims import admit, find_victim
from shmroute.routing import plan_words as p
from shmroute.routing.codes import NOT_FINITE
from shmroute.routing.plan import Plan, Turns
from shmroute.routing.route import route
from shmroute.shared.affinity import power_table
from shmroute.shared.atomic import WORD, address_of, fetch_add, i64_array, load
from shmroute.shared.experts import begin_load, evict, publish, write_word
from shmroute.shared.kernel import inner, kernel, load_kernels
from shmroute.shared.layout import LANE_SHARD, LINE, RING_HEAD, RING_TAIL
from shmroute.shared.metrics import LANE_COUNTERS, LaneCounter, snapshot_words
from shmroute.shared.private_tables import PrivateTables
from shmroute.shared.ring import EMPTY, pop
from shmroute.shared.words import expert_slot, pack_bonus, request_expert

NO_SLOT: Final = -100
"""A step found no slot: fewer than a token chooses."""

_WORDS = types.int64[::1]


@inner
def _load_expert(plan: npt.NDArray[np.int64], table: int, expert: int, used: int, wanted: int, row_bytes: int) -> int:
    """Load one expert of the plan's layer; how many slots are in use then, or NO_SLOT.

    Parameters
    ----------
    plan : ndarray
        The plan's words.
    table : int
        The eviction's.
    expert, used : int
    wanted : int
        Address of int64 [k], the keys that the token has chosen.
    row_bytes : int
        Of a layer's residency bitmap.
    """
    words = i64_array(table, t.TABLE_WORDS)
    layer, experts = plan[p.LAYER], words[t.NUM_EXPERTS]
    slot = used
    if used < words[t.SLOTS]:
        used += 1
    else:
        victim = find_victim(table, wanted, plan[p.TOP_K])
        if victim < 0:
            return NO_SLOT
        of_layer = victim // experts
        gone = words[t.EXPERTS] + of_layer * words[t.ROW_BYTES] + victim % experts * WORD
        slot = expert_slot(load(gone))
        evict(gone, plan[p.RESIDENT] + (of_layer - layer) * row_bytes, victim % experts, slot)
        fetch_add(plan[p.COUNTERS] + LaneCounter.EVICTIONS * WORD, 1)
    address = plan[p.EXPERTS] + expert * WORD
    begin_load(address, slot)
    i64_array(words[t.OWNERS], words[t.SLOTS])[slot] = layer * experts + expert
    admit(table, layer * experts + expert)
    publish(address, plan[p.RESIDENT], expert, slot)
    fetch_add(plan[p.COUNTERS] + LaneCounter.LOADS * WORD, 1)
    return used


@kernel(types.int64(_WORDS, _WORDS, _WORDS, _WORDS, types.int64, types.int64, types.int64, types.int64))
def step(
    plans: npt.NDArray[np.int64],
    tables: npt.NDArray[np.int64],
    used: npt.NDArray[np.int64],
    wanted: npt.NDArray[np.int64],
    row_bytes: int,
    logits_at: int,
    experts_at: int,
    weights_at: int,
) -> int:
    """Route one token in every pool and load what it misses; 0, or the code of a failure.

    Parameters
    ----------
    plans, tables, used : ndarray
        int64 [pools]: addresses of the plans' words and of the evictions' tables, and how many slots are in use.
    wanted : ndarray
        int64 [k], scratch space.
    row_bytes : int
        Of a layer's residency bitmap.
    logits_at, experts_at, weights_at : int
        Addresses of float32 [pools, E], int32 [pools, k] and float32 [pools, k].
    """
    for pool in range(len(plans)):
        plan = i64_array(plans[pool], p.PLAN_WORDS)
        k = plan[p.TOP_K]
        ids_at = experts_at + pool * k * 4
        code = route(plans[pool], logits_at + pool * plan[p.NUM_EXPERTS] * 4, ids_at, weights_at + pool * k * 4, 1)
        if code < 0:
            return code
        observe_history(tables[pool])
        # For one token, these are the experts that it has chosen.
        chosen = i64_array(plan[p.TOUCHED], k)
        for i in range(k):
            wanted[i] = plan[p.LAYER] * plan[p.NUM_EXPERTS] + chosen[i]
        while True:
            request = pop(plan[p.RING], plan[p.RING_BITS])
            if request == EMPTY:
                break
            used[pool] = _load_expert(
                plan, tables[pool], request_expert(request), used[pool], address_of(wanted), row_bytes
            )
            if used[pool] == NO_SLOT:
                return NO_SLOT
    return 0


class Pools:
    """Caches of the same settings, all empty at first.

    Parameters
    ----------
    config : RuntimeConfig
        Its `max_workers` is the number of streams that share a pool.
    layer_factors : sequence of float
        For each layer, by what its rule's strength is multiplied.
    count : int
        How many pools.
    """

    def __init__(self, config: RuntimeConfig, layer_factors: Sequence[float], count: int) -> None:
        load_kernels()
        self._config = config
        powers = power_table(config.affinity.decay)
        self._tables = [PrivateTables(config) for _ in range(count)]
        for tables in self._tables:
            layout = tables.layout
            for layer, factor in enumerate(layer_factors):
                write_word(
                    tables.address + layout.bonus + layer * LINE,
                    pack_bonus(config.router.initial_bonus(layer) * factor),
                )
            for cursor in (RING_HEAD, RING_TAIL):
                write_word(tables.address + layout.ring + cursor, 1 << layout.ring_bits)
        self._evictions = [Eviction(tables, powers) for tables in self._tables]
        # A lane is a process of its own, also in what it knows of others' turns.
        turns = [[Turns(config.num_layers) for _ in self._tables] for _ in range(config.max_workers)]
        self._plans = [
            [
                [
                    Plan(tables, layer, lane, powers.ctypes.data, own)
                    for tables, own in zip(self._tables, turns[lane], strict=True)
                ]
                for layer in range(config.num_layers)
            ]
            for lane in range(config.max_workers)
        ]
        self._plan_addresses = np.array(
            [[[plan.address for plan in plans] for plans in layers] for layers in self._plans], np.int64
        )
        self._table_addresses = np.array([eviction.table for eviction in self._evictions], np.int64)
        self._used = np.zeros(count, np.int64)
        self._wanted = np.zeros(config.top_k, np.int64)

    def step(
        self, stream: int, layer: int, logits: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """Route one token of a stream in every pool, and load what it misses.

        Parameters
        ----------
        stream, layer : int
        logits : ndarray
            float32 [pools, E].

        Returns
        -------
        experts, weights : ndarray
            int32 and float32 [pools, k].

        Raises
        ------
        NonFiniteLogitsError
            If a row has fewer than k finite logits.
        """
        logits = np.ascontiguousarray(logits)
        shape = len(logits), self._config.top_k
        experts, weights = np.empty(shape, np.int32), np.empty(shape, np.float32)
        plans = self._plan_addresses[stream, layer]
        code = step(
            plans, self._table_addresses, self._used, self._wanted, self._tables[0].layout.resident_row_bytes,
            address_of(logits), address_of(experts), address_of(weights),
        )  # fmt: skip
        if code == NOT_FINITE:
            finite = np.isfinite(logits).sum(1)
            row = int(finite.argmin())
            raise NonFiniteLogitsError(row, int(finite[row]), self._config.top_k)
        assert code == 0, f"code {code}"
        return experts, weights

    def counts(self) -> npt.NDArray[np.int64]:
        """int64 [pools, streams, counters]: the lanes' counters, by `LaneCounter`."""
        layout = self._tables[0].layout
        shards = [layout.lane(lane) + LANE_SHARD for lane in range(self._config.max_workers)]
        return np.array([[snapshot_words(one.address + at, LANE_COUNTERS) for at in shards] for one in self._tables])
