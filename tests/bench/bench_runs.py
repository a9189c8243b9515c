"""What a run of ``shmroute bench`` printed, and what it left."""

from __future__ import annotations

import json
from typing import Any, Protocol

from shmroute.shared.segment import SHM


class Result(Protocol):
    """A command that has ended."""

    exit_code: int
    stdout: str
    stderr: str
    output: str


def left_by(pid: int) -> list[str]:
    """What a process that ran the benchmarks left in shared memory."""
    return [
        path.name
        for path in SHM.iterdir()
        if path.name.startswith(f"shmroute.bench-{pid}-") or f"bench-{pid}-" in path.name or f"_{pid}_iox2" in path.name
    ]


def report_of(done: Result) -> dict[str, Any]:
    """The JSON that a run printed."""
    report: dict[str, Any] = json.loads(done.stdout)
    return report
