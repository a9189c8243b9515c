"""The workers: started, given jobs, replaced when they die. A death costs its job a retry, and nobody else anything."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from shmroute.errors import ServingError
from shmroute.serving.dispatch import Dispatch
from shmroute.serving.messages import (
    Begun,
    Cancel,
    Failed,
    Finished,
    FromWorker,
    Job,
    Ready,
    Refused,
    Token,
    ToWorker,
    Unable,
    from_worker,
)

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
"""Seconds before a worker that died before it did anything is started again; doubled each time."""

LAST_BREATH = 2.0
"""Seconds that a worker which says no more has to end by itself."""

FUTILE_STARTS = 3
"""A worker that died so often before it was ready is counted out for the start of the server."""

LONGEST_LINE = 1 << 24
"""Bytes of a message from a worker: an echoed prompt is the longest."""

Outcome = Begun | Token | Finished | Refused | Failed
"""What becomes of a job."""


@dataclass(eq=False)
class Ticket:
    """A job on its way, across workers if need be.

    Attributes
    ----------
    job : Job
    deliver : callable
        Gets every outcome once: `Begun` first, then tokens; `Finished`, `Refused` or `Failed` last.
    generated : list of int
        Tokens delivered.
    begun, ended, retried : bool
    """

    job: Job
    deliver: Callable[[Outcome], None]
    generated: list[int] = field(default_factory=list)
    begun: bool = False
    ended: bool = False
    retried: bool = False


@dataclass(eq=False)
class Worker:
    """One worker process."""

    number: int
    process: asyncio.subprocess.Process
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    ready: Ready | None = None
    ticket: Ticket | None = None
    jobs: int = 0
    unable: str = ""

    def send(self, message: ToWorker) -> None:
        """To a worker that may be dead: the end of what it says will tell."""
        if not self.writer.is_closing():
            self.writer.write(message.line())


@dataclass
class CrewCounters:
    """What happened to the workers so far.

    Attributes
    ----------
    deaths : int
        Of workers, before or after they were ready.
    retries : int
        Jobs given to another worker.
    """

    deaths: int = 0
    retries: int = 0


class Crew:
    """A fixed number of worker processes, kept alive.

    Parameters
    ----------
    command : sequence of str
        Starts one; gets ``--descriptor N`` in addition.
    count : int
    threads : int
        Of each worker's matrix products.
    tell : callable
        Gets a line when something happened that somebody should know.
    """

    def __init__(self, command: Sequence[str], count: int, threads: int, tell: Callable[[str], None]) -> None:
        self._command, self._threads, self._tell = command, threads, tell
        self.count = count
        self._workers: dict[int, Worker] = {}
        self._dispatch: Dispatch[Ticket, Worker] = Dispatch(self._assign)
        self._next = 0
        self._changed = asyncio.Event()
        self._futile: dict[int, int] = {}
        self._unable = ""
        self._keepers: list[asyncio.Task[None]] = []
        self.counters = CrewCounters()

    @property
    def ready(self) -> int:
        """Workers that have loaded the model."""
        return sum(worker.ready is not None for worker in self._workers.values())

    @property
    def running(self) -> int:
        """Jobs that a worker is at."""
        return sum(worker.ticket is not None for worker in self._workers.values())

    @property
    def waiting(self) -> int:
        """Jobs for which no worker is free."""
        return self._dispatch.waiting

    @property
    def idle(self) -> int:
        """Workers that would begin with a job at once."""
        return self._dispatch.idle

    @property
    def chats(self) -> bool:
        """Whether the workers have a chat template."""
        return any(worker.ready is not None and worker.ready.chats for worker in self._workers.values())

    # ---------------------------------------------------------- life

    @contextlib.asynccontextmanager
    async def at_work(self) -> AsyncIterator[None]:
        """Keep workers alive for the length of a block; at its end they are killed."""
        self._keepers = [asyncio.create_task(self._keep(number)) for number in range(self.count)]
        try:
            yield
        finally:
            for keeper in self._keepers:
                keeper.cancel()
            await asyncio.gather(*self._keepers, return_exceptions=True)

    async def started(self, watch: Callable[[int], None]) -> None:
        """Wait until every worker is ready, or counted out while others are ready.

        Parameters
        ----------
        watch : callable
            Gets the number of ready workers when it may have changed.

        Raises
        ------
        ServingError
            If no worker comes up.
        """
        while True:
            watch(self.ready)
            out = sum(count >= FUTILE_STARTS for count in self._futile.values())
            if self._unable and not self.ready:
                raise ServingError(f"no worker can load the model: {self._unable}")
            if out == self.count:
                raise ServingError(
                    f"no worker came up, each was started {FUTILE_STARTS} times; their messages are on standard error"
                )
            if self.ready and self.ready + out >= self.count:
                return
            await self._changed.wait()
            self._changed.clear()

    async def failure(self) -> None:
        """Wait for ever, unless keeping workers fails itself; then raise why."""
        done, _ = await asyncio.wait(self._keepers, return_when=asyncio.FIRST_EXCEPTION)
        for keeper in done:
            keeper.result()

    async def _keep(self, number: int) -> None:
        """Have one worker at work, and another whenever it dies."""
        pause = FIRST_PAUSE
        while True:
            worker = await self._start(number)
            try:
                await self._listen(worker)
                # So that it is known how it ended. (`asyncio.wait_for` may swallow the cancellation of this task.)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(LAST_BREATH):
                        await worker.process.wait()
            finally:
                await self._bury(worker)
            code = worker.process.returncode
            if worker.ready is None:
                self._futile[number] = self._futile.get(number, 0) + 1
                self._unable = worker.unable or self._unable
            self._changed.set()
            if worker.jobs:
                pause = FIRST_PAUSE
                self._tell(f"worker {number} ended ({_cause(code)}); starting another")
                continue
            why = worker.unable or _cause(code)
            self._tell(f"worker {number} ended before it did anything ({why}); starting another in {pause:g} s")
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    async def _start(self, number: int) -> Worker:
        mine, its = socket.socketpair()
        with its:
            reader, writer = await asyncio.open_connection(sock=mine, limit=LONGEST_LINE)
            threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(self._threads))
            # Threads that spin while they wait for each other take the cores from other workers and the pager: on a
            # busy machine a token then takes ten times as long.
            threads |= {} if "OMP_WAIT_POLICY" in os.environ else {"OMP_WAIT_POLICY": "PASSIVE"}
            process = await asyncio.create_subprocess_exec(
                *self._command, "--descriptor", str(its.fileno()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                pass_fds=(its.fileno(),),
                start_new_session=True,  # Ctrl-C is for the server, which then drains
                env=os.environ | threads | {
                    "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                    "HF_HUB_OFFLINE": "1",
                    "TOKENIZERS_PARALLELISM": "false",
                },
            )  # fmt: skip
        worker = self._workers[number] = Worker(number, process, reader, writer)
        return worker

    async def _bury(self, worker: Worker) -> None:
        """See that a worker is dead, and forget it."""
        self._workers.pop(worker.number, None)
        worker.writer.close()
        if worker.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                worker.process.kill()
        await worker.process.wait()

    # ---------------------------------------------------------- jobs

    def submit(self, job: Job, deliver: Callable[[Outcome], None]) -> Ticket:
        """Have a job done; its number is replaced."""
        self._next += 1
        ticket = Ticket(job.model_copy(update={"number": self._next}), deliver)
        self._dispatch.add(ticket)
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Nobody wants the rest of it; nothing more is delivered."""
        if ticket.ended:
            return
        ticket.ended = True
        if self._dispatch.withdraw(ticket):
            return
        for worker in self._workers.values():
            if worker.ticket is ticket:
                worker.send(Cancel(number=ticket.job.number))

    def _assign(self, worker: Worker, ticket: Ticket) -> None:
        worker.ticket = ticket
        worker.jobs += 1
        worker.send(ticket.job.model_copy(update={"generated": list(ticket.generated)}))

    async def _listen(self, worker: Worker) -> None:
        """Hear a worker out, to its end; its job goes to another at once."""
        with contextlib.suppress(ConnectionError):
            async for line in worker.reader:
                if not line.endswith(b"\n"):
                    break  # it died in the middle of a line
                self._hear(worker, from_worker.validate_json(line))
        self.counters.deaths += 1
        self._dispatch.lose(worker)
        self._give_up(worker)

    def _hear(self, worker: Worker, message: FromWorker) -> None:
        if isinstance(message, Ready):
            worker.ready = message
            self._futile.pop(worker.number, None)
            self._changed.set()
            self._dispatch.free(worker)
        elif isinstance(message, Unable):
            worker.unable = message.reason
        else:
            ticket = worker.ticket
            assert ticket is not None and ticket.job.number == message.number, "a worker speaks of what is not its job"
            self._outcome(ticket, message)
            if not isinstance(message, Begun | Token):
                worker.ticket = None
                self._dispatch.free(worker)

    def _outcome(self, ticket: Ticket, outcome: Outcome) -> None:
        if ticket.ended:
            return
        if isinstance(outcome, Failed) and outcome.retry and self._retry(ticket):
            return
        if isinstance(outcome, Begun):
            if ticket.begun:
                return  # by another worker
            ticket.begun = True
        elif isinstance(outcome, Token):
            ticket.generated.append(outcome.token)
        else:
            ticket.ended = True
        ticket.deliver(outcome)

    def _retry(self, ticket: Ticket) -> bool:
        if ticket.retried:
            return False
        ticket.retried = True
        self.counters.retries += 1
        self._dispatch.add(ticket, first=True)
        return True

    def _give_up(self, worker: Worker) -> None:
        """What a dead worker was at goes to another one, once."""
        ticket, worker.ticket = worker.ticket, None
        if ticket is None or ticket.ended or self._retry(ticket):
            return
        reason = "the worker died, and so did the one before it, which had the same request"
        self._outcome(ticket, Failed(number=ticket.job.number, reason=reason, retry=False))


def _cause(code: int | None) -> str:
    """How a process ended, for people."""
    if code is None or code >= 0:
        return f"exit code {code}"
    return signal.Signals(-code).name
