"""`tests/processes/program.py`, but it attaches on command, any number of times: one process for many segments.

``python attaching_program.py``; the command ``attach`` takes the segment's name.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "processes"))

import program

import shmroute
from shmroute.shared.kernel import load_kernels


class AttachingProgram(program.Program):
    """The commands, on whichever segment it was told last."""

    def __init__(self, _: str) -> None:
        load_kernels()
        self.leases = {}
        self.loops = {}

    def attach(self, name: str) -> int:
        self.runtime = shmroute.attach(name)
        return self.runtime.router(0)._attachment.lane().number

    def close(self) -> None:
        """Leave with whatever leases are held."""
        self.leases.clear()
        super().close()


program.Program = AttachingProgram
sys.argv.append("no segment yet")
program.main()
