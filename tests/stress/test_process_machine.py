"""A state machine over real processes: workers that attach, route, lease, wait, stop and die; pagers and standbys that
serve, stop, die and hand over; a segment that is destroyed and made anew. What must hold is looked at after every step.

Few histories are tried, since each takes seconds; many with ``SHMROUTE_STRESS=1``.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from worlds import GEOMETRY, PATIENCE, Failed, Process, Reply, Worker, World, eventually

from shmroute.shared.lanes import live_lanes
from shmroute.shared.words import LOADING, RESIDENT, expert_mask, expert_slot, expert_state

THOROUGH = os.environ.get("SHMROUTE_STRESS") == "1"
EXAMPLES = 200 if THOROUGH else 3
SLOTS, LANES, MOST_WORKERS = 3, 4, 3
YOUTH = 12
"""Steps before a segment may be destroyed: else that would be most of what happens."""

SHORT = 0.25
"""Timeout of what is not certain to succeed."""

HERE = Path(__file__).parent
LAYERS = st.integers(0, GEOMETRY["num_layers"] - 1)
EXPERTS = st.integers(0, GEOMETRY["num_experts"] - 1)


class AttachingWorker(Worker):
    """A worker process that attaches on command."""

    def __init__(self) -> None:
        self._replies: dict[int, Reply] = {}
        self._identifiers = itertools.count()
        Process.__init__(self, str(HERE / "attaching_program.py"))


class WaitingPager(Process):
    """A pager process that is told later what it is the pager of."""

    def __init__(self) -> None:
        super().__init__(str(HERE / "waiting_pager_program.py"))

    def begin(self, *arguments: str) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(" ".join(arguments) + "\n")
        self.popen.stdin.flush()


class Reserve:
    """Processes that are ready and belong to no segment: starting one takes longer than a dozen steps."""

    def __init__(self) -> None:
        self._workers: list[AttachingWorker] = []
        self._pagers: list[WaitingPager] = []
        self._all: list[Process] = []

    def worker(self) -> AttachingWorker:
        worker = self._next(self._workers, AttachingWorker)
        worker.await_line("ready")
        return worker

    def pager(self) -> WaitingPager:
        return self._next(self._pagers, WaitingPager)

    def put_back(self, worker: AttachingWorker) -> None:
        worker.do("close")
        self._workers.append(worker)

    def end(self) -> None:
        for process in self._all:
            process.clean_up()

    def _next(self, idle: list[Any], kind: type[Any]) -> Any:
        """The one that was started first, after starting those that will be next."""
        while len(idle) < 3:
            idle.append(kind())
            self._all.append(idle[-1])
        return idle.pop(0)


reserve = Reserve()


@pytest.fixture(scope="module", autouse=True)
def no_worker_is_left() -> Iterator[None]:
    yield
    reserve.end()


@dataclass(eq=False, repr=False)
class Hand:
    """A worker, and what it should be doing."""

    worker: AttachingWorker
    lane: int
    leases: dict[str, tuple[int, int]] = field(default_factory=dict)
    waiting: Reply | None = None
    awaited: tuple[int, int] | None = None
    stopped: bool = False

    def __repr__(self) -> str:
        return f"the worker of lane {self.lane}"

    @property
    def free(self) -> bool:
        return not self.stopped and self.waiting is None

    @property
    def pinned(self) -> set[tuple[int, int]]:
        return set(self.leases.values()) | ({self.awaited} if self.awaited else set())


class SharedCache(RuleBasedStateMachine):
    """One segment name, over the incarnations of its segment."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="shmroute-machine-"))
        self.name = ""
        self._world: World | None = None
        self.hands: list[Hand] = []
        self.pager: Process | None = None
        self.standby: Process | None = None
        self.pager_stopped = False
        self.pagers_so_far = 0
        self.gated: tuple[int, int] | None = None
        self.counters: dict[str, int] = {}
        self.handles = itertools.count()
        self.age = 0

    @property
    def world(self) -> World:
        assert self._world is not None
        return self._world

    @property
    def serves(self) -> bool:
        return self.pager is not None and not self.pager_stopped

    @property
    def pinned(self) -> set[tuple[int, int]]:
        """Experts that living workers keep from being evicted."""
        return set().union(*(hand.pinned for hand in self.hands))

    # ------------------------------------------------------ the segment

    @initialize(workers=st.integers(0, 2), standby=st.booleans())
    def begin(self, workers: int, standby: bool) -> None:
        self.create()
        self.start_pager()
        if standby:
            self.start_standby()
        for _ in range(workers):
            self.start_worker()

    @precondition(lambda self: self._world is None)
    @rule()
    def create(self) -> None:
        self._world = World(self.folder)
        self._world.name = self.name = self.name or self._world.name
        self._world.create(pager=False, slots=SLOTS, max_workers=LANES, tick=0.05)
        self.counters, self.pagers_so_far, self.age = {}, 0, 0

    @precondition(lambda self: self._world is not None and self.age > YOUTH)
    @rule()
    def destroy(self) -> None:
        """Whoever waits is told so; the pagers end; nothing is left, whatever workers still hold."""
        world = self.world
        self.open_gate()
        for hand in self.hands:
            hand.worker.resume()
        world.runtimes[-1].close()
        for program in (self.pager, self.standby):
            if program is not None:
                program.resume()
                program.await_line("outcome CLOSED")
                assert program.wait() == 0
        for hand in self.hands:
            if hand.waiting is not None and hand.awaited is not None:
                try:
                    assert hand.waiting.get() == world.truth(*hand.awaited)
                except Failed as failure:
                    assert failure.kind == "SegmentClosingError", failure
            for handle, expert in hand.leases.items():
                assert hand.worker.do("digest", handle=handle) == world.truth(*expert)
            reserve.put_back(hand.worker)
        self.hands.clear()
        self.pager, self.standby, self.pager_stopped = None, None, False
        self._world = None
        world.end()

    # ------------------------------------------------------ workers

    @precondition(lambda self: self._world is not None and len(self.hands) < MOST_WORKERS and not self.pager_stopped)
    @rule()
    def start_worker(self) -> None:
        """The dead may have their lanes still: attaching reaps then, unless a stopped pager has the lock."""
        worker = reserve.worker()
        self.hands.append(Hand(worker, worker.do("attach", name=self.name)))

    @precondition(lambda self: any(hand.free for hand in self.hands))
    @rule(data=st.data(), layer=LAYERS, tokens=st.integers(1, 20), experts=st.lists(EXPERTS, max_size=8))
    def work(self, data: st.DataObject, layer: int, tokens: int, experts: list[int]) -> None:
        """Route, then lease one expert after the other: all can be had as long as one slot can."""
        hand = data.draw(st.sampled_from([hand for hand in self.hands if hand.free]))
        chosen = hand.worker.do("route", layer=layer, tokens=tokens)
        assert len(set(chosen)) == GEOMETRY["top_k"]
        if not self.serves or self.gated is not None or hand.leases or len(self.pinned) >= SLOTS:
            return
        found = hand.worker.do("visit", layer=layer, experts=chosen + experts, timeout=PATIENCE / 2)
        assert found == {str(expert): [self.world.truth(layer, expert)] for expert in chosen + experts}

    @precondition(lambda self: any(hand.free for hand in self.hands))
    @rule(data=st.data(), layer=LAYERS, experts=st.lists(EXPERTS, min_size=1, max_size=3))
    def lease(self, data: st.DataObject, layer: int, experts: list[int]) -> None:
        for expert in experts:
            self.lease_one(data.draw(st.sampled_from([hand for hand in self.hands if hand.free])), layer, expert)

    def lease_one(self, hand: Hand, layer: int, expert: int) -> None:
        room = len(self.pinned | {(layer, expert)}) <= SLOTS
        certain = self.serves and self.gated is None and not hand.leases and room
        handle = str(next(self.handles))
        timeout = PATIENCE / 2 if certain else SHORT
        try:
            digest = hand.worker.do("lease", layer=layer, expert=expert, handle=handle, timeout=timeout)
        except Failed as failure:
            assert not certain, failure
            if failure.kind == "LeaseHeldError":
                assert hand.leases
            elif failure.kind == "PagerUnavailable":
                assert not self.serves or "made no progress" in failure.message  # on a very busy machine
            else:
                assert failure.kind == "ExpertTimeout", failure
        else:
            hand.leases[handle] = (layer, expert)
            assert digest == self.world.truth(layer, expert)

    @precondition(lambda self: any(hand.leases and not hand.stopped for hand in self.hands))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        hand = data.draw(st.sampled_from([hand for hand in self.hands if hand.leases and not hand.stopped]))
        handle = data.draw(st.sampled_from(sorted(hand.leases)))
        hand.worker.do("release", handle=handle)
        del hand.leases[handle]

    @precondition(lambda self: self.gated is None and any(hand.free and not hand.leases for hand in self.hands))
    @rule(data=st.data(), layer=LAYERS, expert=EXPERTS)
    def wait(self, data: st.DataObject, layer: int, expert: int) -> None:
        """Begin to wait for an expert whose read blocks until the gate opens."""
        hand = data.draw(st.sampled_from([hand for hand in self.hands if hand.free and not hand.leases]))
        if self.world.state(layer, expert) in (RESIDENT, LOADING):
            return
        self.world.close_gate(layer, expert)
        self.gated = hand.awaited = (layer, expert)
        hand.waiting = hand.worker.start(
            "lease", thread="waiter", layer=layer, expert=expert, handle="waited", timeout=4 * PATIENCE
        )
        eventually(lambda: self.gated in self.world.awaited(), "the wait word")

    @precondition(lambda self: self.gated is not None)
    @rule()
    def open_gate(self) -> None:
        self.world.open_gate()
        self.world.faults()
        self.gated = None

    @precondition(lambda self: self.can_settle)
    @rule()
    def settle(self) -> None:
        """Whoever waits gets its expert, once it can be read, a pager serves and a slot can be had."""
        for hand in self.hands:
            if hand.waiting is not None and not hand.stopped:
                assert hand.awaited is not None
                assert hand.waiting.get() == self.world.truth(*hand.awaited)
                hand.worker.start("release", thread="waiter", handle="waited").get()
                hand.waiting = hand.awaited = None

    @property
    def can_settle(self) -> bool:
        able = any(hand.waiting is not None and not hand.stopped for hand in self.hands)
        return able and self.gated is None and self.serves and len(self.pinned) <= SLOTS

    # ------------------------------------------------------ deaths and stops of workers

    @precondition(lambda self: self.hands)
    @rule(data=st.data())
    def kill_worker(self, data: st.DataObject) -> None:
        hand = data.draw(st.sampled_from(self.hands))
        hand.worker.kill()
        self.hands.remove(hand)

    @precondition(lambda self: any(not hand.stopped for hand in self.hands))
    @rule(data=st.data())
    def stop_worker(self, data: st.DataObject) -> None:
        hand = data.draw(st.sampled_from([hand for hand in self.hands if not hand.stopped]))
        hand.worker.stop()
        hand.stopped = True

    @precondition(lambda self: any(hand.stopped for hand in self.hands))
    @rule()
    def continue_workers(self) -> None:
        for hand in self.hands:
            hand.worker.resume()
            hand.stopped = False

    # ------------------------------------------------------ pagers

    @precondition(lambda self: self._world is not None and self.pager is None)
    @rule()
    def start_pager(self) -> None:
        self.pager = reserve.pager()
        self.world.processes.append(self.pager)
        self.pager.begin(self.name)
        self.pager.await_line("serving")
        self.pagers_so_far += 1

    @precondition(lambda self: self.pager is not None and self.standby is None)
    @rule()
    def start_standby(self) -> None:
        self.standby = reserve.pager()
        self.world.processes.append(self.standby)
        self.standby.begin(self.name, "standby")
        self.standby.await_line("standing by")

    @precondition(lambda self: self.pager is not None)
    @rule()
    def kill_pager(self) -> None:
        assert self.pager is not None
        self.pager.kill()
        self.follow()

    @precondition(lambda self: self.standby is not None)
    @rule()
    def kill_standby(self) -> None:
        assert self.standby is not None
        self.standby.kill()
        self.standby = None

    @precondition(lambda self: self.serves and self.gated is None)
    @rule()
    def tell_pager_to_stop(self) -> None:
        """It leaves, to its standby if there is one; the owner lives, so the segment stays."""
        assert self.pager is not None
        self.pager.signal(signal.SIGTERM)
        self.pager.await_line("outcome HANDED_OVER" if self.standby else "outcome LEFT")
        assert self.pager.wait() == 0
        self.follow()

    @precondition(lambda self: self.serves)
    @rule()
    def stop_pager(self) -> None:
        assert self.pager is not None
        self.pager.stop()
        self.pager_stopped = True

    @precondition(lambda self: self.pager_stopped)
    @rule()
    def continue_pager(self) -> None:
        assert self.pager is not None
        self.pager.resume()
        self.pager_stopped = False

    def follow(self) -> None:
        """The pager is gone: its standby, if there is one, takes its place."""
        self.pager, self.standby, self.pager_stopped = self.standby, None, False
        if self.pager is not None:
            self.pager.await_line("serving")
            self.pagers_so_far += 1

    # ------------------------------------------------------ what must hold

    @precondition(lambda self: self._world is not None)
    @invariant()
    def bytes_under_leases_are_right(self) -> None:
        for hand in self.hands:
            for handle, (layer, expert) in hand.leases.items():
                word = self.world.word(layer, expert)
                assert expert_state(word) == RESIDENT
                assert expert_mask(word) >> hand.lane & 1
                if not hand.stopped:
                    assert hand.worker.do("digest", handle=handle) == self.world.truth(layer, expert)

    @precondition(lambda self: self._world is not None)
    @invariant()
    def no_slot_has_two_owners(self) -> None:
        words = [self.world.word(*expert) for expert in self.all_experts()]
        slots = [expert_slot(word) for word in words if expert_state(word) in (LOADING, RESIDENT)]
        if not self.serves:  # else the words are not of one moment
            assert len(slots) == len(set(slots))
        assert len(set(slots)) <= SLOTS

    @precondition(lambda self: self._world is not None)
    @invariant()
    def there_is_one_pager_at_most(self) -> None:
        serving = [
            process
            for process in self.world.processes
            if process.running and any("serving" in line for line in process.lines)
        ]
        assert serving == ([self.pager] if self.pager else [])

    @precondition(lambda self: self._world is not None)
    @invariant()
    def counters_only_grow(self) -> None:
        self.age += 1
        metrics = self.world.metrics()
        now = {f"pager {name}": count for name, count in metrics.pager.counters.items() if name != "queued"}
        now |= {f"workers {name}": count for name, count in metrics.total.counters.items()}
        assert all(now[name] >= count for name, count in self.counters.items())
        assert now["pager takeovers"] == max(self.pagers_so_far - 1, 0)
        self.counters = now

    def all_experts(self) -> list[tuple[int, int]]:
        return list(itertools.product(range(GEOMETRY["num_layers"]), range(GEOMETRY["num_experts"])))

    # ------------------------------------------------------ the end

    def teardown(self) -> None:
        try:
            if self._world is not None:
                self.come_to_rest()
                self.destroy()
        finally:
            for hand in self.hands:  # of a history that failed
                hand.worker.clean_up()
            if self._world is not None:
                with contextlib.suppress(AssertionError):  # what failed first is what is told
                    self._world.end()
            shutil.rmtree(self.folder, ignore_errors=True)

    def come_to_rest(self) -> None:
        """Everything is let go and served: then no lease, wait word, lane or slot is lost."""
        if self.gated is not None:
            self.open_gate()
        self.continue_workers()
        for hand in self.hands:
            for handle in list(hand.leases):
                hand.worker.do("release", handle=handle)
                del hand.leases[handle]
        if self.pager is None:
            self.start_pager()
        if self.pager_stopped:
            self.continue_pager()
        self.settle()
        world = self.world
        eventually(lambda: not any(world.mask(*expert) for expert in self.all_experts()), "the end of all leases")
        eventually(lambda: set(live_lanes(world.segment)) == {hand.lane for hand in self.hands}, "the reaping")
        assert world.awaited() == set()
        for expert in self.all_experts():
            with world.runtimes[-1].expert(*expert, timeout=PATIENCE) as weights:
                assert weights.raw.nbytes == world.geometry.expert_bytes
        assert sum(world.state(*expert) == RESIDENT for expert in self.all_experts()) == SLOTS


@pytest.mark.timeout(3600 if THOROUGH else 120)
class TestSharedCache(SharedCache.TestCase):  # type: ignore[name-defined, misc]
    settings = settings(
        max_examples=EXAMPLES,
        stateful_step_count=60 if THOROUGH else 20,
        deadline=None,
        # Each history costs seconds, and no two of them meet the same timing: shrinking pays only when time is there.
        phases=(Phase.explicit, Phase.reuse, Phase.generate, *((Phase.shrink,) if THOROUGH else ())),
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )
