"""One run: several simulated processes in one thread of one real process, switched at every step.

Each simulated thread is a greenlet, so a switch may happen inside plain functions, however deep. A thread announces its
next visible step (an atomic operation, a semaphore's post, a file's link) by `Simulation.point` *before* it makes it;
there the strategy decides who goes on. So a process that dies does so between two steps, and every place between two
steps is a place to die: also after a kernel has returned and before the post that it asked for.

The dead are never resumed. When the run is over their stacks are unwound with every step refused, so their ``finally``
blocks close what the real process would have lost, and touch nothing shared.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import Any, Protocol

from greenlet import getcurrent, greenlet

STEP_SECONDS = 1e-6
"""How much simulated time a step takes. Waits end when everybody waits, or when a strategy says so."""

SPIN_POINTS = 150
"""Points in a row at which a thread changed nothing, after which another goes first: who spins waits for others."""

NOT_DONE = "not done after"
"""How the finding begins that a run is too long."""

CHECK_STEPS = 5_000
"""Steps within which what is done before and after a run must end."""

PIDS_FROM = 1000
NO_PID = 999
"""Of a process that is not there."""


class Discarded(BaseException):
    """Unwinds what is left of a run; nothing is done on its behalf any more."""


class Violation(AssertionError):
    """A property that does not hold."""


def require(condition: object, message: str) -> None:
    """Raise `Violation` unless `condition` holds."""
    if not condition:
        raise Violation(message)


def _all_but_discarded(unraisable: sys.UnraisableHookArgs) -> None:
    if not isinstance(unraisable.exc_value, Discarded):
        sys.__unraisablehook__(unraisable)


class SimThread:
    """A thread of a simulated process."""

    __slots__ = (
        "daemon",
        "deadline",
        "finished",
        "fruitless",
        "greenlet",
        "letter",
        "name",
        "process",
        "waiting",
    )

    def __init__(self, process: SimProcess, letter: str, name: str, body: greenlet, daemon: bool) -> None:
        self.process, self.letter, self.name, self.greenlet, self.daemon = process, letter, name, body, daemon
        self.waiting: Callable[[], bool] | None = None
        self.deadline: float | None = None
        self.finished = False
        self.fruitless = 0

    def __repr__(self) -> str:
        return f"{self.letter} ({self.process.name}/{self.name})"


class SimProcess:
    """A simulated process.

    Attributes
    ----------
    mortal : bool
        Whether the strategy may kill it.
    locals : dict
        What real processes have one each of, such as module globals; see `host`.
    """

    def __init__(self, number: int, name: str, mortal: bool) -> None:
        self.letter = chr(ord("A") + number)
        self.name = name
        self.pid = PIDS_FROM + number
        self.start = 1 + number
        self.mortal = mortal
        self.alive = True
        self.threads: list[SimThread] = []
        self.locals: dict[Any, Any] = {}
        self.signals: list[Callable[[], None]] = []

    @property
    def done(self) -> bool:
        """Whether it has ended, by itself or not."""
        return not self.alive or all([thread.finished for thread in self.threads if not thread.daemon])

    def __repr__(self) -> str:
        return f"{self.letter} ({self.name})"


class Strategy(Protocol):
    """Decides who makes the next step."""

    def choose(
        self, simulation: Simulation, current: SimThread | None, enabled: list[SimThread]
    ) -> SimThread | SimProcess | str:
        """One of the threads in `enabled`; or a thread in `simulation.sleepers()`, whose wait then times out; or a
        process in `simulation.mortals()`, which dies; or ``~`` and the letter of a thread whose oldest buffered store
        reaches memory. After the latter two it is asked again.

        `current` is the thread that is about to make a step, None if it waits, has ended or has died. `enabled` is
        never empty, and holds `current` unless that has been spinning.
        """


class Buffers(Protocol):
    """The memory's store buffers, if it has any."""

    def pending(self) -> list[SimThread]:
        """The threads with stores that have not reached memory."""

    def flush_one(self, thread: SimThread) -> None:
        """Let a thread's oldest buffered store reach memory."""

    def flush_all(self) -> None:
        """Let all stores reach memory."""


class Simulation:
    """One run.

    Parameters
    ----------
    strategy : Strategy
    step_bound : int
        Steps after which the run is a finding: no schedule runs for ever.
    deaths : int
        How many processes may die.
    """

    def __init__(self, strategy: Strategy, *, step_bound: int = 20_000, deaths: int = 1) -> None:
        self.strategy = strategy
        self.step_bound = step_bound
        self.deaths_left = deaths
        self.now = 0.0
        self.steps = 0
        self.timeouts = 0
        self.idle_timeouts = 0  # those that came because everybody waited
        self.decisions: list[str] = []
        self.processes: list[SimProcess] = []
        self.threads: list[SimThread] = []
        self.current: SimThread | None = None
        self.failure: BaseException | None = None
        self.buffers: Buffers | None = None
        self.on_death: list[Callable[[SimProcess], None]] = []
        self.unwinding = False
        self._over = False
        self._outside_steps = 0
        self._began = 0
        self._hub = getcurrent()
        self._all: list[SimThread] = []

    # ------------------------------------------------------ making

    def process(self, name: str, *mains: Callable[[], None], mortal: bool = True) -> SimProcess:
        """A process whose threads run `mains`."""
        made = SimProcess(len(self.processes), name, mortal)
        self.processes.append(made)
        for number, main in enumerate(mains):
            self.thread(made, main, f"main{number or ''}")
        return made

    def thread(self, process: SimProcess, main: Callable[[], None], name: str, *, daemon: bool = False) -> SimThread:
        """One more thread of a process."""

        def body() -> None:
            try:
                main()
            except Discarded:
                return
            except BaseException as error:  # noqa: BLE001 - whatever a process of the run raises is the run's finding
                if not self.unwinding:
                    self.failure = self.failure or error
            thread.finished = True
            if thread in self.threads:
                self.threads.remove(thread)
            if process.done:  # its daemon threads go with it
                self.threads = [other for other in self.threads if other.process is not process]
            self.current = None

        letter = chr(ord("a") + self._began)
        self._began += 1
        thread = SimThread(process, letter, name, greenlet(body, self._hub), daemon)
        process.threads.append(thread)
        self.threads.append(thread)
        self._all.append(thread)
        return thread

    # ------------------------------------------------------ what threads call

    def point(self) -> None:
        """Announce a step: whoever the strategy chooses goes on, this thread when its turn comes."""
        thread = self.current
        if thread is None:  # set-up and checks, outside the run
            if self.unwinding:
                raise Discarded
            self._outside_steps += 1
            require(self._outside_steps < CHECK_STEPS, f"what a check does is not done after {CHECK_STEPS} steps")
            return
        self.steps += 1
        self.now += STEP_SECONDS
        thread.fruitless += 1
        if self.steps > self.step_bound:
            self.failure = Violation(f"{NOT_DONE} {self.step_bound} steps")
            self._leave(None)
        chosen = self._decide(thread)
        if chosen is not thread:
            self._leave(chosen)
        if thread.process.signals:
            self._take_signals(thread)

    def wait(self, predicate: Callable[[], bool], timeout: float | None = None) -> bool:
        """Let others go on until `predicate` holds; False if simulated time ran out first.

        `predicate` only looks: it makes no step.
        """
        thread = self.current
        assert thread is not None, "only a thread of the run can wait"
        self.steps += 1
        if self.steps > self.step_bound:
            self.failure = Violation(f"{NOT_DONE} {self.step_bound} steps")
            self._leave(None)
        thread.waiting = predicate
        thread.deadline = None if timeout is None else self.now + max(timeout, 0.0)
        self._leave(self._decide(None))
        thread.waiting, thread.deadline = None, None
        if thread.process.signals:
            self._take_signals(thread)
        return predicate()

    def sleep(self, seconds: float) -> None:
        """Let others go on for a while."""
        self.wait(lambda: False, seconds)

    def changed(self) -> None:
        """Note that the thread at work changed something: it is not merely spinning."""
        if self.current is not None:
            self.current.fruitless = 0

    # ------------------------------------------------------ what strategies may ask

    def mortals(self) -> list[SimProcess]:
        """Whom the strategy may kill now."""
        if self.deaths_left == 0:
            return []
        return [p for p in self.processes if p.mortal and p.alive and not p.done]

    def sleepers(self) -> list[SimThread]:
        """Threads whose waits have a timeout that has not come."""
        return [t for t in self.threads if t.deadline is not None and t.waiting is not None and not t.waiting()]

    # ------------------------------------------------------ the run

    def run(self) -> None:
        """Make the run; raises what a thread of it raised, or `Violation`."""
        try:
            while self.failure is None and not self._over:
                chosen = self._decide(None)
                if chosen is None:
                    break
                self.current = chosen
                chosen.greenlet.switch()
                self.current = None
            if self.buffers is not None:
                self.buffers.flush_all()
            if self.failure is not None:
                raise self.failure
        finally:
            self.current = None

    def unwind(self) -> None:
        """Unwind the stacks of all who did not end: the run is over, nothing they do has an effect."""
        self.unwinding = True
        former, sys.unraisablehook = sys.unraisablehook, _all_but_discarded  # generators complain from destructors
        try:
            for thread in self._all:
                if thread.greenlet:  # begun, and not ended
                    thread.greenlet.throw(Discarded)
            if self.failure is not None:
                traceback.clear_frames(self.failure.__traceback__)  # now, not when somebody drops the failure
        finally:
            self.unwinding, sys.unraisablehook = False, former

    def kill(self, process: SimProcess) -> None:
        """End a process where it stands."""
        process.alive = False
        self.deaths_left -= 1
        self.threads = [thread for thread in self.threads if thread.process is not process]
        for action in self.on_death:
            action(process)

    def _leave(self, chosen: SimThread | None) -> None:
        """Switch to another thread, or with None to the hub; returns when this one is chosen."""
        thread = self.current
        if chosen is thread:
            return
        if chosen is None:
            self._over = True
            self._hub.switch()
        else:
            self.current = chosen
            chosen.greenlet.switch()

    def _decide(self, current: SimThread | None) -> SimThread | None:
        """Who goes on; None if the run is over."""
        while True:
            if all(thread.daemon for thread in self.threads):
                return None
            enabled = [thread for thread in self.threads if self._may_go_on(thread)]
            if not enabled:
                if self.buffers is not None and self.buffers.pending():
                    self.buffers.flush_all()
                    continue
                return self._next_timeout()
            if current is not None and current.fruitless > SPIN_POINTS and len(enabled) > 1:
                enabled.remove(current)
                current.fruitless = 0
            choice = self.strategy.choose(self, current, enabled)
            if isinstance(choice, SimThread):
                self.decisions.append(choice.letter)
                self._note_timeout(choice)
                return choice
            if isinstance(choice, SimProcess):
                self.decisions.append(choice.letter)
                if current is not None and current.process is choice:
                    current = None
                self.kill(choice)
            else:
                assert self.buffers is not None
                self.decisions.append(choice)
                self.buffers.flush_one(next(t for t in self._all if t.letter == choice[1]))

    def _next_timeout(self) -> SimThread:
        """Everybody waits: time goes on to the first deadline."""
        waiting = [thread for thread in self.threads if thread.deadline is not None]
        if not waiting:
            stuck = ", ".join(repr(thread) for thread in self.threads if not thread.daemon)
            self.failure = Violation(f"deadlock: {stuck} wait for ever")
            self._over = True
            return None  # type: ignore[return-value]
        first = min(waiting, key=lambda thread: thread.deadline or 0.0)
        self.decisions.append(first.letter)
        self.idle_timeouts += 1
        self._note_timeout(first)
        return first

    def _may_go_on(self, thread: SimThread) -> bool:
        """Whether it does not wait, or need not any more."""
        if thread.waiting is None or (thread.deadline is not None and thread.deadline <= self.now):
            return True
        return thread.waiting()

    def _note_timeout(self, thread: SimThread) -> None:
        """If a thread goes on although its wait has not come true, its time has come."""
        if thread.waiting is not None and not thread.waiting():
            assert thread.deadline is not None
            self.now = max(self.now, thread.deadline)
            self.timeouts += 1

    def _take_signals(self, thread: SimThread) -> None:
        if thread is thread.process.threads[0]:
            while thread.process.signals:
                thread.process.signals.pop(0)()
