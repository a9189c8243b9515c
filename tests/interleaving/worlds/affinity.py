"""Affinity under concurrency: batches whose ticks overlap, at and away from the ticks where a layer is restamped.

Every step of the clock and every successful CAS of an affinity word is seen as it happens, with the batch that it
belongs to: a step of n ticks is a batch of the next n tokens that its worker routed and has not published. Checked, of
each CAS:

- in clock order, the word becomes exactly what the sequential rule makes of it, tick by tick;
- a late batch makes it the clamped sum of the old score and of the batch's own worth, each decayed by what it lacks: so
  it is below neither, and nothing decays twice;
- a restamp only decays.

So without an activation no score rises (INV-2). And at the end: each batch of a survivor reached each of its words
once, activations and the clock lost nothing and invented nothing, a survivor has published every token once and the
dead lack no more than they may put off and their last call, and after a crossing that its worker survived no word is
old.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import numpy as np

from shmroute.config import AffinityConfig, RouterConfig, RuntimeConfig
from shmroute.routing import plan_words as p
from shmroute.routing.plan import Plan, Turns
from shmroute.routing.publication import publish_and_leave
from shmroute.routing.route import route_rows
from shmroute.shared import atomic
from shmroute.shared.affinity import power_table
from shmroute.shared.atomic import WORD
from shmroute.shared.layout import USE_BYTES
from shmroute.shared.words import LOW32, RESTAMP_BITS, SCORE_ONE, high32, low32, pack_affinity

from ..ground import ground
from ..machine import Memory
from ..simulation import Simulation, require
from ..world import World

ULP = 1.5 / SCORE_ONE
"""A score is rounded to 1 / SCORE_ONE at each CAS, down by a restamp."""


FLOAT = 1e-12
"""Powers are computed here otherwise than from the table."""


@dataclass
class Batch:
    """Tokens that a worker published together: the expert of each, and the first of their ticks."""

    worker: int
    experts: tuple[int, ...]
    start: int
    reached: list[int] = field(default_factory=list)

    @property
    def end(self) -> int:
        return self.start + len(self.experts)

    def applied(self, expert: int, score: float, rule: AffinityConfig) -> float:
        """The sequential rule, from the batch's first tick to its end."""
        for chosen in self.experts:
            score *= rule.decay
            if chosen == expert:
                score = min(rule.max_score, score + rule.activation_boost)
        return score


class Watched(Memory):
    """Memory that tells of every change of some words."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(simulation)
        self.world: Affinity | None = None

    def cas(self, address: int, expected: int, desired: int) -> bool:
        done = super().cas(address, expected, desired)
        if done and self.world is not None:
            self.world.swapped(int(address), int(expected), int(desired))
        return done

    def fetch_add(self, address: int, value: int) -> int:
        former = super().fetch_add(address, value)
        if self.world is not None:
            self.world.added(int(address), former, int(value))
        return former


def settings(decay: float, boost: float, max_score: float) -> RuntimeConfig:
    """Settings for routing by affinity alone."""
    return RuntimeConfig(
        num_layers=1, num_experts=3, top_k=1, expert_bytes=64, slots=1, max_workers=3,
        router=RouterConfig(cache_bonus=0, metrics=False), affinity=AffinityConfig(decay, boost, max_score),
    )  # fmt: skip


class Affinity(World):
    """Each process routes the batches in `programs`: for each batch, the expert of each token."""

    title = "three workers that route batches of one layer"
    config: ClassVar[RuntimeConfig] = settings(0.75, 0.0625, 0.875)
    programs: ClassVar[tuple[tuple[tuple[int, ...], ...], ...]] = (((0, 1, 0),), ((0,), (1,)), ((0, 0),))
    start: ClassVar[int] = 100
    initial: ClassVar[tuple[float, ...]] = (0.8, 0.0, 0.8)
    age: ClassVar[int] = 1
    put_off: ClassVar[int] = 0  # tokens that a worker may keep to itself
    memory = Watched
    deaths = 2
    lock_free = True

    def populate(self, simulation: Simulation) -> None:
        segment = self._segment = ground(self.config)
        layout, base = segment.layout, segment.address
        self._simulation = simulation
        self._rule = self.config.affinity
        self._powers = power_table(self._rule.decay)
        self._row, self._clock = base + layout.use_row(0), base + layout.clock
        segment.write(layout.clock, self.start)
        for expert, score in enumerate(self.initial):
            tick = self.start - self.age
            segment.write(layout.affinity(0, expert), pack_affinity(tick & LOW32, round(score * SCORE_ONE)))
        self._batches: list[Batch] = []
        self._unpublished: list[list[int]] = [[] for _ in self.programs]
        self._longest_call = max(len(experts) for program in self.programs for experts in program)
        self._ended: set[int] = set()
        self._workers: dict[str, int] = {}
        self._plans = [Plan(segment, 0, lane, self._powers.ctypes.data, Turns(1)) for lane in range(len(self.programs))]
        for number, program in enumerate(self.programs):
            simulation.process(f"worker {number}", partial(self._follow, number, program))
        machine = atomic._machine
        assert isinstance(machine, Watched)
        machine.world = self

    def _follow(self, number: int, program: tuple[tuple[int, ...], ...]) -> None:
        plan = self._plans[number]
        plan.words[p.MOST_PENDING] = self.put_off
        assert self._simulation.current is not None
        self._workers[self._simulation.current.letter] = number
        for experts in program:
            logits = np.zeros((len(experts), self.config.num_experts), np.float32)
            logits[np.arange(len(experts)), experts] = 1.0
            chosen, weights = np.empty((len(experts), 1), np.int32), np.empty((len(experts), 1), np.float32)
            self._unpublished[number].extend(experts)
            code = route_rows(plan.address, logits, chosen, weights)
            require(code >= 0, f"routing refused with {code}")
            late = len(self._unpublished[number])
            require(late < max(self.put_off, 1), f"worker {number} has put off {late} tokens")
        publish_and_leave(plan.address, p.CLOSED)
        self._ended.add(number)

    # ------------------------------------------------------ what the memory tells

    def added(self, address: int, former: int, value: int) -> None:
        """A step of the clock gives a batch its ticks."""
        if address == self._clock and self._simulation.current is not None:
            worker = self._workers[self._simulation.current.letter]
            tokens = self._unpublished[worker]
            require(value <= len(tokens), f"worker {worker} took {value} ticks for {len(tokens)} tokens")
            self._batches.append(Batch(worker, tuple(tokens[:value]), former))
            del tokens[:value]

    def swapped(self, address: int, old: int, new: int) -> None:
        """One CAS of an affinity word."""
        expert = (address - self._row) // USE_BYTES
        if not 0 <= expert < self.config.num_experts or self._simulation.current is None:
            return
        worker = self._workers[self._simulation.current.letter]
        batch = next(batch for batch in reversed(self._batches) if batch.worker == worker)
        clock = self._segment.layout.clock
        now = int.from_bytes(self._segment.buffer[clock : clock + WORD], "little")
        before, after = (now - ((now - high32(word)) & LOW32) for word in (old, new))
        was, score = low32(old) / SCORE_ONE, low32(new) / SCORE_ONE
        decay = self._rule.decay
        decayed = was * decay ** (after - before)
        what = f"expert {expert}, {batch}: {was} at {before} became {score} at {after}"
        require(after >= before, f"{what}: time went back")
        if expert not in batch.experts or expert in batch.reached:
            require(decayed - ULP <= score <= decayed + FLOAT, f"{what}: a restamp makes it {decayed}")
            return
        batch.reached.append(expert)
        if before <= batch.start:
            expected = batch.applied(expert, was * decay ** (batch.start - before), self._rule)
            require(after == batch.end and abs(score - expected) <= ULP, f"{what}: in clock order it is {expected}")
            return
        worth = batch.applied(expert, 0.0, self._rule) * decay ** (after - batch.end)
        require(after == max(before, batch.end), f"{what}: not the later of both ticks")
        total = min(self._rule.max_score, decayed + worth)
        require(abs(score - total) <= ULP, f"{what}: neither part decays twice, so it is {total}")

    # ------------------------------------------------------ the end

    def check(self, simulation: Simulation) -> None:
        layout = self._segment.layout
        clock = self._segment.read(layout.clock)
        ticks = sum(len(batch.experts) for batch in self._batches)
        require(clock == self.start + ticks, f"the clock moved by {clock - self.start}, the batches took {ticks}")
        starts = sorted((batch.start, batch.end) for batch in self._batches)
        require(all(a[1] == b[0] for a, b in itertools.pairwise(starts)), f"ticks overlap: {starts}")
        for worker, tokens in enumerate(self._unpublished):
            most = 0 if worker in self._ended else max(self.put_off - 1, 0) + self._longest_call
            require(len(tokens) <= most, f"worker {worker} never published {tokens}")
        done = [batch for batch in self._batches if batch.worker in self._ended]
        for batch in done:
            require(sorted(batch.reached) == sorted(set(batch.experts)), f"{batch} did not reach all of its experts")
        for expert in range(self.config.num_experts):
            counted = self._segment.read(layout.activations(0, expert))
            sure = sum(batch.experts.count(expert) for batch in done)
            most = sum(batch.experts.count(expert) for batch in self._batches)
            require(sure <= counted <= most, f"expert {expert} was activated {sure} to {most} times, counted {counted}")
            word = self._segment.read(layout.affinity(0, expert))
            age = (clock - high32(word)) & LOW32
            crossed = self.start >> RESTAMP_BITS != clock >> RESTAMP_BITS
            if crossed and simulation.deaths_left == self.deaths:
                require(age <= ticks, f"expert {expert} was not restamped: it is {age} ticks old")


class AffinityClamped(Affinity):
    title = "batches that reach the largest score and decay from there"
    config = settings(0.5, 0.375, 0.5)
    programs = (((0, 1, 0, 0, 1),), ((0, 1),), ((0, 0, 0), (1,)))
    initial = (0.5, 0.2, 0.0)


class AffinityPutOff(Affinity):
    title = "two workers that put tokens off while they share a layer, and one that routes a batch"
    programs = (((0,), (1,), (0,), (0,), (1,)), ((0,), (0,), (2,), (0, 1, 0)), ((0, 1),))
    put_off = 3


class AffinityRestamped(Affinity):
    title = "the same across 2^28, with words as old as they may be"
    start = (1 << RESTAMP_BITS) - 2
    age = (1 << RESTAMP_BITS) - 3
    initial = (0.8, 0.5, 0.8)


class AffinityWrapped(Affinity):
    title = "the same across 2^32, where ticks begin anew"
    start = (1 << 32) - 2
    age = 3


class AffinityHalf(Affinity):
    title = "the same across 2^31"
    start = (1 << 31) - 3
    age = 40
