"""Which worker gets which job: the job that waits longest goes to the worker that has been idle longest.

A worker has one job at a time, so an idle one is always the least busy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

J = TypeVar("J")
W = TypeVar("W")


class Dispatch(Generic[J, W]):
    """Jobs that wait and workers that are idle; never both.

    Parameters
    ----------
    assign : callable
        ``assign(worker, job)``; the worker is idle no more. Must not call back into this object.
    """

    def __init__(self, assign: Callable[[W, J], None]) -> None:
        self._assign = assign
        self._waiting: deque[J] = deque()
        self._idle: deque[W] = deque()

    @property
    def waiting(self) -> int:
        """Jobs without a worker."""
        return len(self._waiting)

    @property
    def idle(self) -> int:
        """Workers without a job."""
        return len(self._idle)

    def add(self, job: J, *, first: bool = False) -> None:
        """A job to be done; `first` before all others, since it has waited once already."""
        if first:
            self._waiting.appendleft(job)
        else:
            self._waiting.append(job)
        self._match()

    def free(self, worker: W) -> None:
        """A worker has come up, or has done its job."""
        assert worker not in self._idle
        self._idle.append(worker)
        self._match()

    def lose(self, worker: W) -> None:
        """A worker, idle or not, is gone."""
        if worker in self._idle:
            self._idle.remove(worker)

    def withdraw(self, job: J) -> bool:
        """Take back a job; False if it waits no more."""
        if job not in self._waiting:
            return False
        self._waiting.remove(job)
        return True

    def _match(self) -> None:
        while self._waiting and self._idle:
            self._assign(self._idle.popleft(), self._waiting.popleft())
