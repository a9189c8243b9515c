"""A replay with loads ahead of demand: the pager's own eviction, predictors and arbiter, in `timing`'s model of time.

`serving` and `timing` first serve everything and then ask what time it took. Here both go together, as what is loaded
ahead depends on what time is left; with nothing to load ahead the two agree exactly (`tests/replay`). A prefetch begins
when the channel is idle, takes its slot then, and is finished once it has begun; a demand takes one that has not begun
out of the queue (`channel`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import types

from shmroute.config import PagerConfig
from shmroute.pager.eviction.policy import Eviction
from shmroute.pager.prefetch.arbiter import Arbiter
from shmroute.replay.accesses import Accesses
from shmroute.replay.channel import Channel, Load
from shmroute.replay.publishing import publish_and_learn
from shmroute.replay.timing import Machine, compute_layer, shares
from shmroute.shared.affinity import power_table
from shmroute.shared.atomic import WORD, load, store
from shmroute.shared.kernel import kernel, load_kernels
from shmroute.shared.metrics import Predictor, PrefetchOutcome
from shmroute.shared.private_tables import PrivateTables
from shmroute.shared.successors import new_trail
from shmroute.shared.words import ABSENT, LOADING, REQUESTED, RESIDENT, expert_state, pack_expert

NOBODY: npt.NDArray[np.int64] = np.zeros(0, np.int64)

_ARRAY = types.int64[::1]
_FLOATS = types.float64[::1]


@kernel(types.float64(_ARRAY, types.int64, types.int64, _FLOATS, types.float64, types.float64, _FLOATS))
def compute_step(
    keys: npt.NDArray[np.int64],
    first: int,
    last: int,
    ready: npt.NDArray[np.float64],
    routed: float,
    compute: float,
    totals: npt.NDArray[np.float64],
) -> float:
    """`compute_layer`, from Python."""
    return compute_layer(keys, first, last, ready, routed, compute, totals)


@kernel(types.int64(types.int64))
def state_at(address: int) -> int:
    """State of an expert word."""
    return expert_state(load(address))


@kernel(types.void(types.int64, types.int64, types.int64))
def set_state(address: int, state: int, slot: int) -> None:
    """Make an expert word say something."""
    store(address, pack_expert(state, 0, slot, 0))


@dataclass(frozen=True)
class Played:
    """What a replay with prefetching came to.

    Attributes
    ----------
    hit_rate : float
        Share of accesses whose expert was resident, or being loaded, when the token was routed.
    on_time : float
        Share of those whose expert was there when the worker came to it.
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
    def completed(self) -> int:
        """Prefetches whose load ended."""
        return int(self.outcomes[:, PrefetchOutcome.COMPLETED].sum())

    @property
    def accuracy(self) -> float | None:
        """Useful prefetches, of those completed; None without any."""
        return int(self.outcomes[:, PrefetchOutcome.USEFUL].sum()) / self.completed if self.completed else None


class _Player:
    """One run; see `play`."""

    def __init__(
        self, accesses: Accesses, slots: int, machine: Machine, pager: PagerConfig, observe_every: int
    ) -> None:
        self._accesses, self._machine, self._observe_every = accesses, machine, observe_every
        tables = self._tables = PrivateTables(accesses.settings(slots, pager))
        self._powers = power_table(tables.config.affinity.decay)
        self._eviction = Eviction(tables, self._powers)
        self.outcomes = np.zeros((len(Predictor), len(PrefetchOutcome)), np.int64)
        self._arbiter = Arbiter(tables, self._eviction, self._count)
        self._trails = [new_trail() for _ in range(accesses.num_workers)]
        self._experts = np.zeros(max(accesses.top_k, 1), np.int32)
        self._free = list(range(slots))[::-1]
        self._slots: dict[int, int] = {}
        self._queue: deque[int] = deque()
        self._channel = Channel(accesses.num_layers * accesses.num_experts, machine.load_time)
        self._now = 0.0  # up to when the channel was given to prefetches
        self._clocks = [0.0] * accesses.num_workers
        self.totals = np.zeros(2)
        self.hits = self.loads = 0

    def _count(self, predictor: int, outcome: PrefetchOutcome) -> None:
        self.outcomes[predictor, outcome] += 1

    def _address(self, key: int) -> int:
        layer, expert = divmod(key, self._accesses.num_experts)
        return self._tables.address + self._tables.layout.row(self._tables.layout.experts, layer) + expert * WORD

    # ---------------------------------------------------------- the channel

    def _advance(self, now: float) -> None:
        """Let loads end, and prefetches use the channel while it is idle, until `now`."""
        while True:
            for ended in self._channel.ended(now):
                self._finish(ended)
            idle_from = max(self._channel.idle_from, self._now)
            if idle_from >= now:
                break
            if not self._queue:
                for key, predictor in self._arbiter.proposals(idle_from):
                    self._ask(key, predictor, idle_from)
            if not self._queue:
                break
            key = self._queue.popleft()
            if self._arbiter.still_wanted(key) and (slot := self._take(key)) is not None:
                self._begin(key, slot, idle_from)
            else:
                self._arbiter.cancelled(key)
                set_state(self._address(key), ABSENT, 0)
        self._now = max(self._now, now)

    def _begin(self, key: int, slot: int, begin: float) -> None:
        """Begin to load ahead of demand; nobody can put that out before it is there."""
        self._slots[key] = slot
        self._eviction.owners[slot] = key
        set_state(self._address(key), LOADING, slot)
        self._channel.load_ahead(key, begin)
        self.loads += 1

    def _arrive(self, key: int) -> None:
        self._eviction.loaded(self._slots[key], key)
        set_state(self._address(key), RESIDENT, self._slots[key])

    def _finish(self, load: Load) -> None:
        if load.ahead:
            self._arrive(load.key)
            self._arbiter.loaded(load.key, self._machine.load_time, load.end, demanded=False)
        else:  # by now its expert may be gone, and asked for again
            self._arbiter.spare.loaded(self._machine.load_time, load.end, demanded=True)

    def _take(self, key: int) -> int | None:
        """A slot: a free one, or a victim's if it may go."""
        if self._free:
            return self._free.pop()
        found = self._eviction.victim(NOBODY)
        if found is None or not self._arbiter.may_replace(key, found[0]):
            return None
        victim = found[0]
        set_state(self._address(victim), ABSENT, 0)
        slot = self._slots.pop(victim)
        self._eviction.emptied(slot)
        self._arbiter.evicted(victim)
        return slot

    # ---------------------------------------------------------- one token in one layer

    def step(self, number: int, told: Sequence[int], told_by: Predictor) -> None:
        """Route and compute."""
        accesses, arbiter, layout = self._accesses, self._arbiter, self._tables.layout
        first, last = int(accesses.starts[number]), int(accesses.starts[number + 1])
        layer, worker = int(accesses.layers[number]), int(accesses.workers[number])
        now = self._clocks[worker]
        self._advance(now)
        publish_and_learn(
            self._eviction.table, self._tables.address + layout.successors, layout.successor_row_bytes,
            self._trails[worker].ctypes.data, worker, layer, accesses.keys, first, last, self._experts.ctypes.data,
        )  # fmt: skip
        if number % self._observe_every == 0:
            self._eviction.observe()
            arbiter.look()
        for key in accesses.keys[first:last].tolist():
            state = state_at(self._address(key))
            if state in (RESIDENT, LOADING):
                self.hits += 1
                if self._channel.ready[key] > now:
                    self._channel.pull(key, now)
                continue
            if state == REQUESTED:
                self._queue.remove(key)
                arbiter.overtaken(key)
            self._demand(key, now)
        for key in told:
            if state_at(self._address(key)) == ABSENT and arbiter.trusts(told_by, key // accesses.num_experts, now):
                self._ask(key, told_by, now)
        self._clocks[worker] = compute_step(
            accesses.keys, first, last, self._channel.ready, now, self._machine.compute, self.totals
        )
        self._channel.forget(min(self._clocks))

    def _demand(self, key: int, now: float) -> None:
        self._arbiter.demanded(key)
        waits_for = self._channel.under_way(now)
        if waits_for is not None:
            self._arbiter.delayed(waits_for.key, waits_for.end - max(now, waits_for.begin))
        slot = self._take(key)
        if slot is None:  # the only slot is one being loaded ahead: this one's place next
            self._finish(self._channel.finish_ahead())
            slot = self._take(key)
            assert slot is not None
        self._slots[key] = slot
        self._arrive(key)  # as `serving` has it
        self._channel.demand(key, now)
        self.loads += 1

    def _ask(self, key: int, predictor: int, now: float) -> None:
        set_state(self._address(key), REQUESTED, 0)
        self._arbiter.asked(key, predictor, now)
        self._queue.append(key)


def play(
    accesses: Accesses,
    slots: int,
    machine: Machine,
    pager: PagerConfig,
    *,
    told: Sequence[Sequence[int]] | None = None,
    told_by: Predictor = Predictor.HINT,
    observe_every: int = 1,
) -> Played:
    """Play all accesses with prefetching.

    Parameters
    ----------
    accesses : Accesses
    slots : int
    machine : Machine
    pager : PagerConfig
        Its `prefetch`, `predictors`, `io_threads` and `eviction`. The channel loads one expert at a time.
    told : sequence of sequence of int, optional
        For each step, the keys that its worker asks for ahead of demand once its token is routed, best first.
    told_by : Predictor
        As whose idea: a user's hints, which are always taken, or the worker's speculation with the next layer's gate.
    observe_every : int
        The pager looks at what was published once in so many steps.
    """
    load_kernels()
    player = _Player(accesses, slots, machine, pager, observe_every)
    for number in range(len(accesses.layers)):
        player.step(number, told[number] if told is not None else (), told_by)
    on_time, stall = shares(accesses, player.totals)
    return Played(player.hits / max(len(accesses.keys), 1), on_time, stall, player.loads, player.outcomes)
