"""Metrics: counters and histograms lose nothing and invent nothing, whoever dies, leaves or takes over a lane.

Two processes share one lane after each other, and a third reads all the while. Each counts in its lane's shard what it
does, by the kernels that the runtime counts with.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from shmroute.attachment import Lane
from shmroute.errors import NoWorkerLane
from shmroute.metrics import read_metrics
from shmroute.runtime import Runtime
from shmroute.shared.metrics import LaneCounter, add

from ..simulation import Simulation, require
from .paging import SOON, Paging, settings


class Metrics(Paging):
    """Each worker attaches and counts TOKENS, each amount in `counts` in a thread of its own."""

    title = "workers that count, die and take over lanes, and one that reads"
    config = settings(experts=1, slots=1, workers=2)
    counts: ClassVar[tuple[tuple[int, ...], ...]] = ((1, 2), (4, 8), (16, 32))
    reads: ClassVar[int] = 3
    deaths = 2
    step_bound = 60_000

    def populate(self, simulation: Simulation) -> None:
        self._stand()
        self._begun = self._counted = 0
        self._begun_by: dict[int, int] = {}
        self._workers = [simulation.process(f"worker {n}", partial(self._count, c)) for n, c in enumerate(self.counts)]
        simulation.process("reader", self._read, mortal=False)

    def _count(self, amounts: tuple[int, ...]) -> None:
        while True:
            runtime = Runtime(self._segment, owner=False)
            try:
                lane = runtime._attachment.lane()
                break
            except NoWorkerLane:
                runtime.close()
                self._simulation.sleep(SOON)
        process = self._host.here()
        threads = [
            self._simulation.thread(process, partial(self._add, lane, process.pid, amount), f"adds {amount}")
            for amount in amounts
        ]
        self._simulation.wait(lambda: all(thread.finished for thread in threads))
        worker = next(w for w in read_metrics(self._segment).workers if w.lane == lane.number)
        own = worker.counters["tokens"]
        require(own == sum(amounts), f"a worker that counted {sum(amounts)} has {own}")
        runtime.close()

    def _add(self, lane: Lane, pid: int, amount: int) -> None:
        self._begun += amount
        self._begun_by[pid] = self._begun_by.get(pid, 0) + amount
        add(lane.counter(LaneCounter.TOKENS), amount)
        self._counted += amount

    def _read(self) -> None:
        former = 0
        for _ in range(self.reads):
            least = self._counted
            metrics = read_metrics(self._segment)
            total = metrics.total.counters["tokens"]
            for worker in metrics.workers:
                most, own = self._begun_by.get(worker.pid or 0, 0), worker.counters["tokens"]
                require(own <= most, f"a worker that counted {most} is said to have {own}")
            require(least <= total <= self._begun, f"counted {least} to {self._begun}, read {total}")
            require(total >= former, f"a total fell from {former} to {total}")
            former = total

    def check(self, simulation: Simulation) -> None:
        total = read_metrics(self._segment).total.counters["tokens"]
        require(self._counted <= total <= self._begun, f"counted {self._counted} to {self._begun}, read {total}")
        if simulation.deaths_left == self.deaths:
            require(total == self._counted, f"counted {self._counted}, read {total}")


class MetricsHandedOver(Metrics):
    title = "two workers that have the only lane after each other, and one that reads"
    config = settings(experts=1, slots=1, workers=1)
    counts = ((1,), (16,))
