"""How a run shows that it goes on: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

PLAIN_INTERVAL = 5.0
"""Seconds between lines where there is no terminal."""

Show = Callable[[float, str], None]
"""Called often, with the share that is done and how things are."""


@contextlib.contextmanager
def display(console: Console, title: str) -> Iterator[Show]:
    """What to call with a run's progress."""
    if not console.is_terminal:
        yield _PlainLines(console, title)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[status]}"))
    with Progress(*columns, console=console, refresh_per_second=8) as bar:
        task: TaskID = bar.add_task(title, total=1.0, status="")
        yield lambda share, status: bar.update(task, completed=min(share, 1.0), status=status)


class _PlainLines:
    def __init__(self, console: Console, title: str) -> None:
        self._console, self._title = console, title
        self._began = time.monotonic()
        self._next = 0.0

    def __call__(self, share: float, status: str) -> None:
        now = time.monotonic()
        if now >= self._next:
            self._next = now + PLAIN_INTERVAL
            self._console.print(f"{self._title}  {now - self._began:5.0f} s  {status}", soft_wrap=True)


def listen_to_signals() -> None:
    """SIGTERM ends the command as Ctrl-C does, through its ``with`` blocks, which leave nothing behind."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # Whoever runs it in the background of a shell script has SIGINT ignored for it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
