"""Creating, attaching, removing: segments as files, with everybody dying in the middle.

The folder is a real one in ``/dev/shm``; each process maps the segment for itself. Checked: of several creators one
makes the segment and nobody ever attaches to a half-made one; whatever dies, one of the survivors, or the next who
comes, can remove what is left; and when all have left by themselves, nothing is left.
"""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import ClassVar

from shmroute.errors import SegmentClosingError, SegmentExistsError, SegmentNotFoundError
from shmroute.lifecycle import create_or_reclaim, destroy, reclaim
from shmroute.pager.process import Outcome, run_pager
from shmroute.runtime import Runtime
from shmroute.shared.layout import HEADER_OWNER
from shmroute.shared.removal import is_published, orphans
from shmroute.shared.segment import attach_segment, create_segment
from shmroute.shared.words import LIVE, pack_identity

from ..host import clear_files, files
from ..simulation import NO_PID, SimProcess, Simulation, require
from .paging import SOON, Paging, settings

NAME = "world"
TRIES = 10


class Lifecycle(Paging):
    """A world whose segment is made in the run."""

    config = settings(experts=2, slots=1, workers=2)
    deaths = 2
    step_bound = 30_000

    def install(self, simulation: Simulation) -> Callable[[], None]:
        clear_files()
        return super().install(simulation)

    def _next_user(self, simulation: Simulation) -> None:
        """What the next user of the name does: it can have it; then everything goes."""
        create_or_reclaim(NAME, self.config).close()
        destroy(NAME)
        for path in orphans():
            path.unlink()
        require(not files(), f"left in the folder: {files()}")
        if simulation.deaths_left == self.deaths:  # else they are orphans, which `shmroute doctor` finds
            require(not self._host.semaphores, f"left: {sorted(self._host.semaphores)}")


class Creation(Lifecycle):
    title = "three creators of one name, and one who attaches"
    creators: ClassVar[int] = 3

    def populate(self, simulation: Simulation) -> None:
        self._made: list[str] = []
        for number in range(self.creators):
            simulation.process(f"creator {number}", self._create)
        simulation.process("attaches", self._attach)

    def _create(self) -> None:
        try:
            segment = create_segment(NAME, self.config)
        except SegmentExistsError:
            return
        self._made.append(segment.uuid)
        segment.close()

    def _attach(self) -> None:
        for _ in range(2):
            try:
                segment = attach_segment(NAME)
            except SegmentNotFoundError:
                self._simulation.sleep(SOON)
                continue
            require(segment.config == self.config, "the settings are not those of the creator")
            require(not segment.closing, "a segment begins its life closing")
            segment.close()

    def check(self, simulation: Simulation) -> None:
        require(len(self._made) <= 1, f"{len(self._made)} creators made it")
        survived = simulation.deaths_left == self.deaths
        require(not survived or len(self._made) == 1, "nobody made it")
        if files():
            segment = attach_segment(NAME)
            require(self._made in ([], [segment.uuid]), "the segment that is there is not the one that was made")
            segment.close()
            destroy(NAME)
        require(not files(), f"left in the folder: {files()}")


class Removal(Lifecycle):
    title = "an owner that leaves, somebody who destroys, somebody who works"

    def populate(self, simulation: Simulation) -> None:
        simulation.process("owner", self._own)
        simulation.process("destroys", self._destroy)
        simulation.process("works", self._attach_and_look)

    def _own(self) -> None:
        with Runtime(create_segment(NAME, self.config), owner=True) as runtime:
            runtime.affinity(0)

    def _destroy(self) -> None:
        for _ in range(TRIES):
            try:
                return destroy(NAME)
            except SegmentNotFoundError:
                self._simulation.sleep(SOON)

    def _attach_and_look(self) -> None:
        for _ in range(TRIES):
            try:
                with Runtime(attach_segment(NAME), owner=False) as runtime:
                    runtime._attachment.lane()
                    runtime._attachment.pager_semaphore()
            except SegmentNotFoundError:
                self._simulation.sleep(SOON)
            except SegmentClosingError:
                return

    def check(self, simulation: Simulation) -> None:
        if simulation.deaths_left == self.deaths:
            require(not files(), f"left in the folder: {files()}")
        self._next_user(simulation)


class Reclaiming(Lifecycle):
    """(lane claim / header state)"""

    title = "a segment whose owner is dead: one who removes it, one who wants its name, one who attaches to it"

    def populate(self, simulation: Simulation) -> None:
        segment = create_segment(NAME, self.config)
        segment.write(HEADER_OWNER, pack_identity(LIVE, 0, 1, NO_PID))
        segment.close()
        simulation.process("reclaims", self._reclaim)
        simulation.process("creates", self._create)
        simulation.process("works", self._work_on)

    def _reclaim(self) -> None:
        reclaim(NAME)

    def _create(self) -> None:
        try:
            create_or_reclaim(NAME, self.config).close()
        except SegmentExistsError:
            return

    def _work_on(self) -> None:
        try:
            segment = attach_segment(NAME)
            runtime = Runtime(segment, owner=False)
        except (SegmentNotFoundError, SegmentClosingError):
            return
        try:
            runtime._attachment.lane()
            # From here on it is in use: whoever removes it because nobody uses it would have been wrong.
            for _ in range(4):
                self._simulation.point()
                require(is_published(segment), "a segment was removed as unused under a worker")
        except SegmentClosingError:
            pass
        runtime.close()

    def check(self, simulation: Simulation) -> None:
        self._next_user(simulation)


class HandOver(Lifecycle):
    """The first pager is told to stop, and may be killed besides, at any step."""

    title = "a pager that is told to stop, its standby, and two workers"
    deaths = 1

    def populate(self, simulation: Simulation) -> None:
        create_segment(NAME, self.config).close()
        self._pagers = [simulation.process(f"pager {n}", self._serve, mortal=n == 0) for n in range(2)]
        self._workers = [simulation.process(f"worker {n}", self._work_on, mortal=False) for n in range(2)]
        simulation.process("operator", self._operate, mortal=False)

    def _serve(self) -> None:
        segment = attach_segment(NAME)
        outcome = run_pager(segment, standby=True)
        require(outcome is not Outcome.CLOSED, "the segment was destroyed by nobody")
        segment.close()

    def _operate(self) -> None:
        """Tell the first pager to stop, at once or later; in the end, the other."""
        self._simulation.sleep(SOON)
        self._host.signal(self._pagers[0], signal.SIGTERM)
        self._simulation.wait(lambda: all(worker.done for worker in self._workers))
        while not all(pager.done for pager in self._pagers):
            for pager in self._pagers:
                if not pager.done:
                    self._host.signal(pager, signal.SIGTERM)
            self._simulation.sleep(0.5)

    def _work_on(self) -> None:
        with Runtime(attach_segment(NAME), owner=False) as runtime:
            for expert in (0, 1):
                self._demand(runtime, expert)

    def check(self, simulation: Simulation) -> None:
        require(all(worker.done for worker in self._workers), "a worker is not done")
        require(all(pager.done for pager in self._pagers), "a pager does not stop")


class OwnersEnd(Lifecycle):
    title = "an owner, its pager and a worker; the owner dies"
    deaths = 1

    def populate(self, simulation: Simulation) -> None:
        self._served = False
        owner = simulation.process("owner", self._own)
        pager = simulation.process("pager", self._serve, mortal=False)
        worker = simulation.process("works", self._work_on, mortal=False)
        self._processes: list[SimProcess] = [owner, pager, worker]

    def _own(self) -> None:
        segment = create_segment(NAME, self.config)
        with Runtime(segment, owner=True):
            self._simulation.sleep(1.0)

    def _serve(self) -> None:
        while True:
            try:
                segment = attach_segment(NAME)
            except SegmentNotFoundError:
                if self._processes[0].done:
                    return
                self._simulation.sleep(0.01)
                continue
            except SegmentClosingError:
                return
            break
        self._served = True
        run_pager(segment, owner=segment.read(HEADER_OWNER))
        segment.close()

    def _work_on(self) -> None:
        self._simulation.sleep(0.5)
        try:
            with Runtime(attach_segment(NAME), owner=False) as runtime:
                for expert in (0, 1):
                    self._demand(runtime, expert)
        except (SegmentNotFoundError, SegmentClosingError):
            return

    def check(self, simulation: Simulation) -> None:
        require(all(process.done for process in self._processes), "somebody is not done")
        if self._served or simulation.deaths_left == self.deaths:
            require(not files(), f"left in the folder: {files()}")
        self._next_user(simulation)
