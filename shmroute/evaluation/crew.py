"""Runs of several settings in worker processes: one for each core, each with one thread for its matrix products.

NumPy's own threads would gain little with matrices this small, and lose much on a busy machine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from shmroute.errors import EvaluationError
from shmroute.evaluation.loop import Run, Setting
from shmroute.evaluation.worker import Task

POLL = 0.1
"""Seconds between two calls of a watcher."""


class _Worker:
    """One worker process, started for the first settings that it gets."""

    def __init__(self, task: Task) -> None:
        one_thread = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "shmroute.evaluation.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | one_thread,
            text=True,
            start_new_session=True,  # Ctrl-C is for the parent alone, which then ends this one
        )
        self._send(json.dumps(dataclasses.asdict(task)))

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return  # it has ended; what it said last is read next

    def run(self, setting: Setting, watch: Callable[[float], None]) -> Run:
        """Run one setting; `watch` is called with the share that is done."""
        self._send(setting.to_json())
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            if "error" in message:
                raise EvaluationError(message["error"])
            if "losses" in message:
                return Run(np.array(message["losses"]), np.array(message["counts"]))
            watch(message["done"])
        raise EvaluationError(
            f"a worker ended with code {self._process.wait()} before it was done; its message, if it had one, is on "
            f"standard error (too little memory? Fewer --jobs or --pools take less)"
        )

    def end(self) -> None:
        """Kill it, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # of what it never read
                pipe.close()


class _Crew:
    """Workers that take settings as they come to be free."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._workers: list[_Worker] = []
        self._idle: list[_Worker] = []
        self._mutex = threading.Lock()
        self._ended = False

    def run(self, setting: Setting, watch: Callable[[float], None]) -> Run:
        """Run one setting in a worker that is free, or a new one; from any thread."""
        with self._mutex:
            if self._ended:
                raise EvaluationError("the evaluation was ended")
            if not self._idle:
                self._workers.append(_Worker(self._task))
                self._idle.append(self._workers[-1])
            worker = self._idle.pop()
        result = worker.run(setting, watch)
        with self._mutex:
            self._idle.append(worker)
        return result

    def end(self) -> None:
        """End all workers."""
        with self._mutex:
            self._ended = True
            for worker in self._workers:
                worker.end()


def run_all(task: Task, settings: Sequence[Setting], jobs: int, watch: Callable[[float], Any]) -> list[Run]:
    """Run all settings, `jobs` at a time.

    Parameters
    ----------
    task : Task
    settings : sequence of Setting
    jobs : int
    watch : callable
        Called several times a second with how many settings are done, and of those under way the shares.

    Raises
    ------
    EvaluationError
        If a worker fails; the others are ended.
    """
    crew = _Crew(task)
    done = [0.0] * len(settings)

    def one(index: int) -> Run:
        def note(share: float) -> None:
            done[index] = share

        result = crew.run(settings[index], note)
        done[index] = 1.0
        return result

    with ThreadPoolExecutor(jobs) as threads:
        futures: list[Future[Run]] = [threads.submit(one, index) for index in range(len(settings))]
        try:
            pending = set(futures)
            while pending:
                finished, pending = wait(pending, POLL)
                for future in finished:
                    future.result()
                watch(sum(done))
        finally:
            crew.end()
    return [future.result() for future in futures]
