"""Leases against eviction, nothing else: two experts that take turns in one slot, and workers that read them.

The pager's side is its own account of slots (`shmroute.pager.slots`) and the kernels; there is no waiting, so runs are
short enough for exhaustive search.

Checked: bytes under a lease are the expert's; and the history of leases, releases, evictions and loads is linearizable,
as if each happened at once.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import Any, ClassVar

import numpy as np

from shmroute.pager.slots import Slots
from shmroute.pager.table import ExpertTable
from shmroute.shared.affinity import power_table
from shmroute.shared.atomic import WORD
from shmroute.shared.experts import begin_load, lease, publish, release, request_expert_word
from shmroute.shared.words import LOADING, RESIDENT, URGENT, expert_mask, expert_state, pack_expert

from ..ground import ground
from ..histories import History
from ..simulation import Simulation, require
from ..world import World
from .paging import EXPERT_BYTES, pattern, settings

POWERS = power_table(0.99)
NOBODY_WAITS = np.empty(0, np.int64)


def one_slot(state: Hashable, operation: str, arguments: tuple[Any, ...]) -> tuple[Hashable, Any]:
    """The sequential model: which expert is resident (-1: none), and who leases it."""
    assert isinstance(state, tuple)
    resident, holders = state
    match operation:
        case "lease":
            expert, worker = arguments
            return ((resident, holders | {worker}), 0) if expert == resident else (state, -1)
        case "release":
            return (resident, holders - {arguments[1]}), None
        case "take":
            return (state, None) if holders else ((-1, holders), 0)
        case _:
            return (arguments[0], holders), None


class Leases(World):
    """Workers try to lease the experts in `visits`, one after another, and read what they get."""

    title = "two workers that lease, a pager that evicts"
    config = settings(experts=2, slots=1, workers=2)
    visits: ClassVar[tuple[tuple[int, ...], ...]] = ((0, 1), (1,))
    loads: ClassVar[tuple[int, ...]] = (1, 0)
    lock_free = True

    def populate(self, simulation: Simulation) -> None:
        self._simulation = simulation
        segment = self._segment = ground(self.config)
        layout = segment.layout
        self._words = segment.address + layout.experts
        self._row = segment.address + layout.resident
        segment.write(layout.experts, pack_expert(RESIDENT, 0, 0, 0))
        segment.write(layout.resident, 1)
        self._fill(0, 0)
        self._fill(0, 1)
        table = ExpertTable(segment)
        self._slots = Slots(segment, table, POWERS)
        self._slots.adopt()
        self._history = History(simulation)
        for number, visits in enumerate(self.visits):
            simulation.process(f"worker {number}", partial(self._work, number, visits))
        simulation.process("pager", self._page)

    def _fill(self, expert: int, half: int) -> None:
        start = self._segment.layout.slot(0) + half * EXPERT_BYTES // 2
        self._segment.buffer[start : start + EXPERT_BYTES // 2] = pattern(expert, half)

    def _work(self, lane: int, visits: tuple[int, ...]) -> None:
        for expert in visits:
            word, bit = self._words + expert * WORD, 1 << lane
            slot = self._history.call("lease", lease, word, bit, shown=(expert, lane))
            if slot < 0:
                continue
            for half in range(2):
                self._simulation.point()
                start = self._segment.layout.slot(slot) + half * EXPERT_BYTES // 2
                held = bytes(self._segment.buffer[start : start + EXPERT_BYTES // 2])
                require(held == pattern(expert, half), f"under a lease of expert {expert}: {held[0]:#x}, half {half}")
            self._history.call("release", release, word, bit, shown=(expert, lane))

    def _page(self) -> None:
        for expert in self.loads:
            address = self._words + expert * WORD
            request_expert_word(address, self._segment.address + self._segment.layout.failures + expert * WORD, URGENT)
            slot = self._history.call("take", self._slots.take, NOBODY_WAITS)
            if slot is None:
                continue
            if not begin_load(address, slot):
                self._slots.give_back(slot)
                continue
            self._slots.loading(slot)
            for half in range(2):
                self._simulation.point()
                self._fill(expert, half)
            self._history.call("load", publish, address, self._row, expert, slot, shown=(expert,))
            self._slots.loaded(slot, expert)

    def check(self, simulation: Simulation) -> None:
        self._history.check(one_slot, (0, frozenset()))
        words = [self._segment.read(self._segment.layout.experts + expert * WORD) for expert in range(2)]
        states = [expert_state(word) for word in words]
        require(sum(state in (RESIDENT, LOADING) for state in states) <= 1, f"one slot, two experts: {states}")
        if simulation.deaths_left == self.deaths:
            require(not any(map(expert_mask, words)), f"a lease was left: {words}")
