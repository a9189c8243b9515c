"""Which proposals are loaded, and in whose place.

A prefetch must be worth three things that it takes: time of the I/O threads, which demands may want; a slot, whose
expert somebody may want back; and trust, which its predictor has earned or not.

- *Time.* Demands go first, and one thread of several is kept for them. A predictor is asked only if its precision is
  above its `LEAST_PRECISION`, and above the share of time that demands take: where they take all, a load ahead of them
  can at best be one that they would want anyway. The pager has no ideas of its own while prefetches and demands
  together take all the time.
- *The slot.* By what the pager has seen of both, the expert that goes must be expected later than the one that comes:
  that one at its layer's next token if its predictor is right (as often as it was *punctual*), else when its own
  shares say (`candidates.layers_until_use`).
- *Trust.* A predictor that is not precise enough in a layer is turned down there, and one whose prefetches have cost
  more than they saved (`balance`) everywhere, but for one proposal in `PROBE`, from which it can win trust back. So
  what wrong predictions can cost is bounded by a share of the loads, whatever the stream.
- *Thinking.* A predictor whose CPU time is worth more than the waiting that it saves, as things are (`usage`), is asked
  one time in `PROBE`. Workers learn by a shared word which predictors they need not think for.

A prediction for the next token is stale once every worker has passed its layer since.

Users' hints are theirs to judge: they go through, and only wait for demands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

import numpy as np

from shmroute.pager.eviction.policy import Eviction
from shmroute.pager.prefetch import names
from shmroute.pager.prefetch.balance import Balance
from shmroute.pager.prefetch.candidates import find_candidates, layers_until_use
from shmroute.pager.prefetch.record import Prefetched, TrackRecord, Waits
from shmroute.pager.prefetch.spare import SpareBandwidth
from shmroute.pager.prefetch.usage import IdleCores, Usage
from shmroute.shared.experts import read_word
from shmroute.shared.layout import LINE
from shmroute.shared.metrics import Predictor, PrefetchOutcome
from shmroute.shared.tables import Tables
from shmroute.shared.turned_down import PROBE, is_turned_down
from shmroute.shared.words import LOW32, high32

LEAST_PRECISION: Final = {
    Predictor.TRANSITIONS: 0.3, Predictor.PREVIOUS_TOKEN: 0.3, Predictor.GATE: 0.3, Predictor.AFFINITY: 0.5,
}  # fmt: skip
"""Of a predictor that is asked. Affinity says of no token when it will use the expert: any use before it goes makes it
right, and of experts that are used at random every second one is."""
GONE_ANYWAY: Final = 0.5
"""What part of a load is charged to an unused prefetch for the expert that went for it, if that is demanded after the
prefetched one is gone too: it might have gone for another by then."""
REACH: Final = {Predictor.TRANSITIONS: 1, Predictor.PREVIOUS_TOKEN: 1, Predictor.AFFINITY: 2}
"""Layers ahead of a worker for which a predictor is asked."""


class Arbiter:
    """All prefetching of one pager, or of a replay.

    Parameters
    ----------
    tables : Tables
        A segment, or what stands for one.
    eviction : Eviction
        Whose observations are used.
    count : callable
        Called as ``count(predictor, outcome)`` for each change of a prefetch.
    usage : Usage
        What waiting and CPU time are worth.

    Attributes
    ----------
    record : TrackRecord
    spare : SpareBandwidth
    balance : Balance
    """

    def __init__(
        self,
        tables: Tables,
        eviction: Eviction,
        count: Callable[[int, PrefetchOutcome], None] = lambda _, __: None,
        usage: Usage | None = None,
    ) -> None:
        config, layout = tables.config, tables.layout
        self._budget = config.pager.prefetch
        named = {names.PREDICTORS[name] for name in config.pager.predictors} if self._budget else set()
        self._asked_by_pager = [predictor for predictor in names.BY_PAGER if predictor in named]
        self._honoured = named | {Predictor.HINT}
        self._num_layers, self._num_experts = config.num_layers, config.num_experts
        self._eviction = eviction
        self._tables = tables
        self._successors = tables.address + layout.successors, layout.successor_row_bytes
        self.record = TrackRecord(config.num_layers, config.num_experts, count)
        self.spare = SpareBandwidth(config.pager.io_threads)
        self._usage = IdleCores() if usage is None else usage
        self.balance = Balance(self._usage)
        self._told = 0  # the word by which workers know who is turned down
        self._paying, self._turn = self._asked_by_pager, 0
        self._threads = config.pager.io_threads
        self._demands: dict[int, tuple[int, int]] = {}  # of a layer: its clock at the last one, how many came then
        self._gone_for: dict[int, tuple[int, int]] = {}  # of experts that went for prefetches: those, and whose idea
        self._looked_at = -1  # how much had been observed then
        self._unjudged = False  # whether something may have been used that was observed before
        self._refused = np.zeros((len(Predictor), config.num_layers), np.int64)
        self._looked = np.full((len(Predictor), config.num_layers), -1, np.int64)
        self._scores = np.zeros(config.num_experts, np.float64)
        self._keys = np.zeros(max(self._budget, 1), np.int64)

    # ---------------------------------------------------------- proposals

    def proposals(self, now: float) -> list[tuple[int, int]]:
        """The (key, predictor) that the pager should ask for now: within the budget, the soonest layers first.

        To be called when nothing is demanded, after `Eviction.observe`.
        """
        asked = self._asked_now()
        if not asked:
            return []
        room = self._budget - self.record.queued
        if room <= 0 or self.spare.spare(now) <= 0:
            return []
        began = self._usage.thread_seconds()
        found = self._ask(asked, room, now)
        spent = (self._usage.thread_seconds() - began) / len(asked)
        delays = self._usage.waiting_weight * min(self.spare.demanded(now) * self._threads, 1.0)  # loads under way
        for predictor in asked:
            self.balance.spent(predictor, spent, self.spare.load_seconds)
            self.balance.lost(predictor, spent * delays, self.spare.load_seconds)
        return found

    def _asked_now(self) -> Sequence[Predictor]:
        """The pager's own predictors whose thinking paid when that was last looked at; all, if this is a probe."""
        if len(self._paying) == len(self._asked_by_pager):
            return self._paying
        self._turn += 1
        return self._paying if self._turn % PROBE else self._asked_by_pager

    def _ask(self, asked: Sequence[Predictor], room: int, now: float) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        distances, clocks = self._eviction.distances(), self._eviction.clocks()
        nobody = distances.min() > 1  # is under way: affinity alone says something then, of what was activated
        for layer in np.argsort(distances, kind="stable").tolist():
            for predictor in asked:
                source = clocks[layer if nobody else layer - 1]  # the layer before has been routed since
                in_reach = predictor == Predictor.AFFINITY if nobody else distances[layer] <= REACH[predictor]
                if not in_reach or self._looked[predictor, layer] == source:
                    continue
                self._looked[predictor, layer] = source
                taken = {key for key, _ in found}
                found += [
                    (key, predictor)
                    for key in self._candidates(predictor, layer, room)
                    if key not in taken and self.trusts(predictor, layer, now)
                ]
            if len(found) >= room or (not nobody and distances[layer] > max(REACH.values())):
                break
        return found[:room]

    def _candidates(self, predictor: int, layer: int, count: int) -> list[int]:
        found = find_candidates(
            self._eviction.table, *self._successors, predictor, layer, self._scores.ctypes.data,
            self._keys.ctypes.data, count,
        )  # fmt: skip
        keys: list[int] = self._keys[:found].tolist()
        return keys

    def trusts(self, predictor: int, layer: int, now: float) -> bool:
        """Whether a predictor's next proposal in a layer is taken: it is precise enough, or this is a probe."""
        if predictor not in self._honoured:
            return False
        if predictor == Predictor.HINT or (predictor == Predictor.GATE and is_turned_down(self._told, predictor)):
            return True  # of those of the gate that is turned down workers withhold all but probes
        precise = self.record.precision[predictor, layer] >= max(
            LEAST_PRECISION[Predictor(predictor)], self.spare.demanded(now)
        )
        if precise and self.balance.is_worth_it(predictor):
            return True
        self._refused[predictor, layer] += 1
        return bool(self._refused[predictor, layer] % PROBE == 0)

    def speculated(self, seconds: float) -> None:
        """Note that workers have speculated with the gate for so many seconds of CPU time."""
        self.balance.lost(Predictor.GATE, seconds, self.spare.load_seconds)

    def turned_down(self) -> int:
        """Look which predictors are turned down everywhere: the word that workers are to be told."""
        paying = {one for one in self._honoured if self.balance.pays(one, self.spare.load_seconds)}
        self._paying = [predictor for predictor in self._asked_by_pager if predictor in paying]
        self._told = sum(
            1 << predictor
            for predictor in self._honoured - {Predictor.HINT}
            if predictor not in paying or not self.balance.is_worth_it(predictor)
        )
        return self._told

    # ---------------------------------------------------------- one prefetch, from its beginning to its end

    def asked(self, key: int, predictor: int, now: float) -> None:
        """Note that an expert was asked for, because a predictor, or a user, says that it will be wanted."""
        layer, expert = divmod(key, self._num_experts)
        total = read_word(self._tables.address + self._tables.layout.activations(layer, expert))
        self.record.asked(key, Prefetched(predictor, int(total), int(self._eviction.clocks()[layer]), now))

    def still_wanted(self, key: int) -> bool:
        """Whether a prefetch that could begin now is not stale."""
        prefetched = self.record.pending.get(key)
        if prefetched is None or prefetched.predictor in (Predictor.HINT, Predictor.AFFINITY):
            return True
        return int(self._eviction.clocks()[key // self._num_experts]) - prefetched.clock < self._eviction.workers

    def may_replace(self, key: int, victim: int) -> bool:
        """Whether an expert that would go is expected later than the one that is prefetched in its place."""
        prefetched = self.record.pending.get(key)
        if prefetched is None or prefetched.predictor == Predictor.HINT:
            return True
        table, layer = self._eviction.table, key // self._num_experts
        expected = float(layers_until_use(table, key))
        if prefetched.predictor != Predictor.AFFINITY:
            punctual = float(self.record.punctuality[prefetched.predictor, layer])
            expected += (float(self._eviction.distances()[layer]) - expected) * punctual
        if expected >= float(layers_until_use(table, victim)):
            return False
        self._gone_for[victim] = prefetched.predictor, key
        prefetched.victim = victim
        return True

    def look(self) -> None:
        """See what was used, after `Eviction.observe`."""
        if self._eviction.observations == self._looked_at and not self._unjudged:
            return
        self._looked_at = self._eviction.observations
        self._unjudged = False
        for key in list(self.record.pending):
            self._look(key)

    def _look(self, key: int, *, at_last: bool = False) -> None:
        prefetched = self.record.pending[key]
        waited = self._waited_still(prefetched)
        if waited is None and not at_last:
            self._unjudged = True
            return
        clock = int(self._eviction.clocks()[key // self._num_experts])
        if self.record.look(key, self._eviction.total(key), clock, self._eviction.workers):
            self._gone_for.pop(prefetched.victim, None)
            saved = prefetched.load_seconds * self._share_saved(key) - (waited or 0.0)
            self.balance.saved(prefetched.predictor, prefetched.load_seconds, max(saved, 0.0))
            self.balance.spent(prefetched.predictor, -prefetched.load_cpu, self.spare.load_seconds)

    def _waited_still(self, prefetched: Prefetched) -> float | None:
        """How long workers went on waiting that waited when a load had ended; None if one has not counted that yet."""
        longest = 0.0
        for lane, before in prefetched.waiters:
            waited = self._usage.waited(lane) - before
            if not waited:
                return None
            longest = max(longest, waited)
        return longest

    def _share_saved(self, key: int) -> float:
        """What part of a load a prefetch has saved whose expert was used: demands of the same token run beside it."""
        layer, expert = divmod(key, self._num_experts)
        at, misses = self._demands.get(layer, (0, 0))
        used_at = high32(read_word(self._tables.address + self._tables.layout.affinity(layer, expert)))
        if not misses or min((used_at - at) & LOW32, (at - used_at) & LOW32) >= self._eviction.workers:
            return 1.0
        return max((misses + 1) / self._threads, 1.0) - max(misses / self._threads, 1.0)

    def waited(self, lanes: Iterable[int]) -> Waits:
        """How long some lanes that wait have waited for loads before; from any thread."""
        return tuple((lane, self._usage.waited(lane)) for lane in lanes)

    def loaded(self, key: int, seconds: float, now: float, *, demanded: bool, waiting: Waits = ()) -> None:
        """Note that a load ended, demanded or not, and what `waited` told of the lanes that waited for it just before
        it was published: some part it has not saved.
        """
        self.spare.loaded(seconds, now, demanded=demanded)
        if key in self.record:
            self.record.loaded(key, seconds)
            self._unjudged = True
            prefetched = self.record.pending[key]
            prefetched.load_cpu = self._usage.load_cpu
            if prefetched.predictor != Predictor.HINT:
                prefetched.waiters = waiting
            self.balance.spent(prefetched.predictor, prefetched.load_cpu, self.spare.load_seconds)

    def demanded(self, key: int) -> None:
        """Note that an expert is demanded that is not there."""
        if self._budget:
            layer = key // self._num_experts
            clock = read_word(self._tables.address + self._tables.layout.clock + layer * LINE) & LOW32
            at, misses = self._demands.get(layer, (clock, 0))
            self._demands[layer] = clock, misses + 1 if at == clock else 1
        predictor, came = self._gone_for.pop(key, (-1, -1))
        if predictor >= 0:
            share = 1.0 if came in self.record else GONE_ANYWAY
            self.balance.cost(predictor, share * self.spare.load_seconds)
            self.balance.spent(predictor, share * self._usage.load_cpu, self.spare.load_seconds)

    def delayed(self, key: int, seconds: float) -> None:
        """Note that a demand waited so long for the end of a load; nothing if that was no prefetch."""
        prefetched = self.record.pending.get(key)
        if prefetched is not None:
            self.balance.cost(prefetched.predictor, seconds)

    def overtaken(self, key: int) -> None:
        """Note that an expert is demanded whose load has not begun; nothing if it was no prefetch."""
        if key in self.record:
            self.record.overtaken(key)

    def cancelled(self, key: int) -> None:
        """Note that an expert will not be loaded, or could not; nothing if it was no prefetch."""
        if key in self.record:
            self.record.cancelled(key)

    def evicted(self, key: int) -> None:
        """Note that an expert went, after `Eviction.observe`; nothing if it was no prefetch, or was used."""
        if key in self.record:
            self._look(key, at_last=True)
        if key in self.record:
            self.record.evicted(key)
