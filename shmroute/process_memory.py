"""What memory a process holds, as the kernel counts it in ``/proc/PID/smaps_rollup``."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_LINE = re.compile(r"^(\w+):\s+(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True)
class ProcessMemory:
    """One process's memory, in bytes.

    Attributes
    ----------
    rss : int
        Resident pages, those that it shares with others in full.
    pss : int
        Resident pages, each divided by the number of processes that map it: the sum over processes is what they take
        together.
    private : int
        Resident pages that nobody else maps.
    """

    rss: int
    pss: int
    private: int


def memory_of(pid: int | None = None) -> ProcessMemory:
    """The memory of a process, by default this one.

    Raises
    ------
    OSError
        If there is no such process, or it is another user's.
    """
    text = Path(f"/proc/{os.getpid() if pid is None else pid}/smaps_rollup").read_text()
    fields = {name: int(kilobytes) * 1024 for name, kilobytes in _LINE.findall(text)}
    return ProcessMemory(fields["Rss"], fields["Pss"], fields["Private_Clean"] + fields["Private_Dirty"])
