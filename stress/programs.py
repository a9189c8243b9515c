"""Programs that this one starts: in sessions of their own, with their output in files, and never left behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from stress.errors import StressFailure

ROOT = Path(__file__).resolve().parents[1]
PATIENCE = 120.0
"""Seconds after which something that must happen has failed to; nothing waits that long on a healthy machine."""


class Program:
    """One process, ``python -m MODULE ARGUMENTS``.

    Attributes
    ----------
    killed : bool
        Whether it was sent SIGKILL.
    stopped : bool
        Whether it was sent SIGSTOP last, not SIGCONT.
    """

    def __init__(self, module: str, arguments: list[str], output: Path, *, reads: bool = False) -> None:
        self._messages = output.with_suffix(".err")
        # One core's worth of work each: numpy's own threads would only fight over the cores.
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        with output.open("ab") as out, self._messages.open("ab") as err:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                stdin=subprocess.PIPE if reads else subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the command, which then ends this one
            )
        self.killed = False
        self.stopped = False

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.popen.pid

    @property
    def running(self) -> bool:
        """Whether it has not ended; a stopped one runs."""
        return self.popen.poll() is None

    @property
    def messages(self) -> str:
        """The end of what it wrote to standard error."""
        return self._messages.read_text(errors="replace")[-4000:]

    def kill(self) -> None:
        """SIGKILL; does not wait."""
        self.killed = True
        self.popen.kill()

    def stop(self) -> None:
        """SIGSTOP, and wait until it has effect."""
        self.stopped = True
        self.popen.send_signal(signal.SIGSTOP)
        deadline = time.monotonic() + PATIENCE
        while process_state(self.pid) not in ("T", "t", "Z", ""):
            if time.monotonic() > deadline:
                raise StressFailure(f"process {self.pid} did not stop within {PATIENCE:g} s of SIGSTOP")
            time.sleep(0.001)

    def resume(self) -> None:
        """SIGCONT."""
        self.stopped = False
        self.popen.send_signal(signal.SIGCONT)

    def terminate(self) -> None:
        """SIGTERM."""
        self.popen.terminate()

    def clean_up(self) -> None:
        """End it, whatever it does, and close what leads to it."""
        if self.running:
            self.popen.kill()
        self.popen.wait()
        if self.popen.stdin is not None:
            with contextlib.suppress(BrokenPipeError):  # a line that the dead did not read any more
                self.popen.stdin.close()


def process_state(pid: int) -> str:
    """Its state letter, "" if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def children() -> list[int]:
    """The processes that this one is the parent of, zombies included."""
    found = []
    for path in Path("/proc").iterdir():
        if not path.name.isdigit():
            continue
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == os.getpid():
            found.append(int(path.name))
    return found
