"""How the commands write: consoles, error lines, sizes and durations for people."""

from __future__ import annotations

import contextlib
import os
import sys

from rich.console import Console
from rich.text import Text

PLAIN_WIDTH = 140
"""Columns where there is no terminal: at the usual 80 tables would be cut."""


def console() -> Console:
    """Standard output."""
    width = None if sys.stdout.isatty() or "COLUMNS" in os.environ else PLAIN_WIDTH
    return Console(width=width, highlight=False)


def note(message: str) -> None:
    """One line on standard error. A pager whose terminal went away must not end by it."""
    with contextlib.suppress(OSError):
        print(f"shmroute: {message}", file=sys.stderr, flush=True)


def complain(message: str) -> None:
    """One red line on standard error."""
    Console(stderr=True, highlight=False).print(Text(f"shmroute: {message}", style="red"), soft_wrap=True)


def human_bytes(size: int) -> str:
    """A size with three digits or so: ``4.5 MiB``."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def human_duration(microseconds: float | None) -> str:
    """A duration with its unit, ``-`` for none."""
    if microseconds is None:
        return "-"
    if microseconds < 1000:
        return f"{microseconds:.1f} µs"
    if microseconds < 1_000_000:
        return f"{microseconds / 1000:.1f} ms"
    return f"{microseconds / 1_000_000:.1f} s"


def human_share(share: float | None) -> str:
    """A share in percent, ``-`` for none."""
    return "-" if share is None else f"{share:.1%}"
