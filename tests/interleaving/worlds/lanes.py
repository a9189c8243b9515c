"""Lanes: more processes than lanes, one of which the dead may keep; attaching reaps when there is no pager to do it.

Checked: a lane never has two living workers; a living worker's lease is never cleared by somebody else; nobody is
refused while a lane belongs to the dead; afterwards every lane is free and clean.
"""

from __future__ import annotations

from typing import ClassVar

from shmroute.attachment import Lane
from shmroute.errors import NoWorkerLane
from shmroute.pager.reaper import Reaper
from shmroute.pager_lock import PagerLock
from shmroute.runtime import Runtime
from shmroute.shared.layout import LANE_IDENTITY
from shmroute.shared.words import LIVE, RESIDENT, expert_mask, pack_expert, pack_identity

from ..host import step
from ..simulation import NO_PID, SimProcess, Simulation, require
from .paging import SOON, Paging, settings


class Lanes(Paging):
    """Each worker attaches, leases the resident expert for a few steps, and leaves."""

    title = "three workers for two lanes, any of them dying; whoever finds no lane reaps"
    config = settings(experts=1, slots=1, workers=2)
    workers: ClassVar[int] = 3
    reapers: ClassVar[int] = 0
    rounds: ClassVar[int] = 2
    inherited: ClassVar[bool] = False
    shard = 1
    deaths = 2
    step_bound = 20_000

    def populate(self, simulation: Simulation) -> None:
        real = self._stand()
        real.write(real.layout.experts, pack_expert(RESIDENT, 0, 0, 0))
        real.write(real.layout.resident, 1)
        if self.inherited:
            lane = real.layout.lane(0)
            real.write(lane + LANE_IDENTITY, pack_identity(LIVE, 0, 1, NO_PID))
            real.write(real.layout.experts, pack_expert(RESIDENT, 0, 0, 1))
        self._holders: dict[int, SimProcess] = {}
        self._workers = [simulation.process(f"worker {n}", self._visit) for n in range(self.workers)]
        for number in range(self.reapers):
            simulation.process(f"reaper {number}", self._reap, mortal=False)

    def _visit(self) -> None:
        process = self._host.here()
        runtime, lane = self._attached()
        holder = self._holders.get(lane.number)
        require(holder is None or not holder.alive, f"lane {lane.number} has {holder} and {process}")
        self._holders[lane.number] = process
        with runtime.expert(0, 0):
            for _ in range(3):
                step()
                mask = expert_mask(self._word(self._segment.layout.experts))
                require(mask & lane.bit, f"the lease of {process} was cleared: {mask:b}")
        del self._holders[lane.number]
        runtime.close()

    def _attached(self) -> tuple[Runtime, Lane]:
        while True:
            others = sum(not worker.done for worker in self._workers) - 1
            runtime = Runtime(self._segment, owner=False)
            try:
                return runtime, runtime._attachment.lane()
            except NoWorkerLane:
                require(others >= self.config.max_workers, f"refused a lane, beside {others} others")
                runtime.close()
                self._simulation.sleep(SOON)

    def _reap(self) -> None:
        reaper = Reaper(self._segment)
        for _ in range(self.rounds):
            with PagerLock(self._segment) as lock:
                if lock.try_acquire():
                    reaper.reap()

    def check(self, simulation: Simulation) -> None:
        with PagerLock(self._segment) as lock:
            require(lock.try_acquire(), "the pager's lock is held by nobody living")
            Reaper(self._segment).reap()
        require(self._quiet(), f"left: {self._lanes()}")
        require(not expert_mask(self._word(self._segment.layout.experts)), "a lease was left")


class LanesInherited(Lanes):
    title = "a lane and a lease of a worker that died before, two reapers, and a worker that comes"
    config = settings(experts=1, slots=1, workers=1)
    workers = 1
    reapers = 2
    inherited = True
    deaths = 0


class LanesReaped(Lanes):
    title = "two workers that have the only lane after each other, and a reaper"
    config = settings(experts=1, slots=1, workers=1)
    workers = 2
    reapers = 1
    deaths = 1
