"""A pager at work for as long as the server runs: another one is started when it dies, and finds the cache warm."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Callable

from shmroute.errors import PagerStartError, ServingError
from shmroute.pager.process import pager_alive, start_pager, stop_pager
from shmroute.shared.layout import HEADER_OWNER
from shmroute.shared.segment import attach_segment

ATTEMPTS = 5
"""So many times in a row a pager may fail to come up."""

FIRST_PAUSE = 0.5
"""Seconds after the first time, doubled each time."""

LOOK = 0.2
"""Seconds between looks at a pager that is not this process's own."""


class PagerKeeper:
    """Starts a pager for a segment that this process owns, and another one whenever it ends.

    Parameters
    ----------
    name : str
        Of the segment.
    tell : callable
        Gets a line when the pager ended, and when another is at work.

    Attributes
    ----------
    restarts : int

    Raises
    ------
    PagerStartError
        If the first one does not come up.
    """

    def __init__(self, name: str, tell: Callable[[str], None]) -> None:
        self._segment = attach_segment(name)
        self._tell = tell
        self.restarts = 0
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._start()
        except BaseException:
            self._segment.close()
            raise

    async def keep(self) -> None:
        """Run until cancelled.

        Raises
        ------
        ServingError
            If no pager comes up any more.
        """
        while True:
            await self._end_of_pager()
            assert self._process is not None
            self._tell(f"the pager ended (code {self._process.wait()}); starting another, which finds the cache warm")
            await self._restart()
            self.restarts += 1
            self._tell("a pager is at work again")

    def close(self) -> None:
        """Stop the pager; after its segment was destroyed."""
        if self._process is not None:
            stop_pager(self._process)
        self._segment.close()

    def _start(self) -> None:
        self._process = start_pager(self._segment, self._segment.read(HEADER_OWNER))

    async def _restart(self) -> None:
        pause = FIRST_PAUSE
        for attempt in range(ATTEMPTS):
            if pager_alive(self._segment):
                return  # a standby was faster
            try:
                await asyncio.to_thread(self._start)
            except PagerStartError as error:
                self._tell(str(error))
                if attempt + 1 < ATTEMPTS:
                    await asyncio.sleep(pause)
                    pause *= 2
            else:
                return
        if not pager_alive(self._segment):
            raise ServingError(f"no pager came up in {ATTEMPTS} attempts; their messages are on standard error")

    async def _end_of_pager(self) -> None:
        """Wait until the pager is dead, be it this process's child or a standby that took over."""
        assert self._process is not None
        loop = asyncio.get_running_loop()
        if self._process.poll() is None:
            ended = asyncio.Event()
            descriptor = os.pidfd_open(self._process.pid)
            loop.add_reader(descriptor, ended.set)
            try:
                await ended.wait()
            finally:
                loop.remove_reader(descriptor)
                os.close(descriptor)
            self._process.wait()
        while pager_alive(self._segment):
            await asyncio.sleep(LOOK)
