"""The ring: producers and consumers on very few entries, from different laps, any of them dying at any step.

Checked: linearizable as a bounded queue (so FIFO, no loss, no duplicate, FULL and EMPTY only when true), with what the
dead did as may-have-happened; and afterwards the survivors find a ring that works, whatever the dead left behind.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import Any, ClassVar

from shmroute.config import RuntimeConfig
from shmroute.shared.atomic import WORD, signed, store
from shmroute.shared.layout import RING_ENTRIES, RING_HEAD, RING_TAIL
from shmroute.shared.ring import EMPTY, FULL, PUSHED, pop, push, ring_has_work
from shmroute.shared.words import LOW32

from ..ground import ground
from ..histories import History
from ..simulation import Simulation, require
from ..world import World

CONFIG = RuntimeConfig(num_layers=1, num_experts=2, top_k=1, expert_bytes=64, slots=1, max_workers=2)


def bounded_queue(capacity: int, state: Hashable, operation: str, arguments: tuple[Any, ...]) -> tuple[Hashable, Any]:
    """The sequential model."""
    assert isinstance(state, tuple)
    match operation:
        case "push":
            return ((*state, arguments[0]), PUSHED) if len(state) < capacity else (state, FULL)
        case "pop":
            return (state[1:], state[0]) if state else (state, EMPTY)
        case _:
            return state, bool(state)


def empty_ring(ring: int, bits: int, position: int) -> None:
    """Make an empty ring whose next position is `position`, every entry one lap behind the position it waits for."""
    size = 1 << bits
    for next_use in range(position, position + size):
        entry = ring + RING_ENTRIES + (next_use & (size - 1)) * WORD
        store(entry, signed((((next_use >> bits) - 1) & LOW32) << 32))
    store(ring + RING_HEAD, position)
    store(ring + RING_TAIL, position)


class Ring(World):
    """What the processes do is in `programs`: requests to push, None to pop, "?" to ask whether there is work."""

    bits: ClassVar[int] = 1
    start: ClassVar[int] = 2
    lock_free = True
    programs: ClassVar[tuple[tuple[int | str | None, ...], ...]]

    def populate(self, simulation: Simulation) -> None:
        segment = ground(CONFIG)
        self._ring = segment.address + segment.layout.ring
        empty_ring(self._ring, self.bits, self.start)
        self._history = History(simulation)
        for number, program in enumerate(self.programs):
            simulation.process(f"process {number}", partial(self._follow, program))

    def _follow(self, program: tuple[int | str | None, ...]) -> None:
        for step in program:
            if step is None:
                self._history.call("pop", pop, self._ring, self.bits)
            elif step == "?":
                self._history.call("has work", ring_has_work, self._ring, self.bits)
            else:
                self._history.call("push", push, self._ring, self.bits, step, shown=(step,))

    def check(self, simulation: Simulation) -> None:
        model = partial(bounded_queue, 1 << self.bits)
        self._history.check(model, ())
        # Whatever was left behind, whoever comes later can empty, fill and use the ring.
        left = []
        while (request := pop(self._ring, self.bits)) != EMPTY:
            left.append(request)
            require(len(left) <= 1 << self.bits, "the ring holds more than it has entries")
        pushed = [push(self._ring, self.bits, 1000 + i) for i in range((1 << self.bits) + 1)]
        require(pushed == [PUSHED] * (1 << self.bits) + [FULL], f"an emptied ring took {pushed}")
        taken = [pop(self._ring, self.bits) for _ in range(1 << self.bits)]
        require(taken == [1000 + i for i in range(1 << self.bits)], f"and gave {taken}")
        pushes = sorted(call.arguments[0] for call in self._history.calls if call.result == PUSHED and call.arguments)
        pops = [
            call.result for call in self._history.calls if call.operation == "pop" and call.result not in (None, EMPTY)
        ]
        pending = [c for c in self._history.calls if c.result is None]
        if not pending:
            require(pushes == sorted(pops + left), f"pushed {pushes}, taken {pops}, left {left}")


class RingPair(Ring):
    title = "a producer and a consumer on two entries"
    programs = ((1, 2, 3), (None, None))


class RingTwoProducers(Ring):
    title = "two producers and a consumer on two entries"
    programs = ((1, 2), (3, 4), (None, None))
    deaths = 2


class RingTwoConsumers(Ring):
    title = "a producer and two consumers, which may starve"
    programs = ((1, 2), (None, None), (None, "?"))
    deaths = 2


class RingOfOne(Ring):
    title = "three processes that push and pop on a ring of one entry, across the lap 2^32"
    bits = 0
    start = (1 << 32) - 2
    programs = ((1, None), (2, None), (3, None))
    deaths = 2


class RingLaps(Ring):
    title = "producers and a consumer across the lap 2^31"
    start = ((1 << 31) - 1) * 2 + 1
    programs = ((1, None, 2), (3, 4), (None, None))
