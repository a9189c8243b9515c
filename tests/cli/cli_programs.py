"""Programs that the tests of the command line run, and what they look at."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from shmroute.shared.segment import SHM

CHECKPOINT = Path(__file__).resolve().parents[2] / "examples" / "tiny-mixtral"
PATIENCE = 60.0
"""After this many seconds something that must happen never will."""

WORKER = """
import sys, shmroute
with shmroute.attach(sys.argv[1]) as runtime:
    for line in sys.stdin:
        layer, expert = map(int, line.split())
        with runtime.expert(layer, expert, timeout=30) as weights:
            print("leased", layer, expert, flush=True)
"""

KILLED_CREATOR = """
import os, signal, sys
from shmroute.config import RuntimeConfig
from shmroute.pager_lock import PagerLock
from shmroute.shared.bell import Semaphore
from shmroute.shared.kernel import load_kernels
from shmroute.shared.segment import create_segment
load_kernels()
segment = create_segment(sys.argv[1], RuntimeConfig(num_layers=1, num_experts=4, top_k=1, expert_bytes=64, slots=2))
PagerLock(segment).try_acquire()
Semaphore(segment.semaphore_name(None))
print(segment.uuid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def eventually(condition: Callable[[], object]) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


class Program:
    """A running ``shmroute`` or worker, whose messages go to a file."""

    def __init__(self, command: list[str], log: Path, environment: dict[str, str]) -> None:
        self._log = log
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True, env=environment
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def messages(self) -> str:
        return self._log.read_text()

    def says(self, text: str) -> None:
        """Wait for a message."""
        eventually(lambda: text in self.messages or self.process.poll() is not None)
        assert text in self.messages, f"ended with code {self.process.returncode}: {self.messages}"

    def ask(self, line: str) -> str:
        """Send a line, get a line."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().strip()

    def leave(self) -> int:
        """Close its input and wait for its end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        return self.process.wait(PATIENCE)

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.process.kill()
        self.process.wait(PATIENCE)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait for the end; the exit code."""
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)


def companions(identifier: str) -> list[str]:
    """Lock file and semaphores of a segment."""
    return sorted(path.name for path in SHM.iterdir() if identifier in path.name)
