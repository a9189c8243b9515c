"""Other processes that take part in a measurement: they run one function after the other for the bench.

Started afresh rather than forked, so that they attach as any worker would. They are out of Ctrl-C's reach (the bench
ends them) and end by themselves when the bench is gone.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

from shmroute.errors import ShmrouteError
from shmroute.shared.kernel import load_kernels

PATIENCE = 60.0
"""Seconds after which an answer will never come."""

LEAVES = 2.0


class PartnerError(ShmrouteError):
    """A process that took part in a measurement failed."""


class Partner:
    """One such process.

    Parameters
    ----------
    cpu : int or None
        The core that it is pinned to.
    inherited : dict
        What it is given at its start and every function gets first: queues and locks can be handed over only then.
    """

    def __init__(self, cpu: int | None, inherited: dict[str, Any] | None = None) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, cpu, inherited or {}), daemon=True)
        with _interrupts_blocked():
            self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process.pid is not None
        return self._process.pid

    def begin(self, function: Callable[..., object], *arguments: object) -> None:
        """Have it call a module's function, with what it inherited before the arguments."""
        self._connection.send((function, arguments))

    def result(self) -> Any:
        """What the function returned.

        Raises
        ------
        PartnerError
            If it raised, or the process ended.
        """
        try:
            if not self._connection.poll(PATIENCE):
                raise PartnerError(f"a partner process did not answer within {PATIENCE:g} s")
            done, value = self._connection.recv()
        except (EOFError, OSError) as error:
            raise PartnerError("a partner process ended in the middle of a measurement") from error
        if not done:
            raise PartnerError(f"a partner process failed: {value}")
        return value

    def call(self, function: Callable[..., object], *arguments: object) -> Any:
        """`begin`, then `result`."""
        self.begin(function, *arguments)
        return self.result()

    def close(self, *, at_once: bool = False) -> None:
        """Let it end, or end it: `at_once` if the measurement is given up anyway."""
        self._connection.close()
        self._process.join(0 if at_once else LEAVES)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._process.close()

    def __enter__(self) -> Partner:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(at_once=error is not None)


@contextlib.contextmanager
def _interrupts_blocked() -> Iterator[None]:
    """A process started meanwhile never sees Ctrl-C; one that this process gets waits until the end of the block."""
    former = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def _serve(connection: Connection, cpu: int | None, inherited: dict[str, Any]) -> None:
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    load_kernels()
    with contextlib.suppress(EOFError, OSError):  # the bench closed its end, or is gone
        while True:
            function, arguments = connection.recv()
            try:
                answer = (True, function(inherited, *arguments))
            except Exception as error:  # noqa: BLE001 - whatever it is, it is told to the bench
                answer = (False, f"{type(error).__name__}: {error}")
            connection.send(answer)
    _close_held()


# ---------------------------------------------------------- what they keep from one call to the next

held: dict[str, Any] = {}
"""Of a partner process: by name, things with a ``close``."""


def _close_held() -> None:
    for thing in held.values():
        thing.close()
    held.clear()


def let_go(inherited: dict[str, Any]) -> None:
    """Close all that the process keeps."""
    _close_held()


def crew(bench_resources: contextlib.ExitStack, shared: dict[str, Any], count: int, cpus: list[int]) -> list[Partner]:
    """The first `count` partners of a run, pinned to the cores in turn; started when first needed, ended with it.

    They inherit one ``lock``.
    """
    partners: list[Partner] = shared.setdefault("crew", [])
    if "lock" not in shared:
        shared["lock"] = multiprocessing.get_context("spawn").Lock()
    while len(partners) < count:
        partner = Partner(cpus[len(partners) % len(cpus)], {"lock": shared["lock"]})
        partners.append(bench_resources.enter_context(partner))
    return partners[:count]
