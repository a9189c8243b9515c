"""Prefetching over recorded routing: the very predictors and arbiter of the pager, in a model of time.

Unlike `timing`, which plays loads that are known, this decides them as it goes: what is loaded ahead depends on what
time is left. Loads share one channel and run one after the other, demands first; a load that has begun is finished. A
worker demands a layer's misses when its token is routed, computes what is there, then waits for the others in turn.

Left out, as in `timing`: leases, transfers that slow each other down, all of a layer that is not experts.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import types

from shmroute.config import PagerConfig
from shmroute.pager.eviction import table as t
from shmroute.pager.eviction.victims import Eviction
from shmroute.pager.prefetch.arbiter import Arbiter
from shmroute.replay.accesses import Accesses
from shmroute.replay.memory import PrivateTables
from shmroute.replay.timing import Machine
from shmroute.shared.affinity import activate, advance_clock, count_activation, power_table
from shmroute.shared.atomic import WORD, f64_array, i32_array, i64_array, load, store
from shmroute.shared.kernel import kernel, load_kernels
from shmroute.shared.layout import LANE_CURSOR, LINE, USE_ACTIVATIONS, USE_AFFINITY, USE_BYTES
from shmroute.shared.metrics import Predictor, PrefetchOutcome
from shmroute.shared.successors import learn, new_trail
from shmroute.shared.words import ABSENT, LOADING, REQUESTED, RESIDENT, expert_state, pack_expert

NOBODY: npt.NDArray[np.int64] = np.zeros(0, np.int64)


@kernel(
    types.void(types.int64, types.int64, types.int64, types.int64, types.int64, types.int64, types.int64, types.int64)
)
def publish_step(
    table: int, successors: int, row_bytes: int, trail: int, worker: int, layer: int, experts_at: int, count: int
) -> None:
    """What routing one token publishes; int32 [count] experts."""
    words = i64_array(table, t.TABLE_WORDS)
    experts = i32_array(experts_at, count)
    clock, boost = words[t.CLOCK] + layer * LINE, f64_array(words[t.NUMBERS], 4)[t.BOOST]
    start = advance_clock(clock, 1)
    for i in range(count):
        use = words[t.USES] + layer * words[t.USE_ROW_BYTES] + experts[i] * USE_BYTES
        activate(use + USE_AFFINITY, clock, words[t.POWERS], start, start + 1, boost, 1.0, 1.0)
        count_activation(use + USE_ACTIVATIONS, 1)
    learn(successors, row_bytes, words[t.NUM_LAYERS], words[t.NUM_EXPERTS], trail, layer, experts_at, count)
    store(words[t.LANES] + worker * words[t.LANE_BYTES] + LANE_CURSOR, layer)


@kernel(types.int64(types.int64))
def state_at(address: int) -> int:
    """State of an expert word."""
    return expert_state(load(address))


@kernel(types.void(types.int64, types.int64, types.int64))
def set_state(address: int, state: int, slot: int) -> None:
    """Make an expert word say something."""
    store(address, pack_expert(state, 0, slot, 0))


@dataclass(frozen=True)
class Speculation:
    """What prefetching did.

    Attributes
    ----------
    hit_rate : float
        Share of accesses whose expert was resident when the token was routed.
    on_time : float
        Share of those that it was there when the worker came to it.
    stall_per_token : float
        Seconds.
    loads : int
        In all.
    outcomes : ndarray
        int64 [predictors, outcomes], by `Predictor` and `PrefetchOutcome`.
    """

    hit_rate: float
    on_time: float
    stall_per_token: float
    loads: int
    outcomes: npt.NDArray[np.int64]

    @property
    def accuracy(self) -> float | None:
        """Useful prefetches, of those completed."""
        completed = int(self.outcomes[:, PrefetchOutcome.COMPLETED].sum())
        return int(self.outcomes[:, PrefetchOutcome.USEFUL].sum()) / completed if completed else None


class _Player:
    """One run; see `speculate`."""

    def __init__(self, accesses: Accesses, slots: int, machine: Machine, pager: PagerConfig) -> None:
        self.accesses, self._machine = accesses, machine
        tables = self._tables = PrivateTables(accesses.settings(slots, pager))
        self._powers = power_table(tables.config.affinity.decay)
        self.eviction = Eviction(tables, self._powers)
        self.outcomes = np.zeros((len(Predictor), len(PrefetchOutcome)), np.int64)
        self.arbiter = Arbiter(tables, self.eviction, self._count)
        self._trails = [new_trail() for _ in range(accesses.num_workers)]
        self._free = list(range(slots))[::-1]
        self._slots: dict[int, int] = {}
        self._queue: deque[int] = deque()
        self._loading: deque[tuple[float, int, bool]] = deque()  # (end, key, ahead of demand)
        self._channel = self._now = 0.0  # when the last load ends; up to when all is played
        self._load_time = machine.expert_bytes / machine.bandwidth
        self._ready = np.zeros(accesses.num_layers * accesses.num_experts)
        self.loads = 0

    def _count(self, predictor: int, outcome: PrefetchOutcome) -> None:
        self.outcomes[predictor, outcome] += 1

    def _address(self, key: int) -> int:
        layer, expert = divmod(key, self.accesses.num_experts)
        return self._tables.address + self._tables.layout.row(self._tables.layout.experts, layer) + expert * WORD

    # ---------------------------------------------------------- the channel

    def advance(self, now: float) -> None:
        """Let loads end, and the pager use the channel while it is idle, until `now`."""
        while True:
            while self._loading and self._loading[0][0] <= min(self._channel, now):
                self._finish(*self._loading.popleft())
            idle_from = max(self._channel, self._now)
            if idle_from >= now:
                break
            if not self._queue:
                for key, predictor in self.arbiter.proposals(idle_from):
                    self._ask(key, predictor, idle_from)
            if not self._queue:
                break
            key = self._queue.popleft()
            if self.arbiter.still_wanted(key) and (slot := self._take(key)) is not None:
                self._start(key, slot, idle_from, ahead=True)
            else:
                self.arbiter.cancelled(key)
                set_state(self._address(key), ABSENT, 0)
        self._now = now

    def _start(self, key: int, slot: int, begin: float, *, ahead: bool) -> None:
        self.eviction.owners[slot] = key
        set_state(self._address(key), LOADING, slot)
        self._slots[key] = slot
        self._channel = begin + self._load_time
        self._ready[key] = self._channel
        self._loading.append((self._channel, key, ahead))
        self.loads += 1

    def _finish(self, end: float, key: int, ahead: bool) -> None:
        self.eviction.loaded(self._slots[key], key)
        set_state(self._address(key), RESIDENT, self._slots[key])
        self.arbiter.loaded(key, self._load_time, end, demanded=not ahead)

    def _take(self, key: int) -> int | None:
        """A slot: a free one, or a victim's if it may go."""
        if self._free:
            return self._free.pop()
        found = self.eviction.victim(NOBODY)
        if found is None or not self.arbiter.may_replace(key, found[0]):
            return None
        victim = found[0]
        set_state(self._address(victim), ABSENT, 0)
        slot = self._slots.pop(victim)
        self.eviction.emptied(slot)
        self.arbiter.evicted(victim)
        return slot

    # ---------------------------------------------------------- one token in one layer

    def step(self, number: int, now: float, speculated: Sequence[int]) -> tuple[float, int, int]:
        """Route and compute; when that ends, hits, and accesses that were on time."""
        accesses = self.accesses
        keys = accesses.keys[accesses.starts[number] : accesses.starts[number + 1]].tolist()
        layer, worker = int(accesses.layers[number]), int(accesses.workers[number])
        self.advance(now)
        ids = np.array([key % accesses.num_experts for key in keys], np.int32)
        layout = self._tables.layout
        publish_step(
            self.eviction.table, self._tables.address + layout.successors, layout.successor_row_bytes,
            self._trails[worker].ctypes.data, worker, layer, ids.ctypes.data, len(ids),
        )  # fmt: skip
        self.eviction.observe()
        self.arbiter.look()
        states = [state_at(self._address(key)) for key in keys]
        for key, state in zip(keys, states, strict=True):
            if state == REQUESTED:
                self._queue.remove(key)
                self.arbiter.overtaken(key)
            if state in (ABSENT, REQUESTED):
                self._demand(key, now)
        for key in speculated:
            if state_at(self._address(key)) == ABSENT and self.arbiter.trusts(
                Predictor.GATE, key // accesses.num_experts, now
            ):
                self._ask(key, Predictor.GATE, now)
        return self._compute(keys, states, now)

    def _demand(self, key: int, now: float) -> None:
        self.arbiter.demanded(key)
        if self._loading and self._loading[-1][2] and self._channel > now:
            self.arbiter.delayed(self._loading[-1][1], self._channel - now)
        slot = self._take(key)
        while slot is None:  # everything is being loaded: the first to end is this one's place
            self._finish(*self._loading.popleft())
            slot = self._take(key)
        self._start(key, slot, max(self._channel, now), ahead=False)

    def _ask(self, key: int, predictor: int, now: float) -> None:
        set_state(self._address(key), REQUESTED, 0)
        self.arbiter.asked(key, predictor, now)
        self._queue.append(key)

    def _compute(self, keys: list[int], states: list[int], now: float) -> tuple[float, int, int]:
        if not keys:
            return now, 0, 0  # not recorded
        each = self._machine.compute / len(keys)
        late = sorted(float(self._ready[key]) for key in keys if self._ready[key] > now)
        time, on_time = now + each * (len(keys) - len(late)), len(keys) - len(late)
        for ready in late:
            on_time += ready <= time
            time = max(time, ready) + each
        return time, states.count(RESIDENT), on_time


def speculate(
    accesses: Accesses,
    slots: int,
    machine: Machine,
    pager: PagerConfig,
    speculated: Sequence[Sequence[int]] | None = None,
) -> Speculation:
    """Play all accesses with prefetching.

    Parameters
    ----------
    accesses : Accesses
    slots : int
    machine : Machine
    pager : PagerConfig
        Its `prefetch`, `predictors`, and `eviction`.
    speculated : sequence of sequence of int, optional
        For each step, the keys that the worker's speculation with the next layer's gate asks for.
    """
    load_kernels()
    player = _Player(accesses, slots, machine, pager)
    steps = [deque(np.flatnonzero(accesses.workers == worker).tolist()) for worker in range(accesses.num_workers)]
    turns = [(0.0, worker) for worker in range(accesses.num_workers) if steps[worker]]
    heapq.heapify(turns)
    hits = on_time = 0
    ends = 0.0
    while turns:
        now, worker = heapq.heappop(turns)
        number = steps[worker].popleft()
        end, hit, timely = player.step(number, now, speculated[number] if speculated is not None else ())
        hits, on_time = hits + hit, on_time + timely
        if steps[worker]:
            heapq.heappush(turns, (end, worker))
        else:
            ends += end
    count = max(len(accesses.keys), 1)
    stall = ends - np.count_nonzero(np.diff(accesses.starts)) * machine.compute
    return Speculation(
        hits / count,
        on_time / count,
        stall / accesses.num_tokens,
        player.loads,
        player.outcomes,
    )
