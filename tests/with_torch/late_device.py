"""What stands for a GPU: two streams over CPU tensors that do what they were told as late, and as oddly, as they may.

Each stream does its work in order; between the streams only what waits is ordered, and what happens when is drawn at
random. So what is read too early is rubbish, what is given back or overwritten too early changes under a late reader,
and an order that `DeviceCache` forgot to ask for shows as wrong bytes.

Torch's own computations on CPU tensors are not late. For whole models (`prompt`), the computing stream does all that it
was told before anything else is asked of the device; the copies stay late.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable
from functools import partial

import torch

RUBBISH = 0xA5
"""What every byte is at first: as a float32 about -2.9e-16, as a bfloat16 likewise."""

COMPUTE, SIDE = 0, 1

Mark = tuple[int, int]
"""A stream, and how much it has been told."""


class LateDevice:
    """A `shmroute.integrations.transformers.device_cache.Device`.

    Parameters
    ----------
    seed : int
    prompt : bool
        See the file's head.
    deaf : str
        The name of a method that does nothing, or "after" for copies that wait for no mark: what tests must notice.
    """

    torch_device = torch.device("cpu")

    def __init__(self, seed: int = 0, *, prompt: bool = False, deaf: str = "") -> None:
        self._random = random.Random(seed)
        self._prompt, self._deaf = prompt, deaf
        self._queues: tuple[deque[Callable[[], None] | Mark], ...] = (deque(), deque())
        self._told, self._done = [0, 0], [0, 0]
        self._mutex = threading.RLock()
        self.locked: dict[int, int] = {}
        self.copies = 0

    # ---------------------------------------------------------- what a device does

    def allocate(self, slots: int, slot_bytes: int) -> torch.Tensor:
        return torch.full((slots, slot_bytes), RUBBISH, dtype=torch.uint8)

    def page_lock(self, address: int, size: int) -> None:
        assert address not in self.locked
        self.locked[address] = size

    def page_unlock(self, address: int) -> None:
        del self.locked[address]

    def begin(self) -> None:
        """All threads compute on one stream here."""

    def mark(self) -> Mark:
        return COMPUTE, self._told[COMPUTE]

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Mark) -> None:
        assert self.locked, "host memory that may move cannot be copied beside computations"
        if self._deaf != "after":
            self._tell(SIDE, after)
        self._tell(SIDE, partial(_copy, target, source))
        self.copies += 1

    def join(self) -> None:
        if self._deaf != "join":
            self._tell(COMPUTE, (SIDE, self._told[SIDE]))

    def finish(self) -> None:
        if self._deaf != "finish":
            self._reach((SIDE, self._told[SIDE]))

    def synchronize(self) -> None:
        for stream in (COMPUTE, SIDE):
            self._reach((stream, self._told[stream]))

    # ---------------------------------------------------------- the other side

    def compute(self, product: Callable[[], None]) -> None:
        """Queue what the model computes."""
        self._tell(COMPUTE, product)

    def _tell(self, stream: int, work: Callable[[], None] | Mark) -> None:
        with self._mutex:
            self._queues[stream].append(work)
            self._told[stream] += 1
            while self._random.random() < 0.5:
                self._step(self._random.choice((COMPUTE, SIDE)))
            if self._prompt:
                self._reach((COMPUTE, self._told[COMPUTE]))

    def _step(self, stream: int) -> bool:
        """Do one piece of a stream's work, if there is one that need not wait."""
        if not self._queues[stream]:
            return False
        work = self._queues[stream][0]
        if isinstance(work, tuple):
            if self._done[work[0]] < work[1]:
                return False
        else:
            work()
        self._queues[stream].popleft()
        self._done[stream] += 1
        return True

    def _reach(self, mark: Mark) -> None:
        """Do what must be done until a stream has come to a mark."""
        stream, position = mark
        with self._mutex:
            while self._done[stream] < position:
                if not self._step(stream):
                    awaited = self._queues[stream][0]
                    assert isinstance(awaited, tuple)
                    self._reach(awaited)


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)
