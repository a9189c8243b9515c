"""Workers, leases and a pager: the runtime's own Python over the real kernels, from the request to the release.

Checked in every run:

- bytes under a lease are the expert's, from its first half to its second with any number of steps in between (INV-1):
  no load becomes visible half-done, nothing is evicted under a lease;
- what the pager knows to be awaited is not evicted;
- every survivor's work is done, within its timeout;
- afterwards no lease, wait word, lane, request or half-done load is left; no slot is named twice; the bitmap says what
  the words say;
- when nobody dies and no wait is cut short, nobody ever waits for a timeout: no wake-up is lost.
"""

from __future__ import annotations

import dataclasses
import errno
import os
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

import shmroute.metrics
import shmroute.shared.lanes
import shmroute.shared.metrics
from shmroute.config import PagerConfig, RuntimeConfig
from shmroute.errors import ExpertLoadError, ExpertTimeout
from shmroute.pager.daemon import Pager
from shmroute.pager_lock import PagerLock
from shmroute.runtime import Runtime
from shmroute.shared.atomic import WORD
from shmroute.shared.layout import LANE_IDENTITY, LANE_WAIT
from shmroute.shared.metrics import LANE_COUNTERS, PAGER_HISTOGRAM
from shmroute.shared.segment import Segment
from shmroute.shared.words import (
    LOADING,
    NOBODY,
    REQUESTED,
    RESIDENT,
    expert_mask,
    expert_slot,
    expert_state,
    identity_state,
)
from shmroute.sources import SourceSpec

from ..ground import ground
from ..host import Host, step
from ..machine import StoreBuffers
from ..simulation import SimProcess, Simulation, Violation, require
from ..world import World

EXPERT_BYTES = 64
TIMEOUT = 5.0
STANDBY_POLL = 0.05
TRIES = 50
SOON = 1e-5
"""Simulated seconds until another try, some ten steps: a longer sleep ends when all others wait."""


def pattern(expert: int, half: int) -> bytes:
    """What half an expert's bytes are."""
    return bytes([16 * (expert + 1) + half]) * (EXPERT_BYTES // 2)


class SteppedSource:
    """A source whose reads take two steps, so that a load can be seen half-done by whoever should not."""

    geometry = SimpleNamespace(fingerprint="")

    def gate(self, layer: int) -> npt.NDArray[np.float32]:
        raise NotImplementedError("nobody routes by this source")

    def gate_bias(self, layer: int) -> npt.NDArray[np.float32]:
        raise NotImplementedError("nobody routes by this source")

    def correction_bias(self, layer: int) -> npt.NDArray[np.float32]:
        raise NotImplementedError("nobody routes by this source")

    @property
    def spec(self) -> SourceSpec:
        return SourceSpec(f"{__name__}:SteppedSource", {})

    def read_into(
        self, layer: int, expert: int, buffer: memoryview, filled: Callable[[int, int], object] | None = None
    ) -> None:
        for half in range(2):
            step()
            begin, end = half * EXPERT_BYTES // 2, (half + 1) * EXPERT_BYTES // 2
            buffer[begin:end] = pattern(expert, half)
            if filled is not None:
                filled(begin, end)

    def drop_page_cache(self, layer: int, expert: int) -> None:
        """There are no files."""

    def location(self, layer: int, expert: int) -> str:
        return f"stepped:{layer}:{expert}"

    def close(self) -> None:
        """There is nothing to release."""


class FailingSource(SteppedSource):
    """A source that fails at the first read of each expert.

    Parameters
    ----------
    read : set of int
        Experts that have been read before, by whichever pager.
    """

    def __init__(self, read: set[int]) -> None:
        self._read = read

    def read_into(
        self, layer: int, expert: int, buffer: memoryview, filled: Callable[[int, int], object] | None = None
    ) -> None:
        if expert not in self._read:
            step()
            buffer[: EXPERT_BYTES // 2] = bytes(EXPERT_BYTES // 2)
            self._read.add(expert)
            raise OSError(errno.EIO, "injected")
        super().read_into(layer, expert, buffer, filled)


class Borrowed:
    """The mapping of a ground, which outlives those who use it."""

    def __init__(self, real: Any) -> None:
        self.buf = real.buf

    def close(self) -> None:
        """It stays."""


def settings(experts: int, slots: int, workers: int, io_threads: int = 1, layers: int = 1) -> RuntimeConfig:
    """Settings of a small runtime that can page."""
    return RuntimeConfig(
        num_layers=layers, num_experts=experts, top_k=1, expert_bytes=EXPERT_BYTES, slots=slots, max_workers=workers,
        pager=PagerConfig(io_threads=io_threads, prefetch=0), source=SourceSpec(f"{__name__}:SteppedSource", {}),
    )  # fmt: skip


class Paging(World):
    """What each worker demands is in `demands`; inner tuples are handed out by one `Runtime.experts`."""

    config: ClassVar[RuntimeConfig]
    demands: ClassVar[tuple[tuple[int | tuple[int, ...], ...], ...]]
    shard: ClassVar[int] = LANE_COUNTERS
    pagers: ClassVar[int] = 1
    mortal_workers: ClassVar[bool] = True
    step_bound = 60_000

    def install(self, simulation: Simulation) -> Callable[[], None]:
        self._simulation = simulation
        self._host = Host(simulation)
        remove = self._host.install()
        # Whoever frees a lane copies its shard, counters and histograms, word by word. The counters suffice here: the
        # histograms, which are the same to the code, would be nearly all steps of a run.
        shortened = (
            (shmroute.shared.lanes, "LANE_SHARD_WORDS", self.shard),
            (shmroute.metrics, "LANE_SHARD_WORDS", self.shard),
            (shmroute.metrics, "PAGER_SHARD_WORDS", PAGER_HISTOGRAM),
        )
        for module, name, count in shortened:
            setattr(module, name, count)

        def put_back() -> None:
            for module, name, _ in shortened:
                setattr(module, name, getattr(shmroute.shared.metrics, name))
            remove()

        return put_back

    def populate(self, simulation: Simulation) -> None:
        self._stand()
        self._timeouts_of_work = 0
        self._pager: Pager
        self._workers: list[SimProcess] = [
            simulation.process(f"worker {number}", partial(self._work, work), mortal=self.mortal_workers)
            for number, work in enumerate(self.demands)
        ]
        pagers = [simulation.process(f"pager {n}", self._page, mortal=self.pagers > 1) for n in range(self.pagers)]

        def spare_the_last(dead: SimProcess) -> None:
            living = [pager for pager in pagers if pager.alive]
            living[0].mortal = len(living) > 1

        simulation.on_death.append(spare_the_last)

    def _stand(self) -> Segment:
        """Stand on a segment in its first state; the one returned is for changing that, before the run."""
        real = ground(self.config)
        self._segment = dataclasses.replace(real, mapping=Borrowed(real.mapping))  # type: ignore[arg-type]
        self._memory = np.frombuffer(real.buffer, np.int64, real.layout.control_bytes // WORD)
        return real

    # ------------------------------------------------------ what the processes do

    def _work(self, demands: tuple[int | tuple[int, ...], ...]) -> None:
        runtime = Runtime(self._segment, owner=False)
        for demand in demands:
            self._demand(runtime, demand)
        runtime.close()
        self._timeouts_of_work = self._simulation.idle_timeouts

    def _demand(self, runtime: Runtime, demand: int | tuple[int, ...]) -> None:
        if isinstance(demand, int):
            with runtime.expert(0, demand, TIMEOUT) as weights:
                self._inspect(runtime, demand, weights.raw)
            return
        seen = []
        for expert, _, _, weights in runtime.experts(0, [[expert] for expert in demand], TIMEOUT):
            self._inspect(runtime, expert, weights.raw)
            seen.append(expert)
        require(sorted(seen) == sorted(set(demand)), f"of {demand}, {seen} were handed out")

    def _inspect(self, runtime: Runtime, expert: int, raw: npt.NDArray[np.uint8]) -> None:
        segment, bit = runtime._attachment.segment, runtime._attachment.lane().bit
        address = segment.layout.experts + expert * WORD
        for half in range(2):
            step()
            word = int.from_bytes(segment.buffer[address : address + WORD], "little")
            require(expert_state(word) == RESIDENT and word & bit, f"there is no lease of expert {expert}: {word:#x}")
            found = raw[half * EXPERT_BYTES // 2 : (half + 1) * EXPERT_BYTES // 2].tobytes()
            require(found == pattern(expert, half), f"under a lease of expert {expert}: {found[0]:#x}, half {half}")

    def _page(self) -> None:
        with PagerLock(self._segment) as lock:
            while not lock.try_acquire():
                if self._quiet():
                    return
                self._simulation.sleep(STANDBY_POLL)
            pager = self._pager = Pager(self._segment, self._source())
            self._watch_evictions(pager)
            pager.serve(self._quiet)
            pager.close()

    def _watch_evictions(self, pager: Pager) -> None:
        """Require that no expert goes of which the pager had read that a worker waits for it."""
        slots, take, note = pager._slots, pager._slots.take, pager._slots.when_evicted
        known = np.empty(0, np.int64)

        def taken(awaited: npt.NDArray[np.int64], may_go: Callable[[int], bool] | None = None) -> int | None:
            nonlocal known
            known = awaited
            return take(awaited, may_go)

        def evicted(key: int) -> None:
            require(key not in known, f"expert {key} went although a worker waits for it")
            note(key)

        slots.take, slots.when_evicted = taken, evicted  # type: ignore[method-assign]

    def _source(self) -> SteppedSource:
        return SteppedSource()

    # ------------------------------------------------------ looking, without a step

    def _word(self, offset: int) -> int:
        return int(self._memory[offset // WORD])

    def _experts(self) -> list[int]:
        layout = self._segment.layout
        return [
            self._word(layout.row(layout.experts, layer) + expert * WORD)
            for layer in range(layout.num_layers)
            for expert in range(layout.num_experts)
        ]

    def _lanes(self) -> list[tuple[int, int]]:
        lanes = [self._segment.layout.lane(lane) for lane in range(self.config.max_workers)]
        return [(self._word(lane + LANE_IDENTITY), self._word(lane + LANE_WAIT)) for lane in lanes]

    def _quiet(self) -> bool:
        """Whether all work is done, and all that was left has been cleared away."""
        return (
            all(worker.done for worker in self._workers)
            and all(identity_state(identity) == NOBODY for identity, _ in self._lanes())
            and not any(expert_state(word) in (REQUESTED, LOADING) for word in self._experts())
        )

    # ------------------------------------------------------ the end

    def check(self, simulation: Simulation) -> None:
        for worker in self._workers:
            require(worker.done, f"{worker} is not done")
        require(self._quiet(), f"left: {self._experts()}, {self._lanes()}")
        require(not any(wait for _, wait in self._lanes()), "a wait word was left")
        words = self._experts()
        require(not any(expert_mask(word) for word in words), f"a lease was left: {[hex(word) for word in words]}")
        slots = [expert_slot(word) for word in words if expert_state(word) == RESIDENT]
        require(len(set(slots)) == len(slots), f"a slot has two experts: {slots}")
        require(all(slot < self.config.slots for slot in slots), f"no such slot: {slots}")
        free = self._pager._slots._free
        require(sorted(free + slots) == list(range(self.config.slots)), f"slots {slots} are used, {free} are free")
        layout = self._segment.layout
        for layer in range(layout.num_layers):
            bits = self._word(layout.resident + layer * layout.resident_row_bytes)
            row = words[layer * layout.num_experts : (layer + 1) * layout.num_experts]
            resident = [expert_state(word) == RESIDENT for word in row]
            require([bool(bits >> e & 1) for e in range(len(row))] == resident, f"the bitmap says {bits:b}: {resident}")
        for expert, word in enumerate(words[: layout.num_experts]):
            if expert_state(word) == RESIDENT:
                start = layout.slot(expert_slot(word))
                held = bytes(self._segment.buffer[start : start + EXPERT_BYTES])
                require(held == pattern(expert, 0) + pattern(expert, 1), f"expert {expert} is not what it should be")
        if simulation.deaths_left == self.deaths and not self.elastic:
            require(self._timeouts_of_work == 0, f"{self._timeouts_of_work} waits for a timeout: a wake-up was lost")


class OneSlot(Paging):
    title = "two workers and one slot for two experts: each load reaches its waiter"
    config = settings(experts=2, slots=1, workers=2)
    demands = ((0, 1), (1, 0))


class Shared(Paging):
    title = "three workers that want the same two experts"
    config = settings(experts=2, slots=2, workers=3)
    demands = ((0,), (1, 0), ((0, 1),))
    deaths = 2


class Crowd(Paging):
    title = "three workers, three experts, two slots, two I/O threads"
    config = settings(experts=3, slots=2, workers=3, io_threads=2)
    demands = (((0, 1, 2),), ((2, 1),), (1, 0))
    deaths = 2


class Overtaking(Paging):
    """What a worker waits for overtakes what is merely at hand, and takes its slot."""

    title = "four experts, two slots, one I/O thread: a load at hand is overtaken or taken back"
    config = settings(experts=4, slots=2, workers=2)
    demands = (((0, 1, 2),), (3,))


class Takeover(Paging):
    title = "a pager that dies at any step, and its standby"
    config = settings(experts=2, slots=2, workers=2)
    demands = ((0,), ((1, 0),))
    pagers = 2
    mortal_workers = False

    def check(self, simulation: Simulation) -> None:
        super().check(simulation)
        states = [expert_state(word) for word in self._experts()]
        require(states == [RESIDENT, RESIDENT], f"without a death both experts are resident; here {states}")


class TakeoverOfOneSlot(Paging):
    title = "pagers and workers that die, with one slot"
    config = settings(experts=2, slots=1, workers=2)
    demands = ((0, 1), ((1, 0),))
    pagers = 2
    deaths = 2


class Threads(Paging):
    """Each demand of the first worker is made by a thread of its own."""

    title = "threads of one process that lease the same expert, and another process"
    config = settings(experts=2, slots=1, workers=2)
    demands = ((0, 0, 1), (1,))

    def _work(self, demands: tuple[int | tuple[int, ...], ...]) -> None:
        runtime = Runtime(self._segment, owner=False)
        process = self._host.here()
        threads = [
            self._simulation.thread(process, partial(self._demand, runtime, demand), f"demand {number}")
            for number, demand in enumerate(demands)
        ]
        self._simulation.wait(lambda: all(thread.finished for thread in threads))
        runtime.close()
        self._timeouts_of_work = self._simulation.idle_timeouts


class OneSlotBuffered(OneSlot):
    title = "two workers and one slot, with store buffers"
    memory = StoreBuffers


class Impatient(Paging):
    """Waits time out at any moment, and are given up."""

    title = "two workers that give up waiting at any moment, and one slot"
    config = settings(experts=2, slots=1, workers=2)
    demands = (((0, 1),), (1, 0))
    elastic = True

    def _demand(self, runtime: Runtime, demand: int | tuple[int, ...]) -> None:
        try:
            super()._demand(runtime, demand)
        except ExpertTimeout:
            return


class Routing(Paging):
    """Workers that only route: nobody waits for what they request."""

    title = "workers that route and do not wait: what they missed is loaded all the same"
    config = settings(experts=3, slots=3, workers=2)
    demands = ((0, 1), (1, 2))

    def _demand(self, runtime: Runtime, demand: int | tuple[int, ...]) -> None:
        logits = np.zeros(self.config.num_experts, np.float32)
        logits[demand] = 1.0
        runtime.router(0).route(logits)

    def check(self, simulation: Simulation) -> None:
        super().check(simulation)
        if simulation.deaths_left == self.deaths:
            states = [expert_state(word) for word in self._experts()]
            require(states == [RESIDENT] * 3, f"what was missed is not there: {states}")


class Hints(Paging):
    """Negative demands are hints: -1 prefetches expert 0, -2 expert 1. What is demanded is paged out first."""

    title = "prefetches and page-outs against demands, leases and cancellation"
    config = dataclasses.replace(
        settings(experts=2, slots=1, workers=2),
        pager=PagerConfig(io_threads=2, prefetch=1, prefetch_stale=1e-6),
    )
    demands = ((0, -2, 0), (-2, 1, -1))

    def _demand(self, runtime: Runtime, demand: int | tuple[int, ...]) -> None:
        assert isinstance(demand, int)
        if demand < 0:
            runtime.prefetch(0, [-demand - 1])
            return
        runtime.page_out(0, demand)
        super()._demand(runtime, demand)


class Failing(Paging):
    """The first read of each expert fails; whoever waited is told, and tries again after the back-off."""

    title = "loads that fail once: whoever waits is told, and gets the expert afterwards"
    config = settings(experts=2, slots=1, workers=2)
    demands = ((0,), (0, 1))
    elastic = True  # whoever tries again sleeps until it may

    def populate(self, simulation: Simulation) -> None:
        self._read: set[int] = set()
        super().populate(simulation)

    def _source(self) -> SteppedSource:
        return FailingSource(self._read)

    def _demand(self, runtime: Runtime, demand: int | tuple[int, ...]) -> None:
        for _ in range(TRIES):
            try:
                return super()._demand(runtime, demand)
            except ExpertLoadError as error:
                require(error.expert == demand and error.expert in self._read, f"{demand} did not fail: {error}")
                require(error.reason == os.strerror(errno.EIO), f"it failed for another reason: {error}")
                self._simulation.sleep(self.config.pager.retry_after)
            except ExpertTimeout:
                continue
        raise Violation(f"expert {demand} never came")
