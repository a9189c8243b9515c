"""Which faults were in force when: what tells an error that had to come from one that must not."""

from __future__ import annotations

import time
from dataclasses import dataclass
from enum import Enum
from typing import Any

from shmroute.pager.daemon import LONGEST_RETRY

PATIENT = 60.0
"""Timeout, in seconds, of what must succeed: no outage lasts nearly as long."""

HASTY = 5.0
"""A shorter timeout may run out on a busy machine with nothing wrong."""

MEMORY = 4 * LONGEST_RETRY
"""Seconds after which a fault that is over explains nothing any more."""


class Fault(Enum):
    """What can be wrong for a while."""

    OUTAGE = "the pager is stopped, or dead and not yet followed"
    UNREADABLE = "reads of an expert fail"
    CORRUPT = "reads of an expert return other bytes"
    DAMAGED = "the weights' file is cut short"
    HIDDEN = "the weights' file is not there"


@dataclass
class Window:
    """A time in which a fault was in force; times by the monotonic clock, which all processes share."""

    fault: Fault
    layer: int | None
    expert: int | None
    began: float
    ended: float | None = None

    def end(self) -> None:
        """It is over."""
        self.ended = time.monotonic()

    def overlaps(self, began: float, ended: float, after: float = 0.0) -> bool:
        """Whether it was in force in a span of time, or up to `after` seconds before it."""
        return self.began <= ended and (self.ended is None or self.ended + after >= began)

    def concerns(self, layer: int, expert: int) -> bool:
        """Whether it was about this expert."""
        return self.layer in (None, layer) and self.expert in (None, expert)


_FAULT_OF_REASON = (
    ("Input/output error", Fault.UNREADABLE),
    ("checksum mismatch", Fault.CORRUPT),
    ("the file changed", Fault.DAMAGED),
    ("truncated or damaged", Fault.DAMAGED),
)


class Timeline:
    """All faults of a run."""

    def __init__(self) -> None:
        self._windows: list[Window] = []

    def begin(self, fault: Fault, layer: int | None = None, expert: int | None = None) -> Window:
        """A fault begins now: to be called before it can have any effect."""
        now = time.monotonic()
        self._windows = [window for window in self._windows if window.overlaps(now, now, MEMORY)]
        window = Window(fault, layer, expert, now)
        self._windows.append(window)
        return window

    def explains(self, error: dict[str, Any]) -> bool:
        """Whether an error that a worker told had to be expected.

        Parameters
        ----------
        error : dict
            ``kind``, ``message``, ``began`` and ``ended`` of the call; ``timeout`` of waits; ``layer``, ``expert`` and
            ``reason`` of failed loads.
        """
        began, ended = error["began"], error["ended"]

        def in_force(*faults: Fault) -> bool:
            return any(window.fault in faults and window.overlaps(began, ended) for window in self._windows)

        match error["kind"]:
            case "ExpertLoadError":
                return self._explains_load(error)
            case "PagerUnavailable":
                return error["timeout"] < PATIENT and in_force(Fault.OUTAGE)
            case "ExpertTimeout":
                return error["timeout"] < HASTY or (error["timeout"] < PATIENT and in_force(Fault.OUTAGE))
            case "NoWorkerLane":  # lanes of the dead are freed by the pager; a stopped one keeps all others from it
                return in_force(Fault.OUTAGE)
            case "CheckpointError":  # of a worker that reads gates
                return in_force(Fault.HIDDEN, Fault.DAMAGED)
        return False

    def _explains_load(self, error: dict[str, Any]) -> bool:
        """A failed load is told until the back-off after it is over, and no later."""
        faults = [fault for words, fault in _FAULT_OF_REASON if words in error["reason"]]
        return any(
            window.fault in faults
            and window.concerns(error["layer"], error["expert"])
            and window.overlaps(error["began"], error["ended"], LONGEST_RETRY)
            for window in self._windows
        )
