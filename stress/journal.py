"""How a worker that may be killed at any instruction tells what it did.

*Counts* are words of a small shared file mapping: the kernel keeps them when the process dies, so a kill loses nothing.
*Events* are lines that are appended by one `write` each: a kill loses at most the one it came before.
"""

from __future__ import annotations

import json
import os
from enum import IntEnum, auto
from pathlib import Path
from typing import Any

import numpy as np


class Count(IntEnum):
    """What workers count."""

    TOKENS = 0  # routed, one for each layer
    LEASES = auto()
    CHECKS = auto()  # digests of bytes under a lease, two to a lease
    HINTS = auto()  # prefetches and page-outs
    LOOKS = auto()  # snapshots of metrics, residents and affinities
    RETRIES = auto()  # of a layer, after an error that was reported
    ATTACHES = auto()


class Tally:
    """The counts of one worker, in a file; one process adds, any may read.

    Parameters
    ----------
    path : Path
        Made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            path.write_bytes(bytes(8 * len(Count)))
        self._words = np.memmap(path, np.int64, "r+", shape=(len(Count),))

    def add(self, count: Count, amount: int = 1) -> None:
        """Count something."""
        self._words[count] += amount

    def read(self) -> dict[Count, int]:
        """All counts now."""
        return {count: int(self._words[count]) for count in Count}


class Journal:
    """Where a worker tells events, each a JSON object.

    Parameters
    ----------
    path : Path
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def tell(self, event: str, **details: Any) -> None:
        """Append one event."""
        os.write(self._fd, (json.dumps({"event": event} | details) + "\n").encode())


class Tail:
    """The lines of a file that another process appends to, as they come.

    Parameters
    ----------
    path : Path
        Made if it is not there.
    """

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._rest = b""

    def lines(self) -> list[str]:
        """The lines that were completed since the last call; one that a kill cut short is never returned."""
        while chunk := os.read(self._fd, 1 << 16):
            self._rest += chunk
        *lines, self._rest = self._rest.split(b"\n")
        return [line.decode() for line in lines]

    def close(self) -> None:
        """Stop reading."""
        os.close(self._fd)
