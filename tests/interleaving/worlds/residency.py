"""The bitmap against the words: two I/O threads of a pager that publish, while its main thread rebuilds and evicts.

At first expert 0 is LOADING, in the thread that publishes it, and expert 1 is REQUESTED, with a bit that a dead pager
left behind. The main thread rebuilds the bitmap and evicts expert 0, if that is there; the other thread loads expert 1,
then expert 0 once more, if that was evicted.

Checked: afterwards each bit says what its expert's word says; after the pager's death, once it was rebuilt.
"""

from __future__ import annotations

from shmroute.shared.atomic import WORD
from shmroute.shared.experts import begin_load, evict, publish, rebuild_bitmap, request_expert_word
from shmroute.shared.words import LOADING, REQUESTED, RESIDENT, URGENT, expert_state, pack_expert

from ..ground import ground
from ..simulation import Simulation, require
from ..world import World
from .paging import settings

EXPERTS = 2


class Residency(World):
    title = "I/O threads that publish, a main thread that evicts and rebuilds"
    config = settings(experts=EXPERTS, slots=2, workers=1, io_threads=2)
    lock_free = True

    def populate(self, simulation: Simulation) -> None:
        self._simulation = simulation
        segment = self._segment = ground(self.config)
        layout = segment.layout
        self._words, self._row = segment.address + layout.experts, segment.address + layout.resident
        segment.write(layout.experts, pack_expert(LOADING, 0, 0, 0))
        segment.write(layout.experts + WORD, pack_expert(REQUESTED, URGENT, 0, 0))
        segment.write(layout.resident, 0b10)
        self._evicted = False
        simulation.process("pager", self._main)

    def _main(self) -> None:
        thread = self._simulation.current
        assert thread is not None
        self._simulation.thread(thread.process, self._publish_first, "first")
        self._simulation.thread(thread.process, self._load_others, "second")
        rebuild_bitmap(self._words, self._row, EXPERTS)
        if evict(self._words, self._row, 0, 0):
            request_expert_word(self._words, self._segment.address + self._segment.layout.failures, URGENT)
            self._evicted = True
        rebuild_bitmap(self._words, self._row, EXPERTS)

    def _publish_first(self) -> None:
        publish(self._words, self._row, 0, 0)

    def _load_others(self) -> None:
        begin_load(self._words + WORD, 1)
        publish(self._words + WORD, self._row, 1, 1)
        if self._evicted and begin_load(self._words, 0):
            publish(self._words, self._row, 0, 0)

    def check(self, simulation: Simulation) -> None:
        if simulation.deaths_left < self.deaths:
            rebuild_bitmap(self._words, self._row, EXPERTS)
        words = [self._segment.read(self._segment.layout.experts + expert * WORD) for expert in range(EXPERTS)]
        expected = sum((expert_state(word) == RESIDENT) << expert for expert, word in enumerate(words))
        bits = self._segment.read(self._segment.layout.resident)
        require(bits == expected, f"the bitmap says {bits:b}, the words say {expected:b}")
