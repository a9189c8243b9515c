"""Does to a run what its plan says: kills, stops, hands over, fills the ring, breaks reads and files, mends them."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator

from shmroute.shared.atomic import WORD
from shmroute.shared.words import RESIDENT, expert_mask, expert_state
from shmroute.sources.faulty import Fault as ReadFault
from shmroute.sources.faulty import set_faults
from stress.plan import Act, Lever, acts
from stress.stage import Stage
from stress.timeline import Fault

LONGEST_WAIT = 15.0
"""Seconds to wait for a fault to be met by somebody, before it is mended all the same."""

MOST_WAITING = 6
"""Acts that may wait until they can be done, before no more of the plan are looked at."""

BROKEN_EXPERTS = 6
FILL_LIMIT = 1 << 15
"""Hints after which a ring that takes more of them is not being filled: twice the largest ring, and one more lap."""

_PAGER_LEVERS = {
    Lever.KILL_PAGER, Lever.KILL_STANDBY, Lever.HAND_OVER, Lever.STOP_PAGER, Lever.DAMAGE, Lever.HIDE,
}  # fmt: skip

Ordeal = Iterator[None]
"""An act under way: a generator that is stepped until it ends."""


class Tormentor:
    """Carries out the plan of a seed.

    Parameters
    ----------
    stage : Stage
    seed : int

    Attributes
    ----------
    fired : Counter
        How often each lever had the effect that it is there for.
    ring_full : int
        Hints that a full ring refused.
    killed_in_lease : int
        Workers that were seen to hold a lease when they had been killed.
    rounds : int
        Rounds of the plan of which all acts are done.
    """

    def __init__(self, stage: Stage, seed: int) -> None:
        self._stage = stage
        self._acts = acts(seed)
        self._next = next(self._acts)
        self._due = time.monotonic() + self._next.pause
        self._waiting: list[Act] = []
        self._under_way: list[tuple[Act, Ordeal]] = []
        self._faults: dict[Act, list[ReadFault]] = {}
        self._do: dict[Lever, Callable[[Act], Ordeal]] = {
            Lever.KILL_WORKER: self._kill_worker,
            Lever.STOP_WORKER: self._stop_worker,
            Lever.KILL_PAGER: self._kill_pager,
            Lever.KILL_STANDBY: self._kill_standby,
            Lever.HAND_OVER: self._hand_over,
            Lever.STOP_PAGER: self._stop_pager,
            Lever.CORRUPT: self._corrupt,
            Lever.UNREADABLE: self._make_unreadable,
            Lever.DAMAGE: self._damage,
            Lever.HIDE: self._hide,
        }
        self.fired: Counter[Lever] = Counter()
        self.ring_full = 0
        self.killed_in_lease = 0

    @property
    def rounds(self) -> int:
        """Rounds of the plan that are done."""
        return min(act.round for act in [self._next, *self._waiting, *(act for act, _ in self._under_way)])

    @property
    def at_rest(self) -> bool:
        """Whether nothing is broken or stopped."""
        return not self._under_way

    def step(self) -> None:
        """Go on with everything that is under way, and begin what is due."""
        self.go_on()
        for act in list(self._waiting):
            if self._possible(act):
                self._waiting.remove(act)
                self._begin(act)
        if time.monotonic() >= self._due and len(self._waiting) < MOST_WAITING:
            act, self._next = self._next, next(self._acts)
            self._due = time.monotonic() + self._next.pause
            if self._possible(act):
                self._begin(act)
            else:
                self._waiting.append(act)

    def go_on(self) -> None:
        """Go on with what is under way, and begin nothing."""
        for act, ordeal in list(self._under_way):
            try:
                next(ordeal)
            except StopIteration:
                self._under_way.remove((act, ordeal))

    def _begin(self, act: Act) -> None:
        self._under_way.append((act, self._do[act.lever](act)))

    def _possible(self, act: Act) -> bool:
        """Whether an act can be done now: what happens to pagers happens one at a time, to one who has a standby."""
        if act.lever in _PAGER_LEVERS:
            busy = any(other.lever in _PAGER_LEVERS for other, _ in self._under_way)
            return not busy and self._stage.pagers.complete
        if act.lever is Lever.CORRUPT:
            return len(self._seen_and_absent(act)) > 0
        # Somebody must go on working, or faults are met by nobody: who starts needs the file that may be broken.
        crew = self._stage.crew
        return len(crew.ready) > len(crew.workers) // 3

    # ---------------------------------------------------------- workers

    def _kill_worker(self, act: Act) -> Ordeal:
        """Mostly one that works; now and then one that is only just starting, or that is stopped."""
        crew = self._stage.crew
        victims = [worker for worker in (crew.ready if act.draw < 0.9 else crew.workers) if not worker.killed]
        if not victims:
            return
        victim = victims[int(act.draw * 997) % len(victims)]
        lane = self._stage.runtime.metrics().worker_of(victim.pid)
        victim.kill()
        if lane is not None and lane.lane is not None:
            victim.popen.wait()
            self.killed_in_lease += self._holds_lease(lane.lane)
        self.fired[Lever.KILL_WORKER] += 1
        yield

    def _stop_worker(self, act: Act) -> Ordeal:
        workers = [worker for worker in self._stage.crew.ready if not worker.stopped]
        if not workers:
            return
        victim = workers[int(act.draw * 997) % len(workers)]
        victim.stop()
        yield from _for(act.length)
        victim.resume()
        self.fired[Lever.STOP_WORKER] += 1

    def _holds_lease(self, lane: int) -> bool:
        return any(expert_mask(word) >> lane & 1 for word in self._words())

    # ---------------------------------------------------------- pagers

    def _kill_pager(self, act: Act) -> Ordeal:
        """At work, or stopped for a moment before, so that it is certain to be in the middle of something."""
        pagers = self._stage.pagers
        if act.draw < 0.5:
            pagers.stop()
            yield from _for(act.length / 4)
        pagers.kill()
        yield from _until(lambda: pagers.complete)
        self.fired[Lever.KILL_PAGER] += 1

    def _kill_standby(self, act: Act) -> Ordeal:
        pagers = self._stage.pagers
        pagers.kill_standby()
        yield from _until(lambda: pagers.complete)
        self.fired[Lever.KILL_STANDBY] += 1

    def _hand_over(self, act: Act) -> Ordeal:
        pagers = self._stage.pagers
        pagers.hand_over()
        yield from _until(lambda: pagers.complete)
        self.fired[Lever.HAND_OVER] += 1

    def _stop_pager(self, act: Act) -> Ordeal:
        """Nobody takes over from one that is alive: the ring fills, and whoever waits is told why."""
        stage = self._stage
        stage.pagers.stop()
        chance = random.Random(act.draw)
        config = stage.runtime.config
        for _ in range(FILL_LIMIT):
            if not stage.runtime.page_out(chance.randrange(config.num_layers), chance.randrange(config.num_experts)):
                self.ring_full += 1
                self.fired[Lever.STOP_PAGER] += 1
                break
        yield from _for(act.length)
        stage.pagers.resume()

    # ---------------------------------------------------------- reads

    def _corrupt(self, act: Act) -> Ordeal:
        """Only later reads of an expert: the first is what checksums are compared with."""
        experts = self._seen_and_absent(act)[:BROKEN_EXPERTS]
        before = self._mismatches()
        windows = [self._stage.timeline.begin(Fault.CORRUPT, *expert) for expert in experts]
        self._set(act, [ReadFault(layer, expert, corrupt=True) for layer, expert in experts])
        yield from _until(lambda: self._mismatches() > before, LONGEST_WAIT)
        self._set(act, [])
        for window in windows:
            window.end()
        self.fired[Lever.CORRUPT] += self._mismatches() > before

    def _make_unreadable(self, act: Act) -> Ordeal:
        """By the source: whoever runs as root reads a file of mode 0, and an open descriptor outlives any change of
        mode or name.
        """
        chance = random.Random(act.draw)
        experts = chance.sample(self._all_experts(), BROKEN_EXPERTS)
        before = self._failures()
        windows = [self._stage.timeline.begin(Fault.UNREADABLE, *expert) for expert in experts]
        self._set(act, [ReadFault(layer, expert, error="EIO") for layer, expert in experts])
        yield from _for(act.length)
        yield from _until(lambda: self._failures() > before, LONGEST_WAIT)
        self._set(act, [])
        for window in windows:
            window.end()
        self.fired[Lever.UNREADABLE] += self._failures() > before

    def _damage(self, act: Act) -> Ordeal:
        """Cut the real file short, and put back what was cut off, with the file's own time: unlike another name or
        mode, that has effect on descriptors that are open.
        """
        path, timeline = self._stage.weights, self._stage.timeline
        status = path.stat()
        with path.open("r+b") as file:
            cut = status.st_size // 2
            file.seek(cut)
            lost = file.read()
            window, before = timeline.begin(Fault.DAMAGED), self._failures()
            file.truncate(cut)
            try:
                yield from _for(act.length / 2)
                yield from _until(lambda: self._failures() > before, LONGEST_WAIT)
            finally:
                file.seek(cut)
                file.write(lost)
                file.flush()
                os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        window.end()
        self.fired[Lever.DAMAGE] += self._failures() > before

    def _hide(self, act: Act) -> Ordeal:
        """Give the real file another name and kill the pager: an open descriptor does not care, but whoever takes over
        must open it anew. It has to say that it cannot and leave; the next one, with the file back, adopts everything.
        """
        pagers, path = self._stage.pagers, self._stage.weights
        hidden, refused = path.with_suffix(".hidden"), pagers.refused
        window = self._stage.timeline.begin(Fault.HIDDEN)
        path.rename(hidden)
        pagers.expect_refusal(True)
        pagers.kill()
        yield from _until(lambda: pagers.refused > refused)
        hidden.rename(path)
        pagers.expect_refusal(False)
        window.end()
        yield from _until(lambda: pagers.complete)
        self.fired[Lever.HIDE] += 1

    def _set(self, act: Act, faults: list[ReadFault]) -> None:
        self._faults[act] = faults
        set_faults(self._stage.control, [fault for group in self._faults.values() for fault in group])
        if not faults:
            del self._faults[act]

    # ---------------------------------------------------------- looking

    def _all_experts(self) -> list[tuple[int, int]]:
        config = self._stage.runtime.config
        return [(layer, expert) for layer in range(config.num_layers) for expert in range(config.num_experts)]

    def _words(self, region: str = "experts") -> list[int]:
        segment = self._stage.segment
        first = getattr(segment.layout, region)
        return [segment.read(segment.layout.row(first, layer) + e * WORD) for layer, e in self._all_experts()]

    def _seen_and_absent(self, act: Act) -> list[tuple[int, int]]:
        """Experts whose checksum is known and that will have to be loaded anew, in an order drawn."""
        known = zip(self._all_experts(), self._words("checksums"), self._words(), strict=True)
        found = [who for who, checksum, word in known if checksum and expert_state(word) != RESIDENT]
        random.Random(act.draw).shuffle(found)
        return found

    def _mismatches(self) -> int:
        return self._stage.runtime.metrics().pager.counters["checksum_mismatches"]

    def _failures(self) -> int:
        return self._stage.runtime.metrics().pager.counters["failures"]


def _for(seconds: float) -> Ordeal:
    """Go on for some time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        yield


def _until(condition: Callable[[], bool], longest: float = float("inf")) -> Ordeal:
    """Go on until something holds, or for so long; what must come about is waited for by whoever runs the stage."""
    deadline = time.monotonic() + longest
    while not condition() and time.monotonic() < deadline:
        yield
