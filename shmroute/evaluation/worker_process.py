"""A worker process of an evaluation, as its parent sees it: lines of JSON to it and from it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from shmroute.errors import EvaluationError


class WorkerProcess:
    """A module of this package, run by an interpreter of its own.

    Parameters
    ----------
    module : str
        What ``python -m`` runs.
    threads : int
        For its matrix products.

    Attributes
    ----------
    pid : int
    """

    def __init__(self, module: str, threads: int) -> None:
        limits = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        self._process = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | limits,
            text=True,
            start_new_session=True,  # Ctrl-C is for the parent alone, which then ends this one
        )
        self.pid = self._process.pid

    def send(self, line: str) -> None:
        """Send one line."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; what it said last is read next
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def hear(self, key: str, watch: Callable[[float], None] | None = None) -> dict[str, Any]:
        """The next message that has `key`; reports of progress before it go to `watch`.

        Raises
        ------
        EvaluationError
            If the worker reports an error, or ends.
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message: dict[str, Any] = json.loads(line)
            if "error" in message:
                raise EvaluationError(message["error"])
            if key in message:
                return message
            if watch is not None:
                watch(message["done"])
        raise EvaluationError(
            f"a worker ended with code {self._process.wait()} before it was done; its message, if it had one, is on "
            f"standard error (too little memory? Fewer --jobs, --streams or --pools take less)"
        )

    def end(self) -> None:
        """Kill it, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # of what it never read
                pipe.close()
