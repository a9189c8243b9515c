"""Runs of several settings in worker processes: one for each core, each with one thread for its matrix products.

NumPy's own threads would gain little with matrices this small, and lose much on a busy machine.
"""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np

from shmroute.errors import EvaluationError
from shmroute.evaluation.loop import Run, Setting
from shmroute.evaluation.worker import Task
from shmroute.evaluation.worker_process import WorkerProcess

POLL = 0.1
"""Seconds between two calls of a watcher."""


def _started(task: Task) -> WorkerProcess:
    worker = WorkerProcess("shmroute.evaluation.worker", 1)
    worker.send(json.dumps(dataclasses.asdict(task)))
    return worker


class _Crew:
    """Workers that take settings as they come to be free."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._workers: list[WorkerProcess] = []
        self._idle: list[WorkerProcess] = []
        self._mutex = threading.Lock()
        self._ended = False

    def run(self, setting: Setting, watch: Callable[[float], None]) -> Run:
        """Run one setting in a worker that is free, or a new one; from any thread."""
        with self._mutex:
            if self._ended:
                raise EvaluationError("the evaluation was ended")
            if not self._idle:
                self._workers.append(_started(self._task))
                self._idle.append(self._workers[-1])
            worker = self._idle.pop()
        worker.send(setting.to_json())
        result = worker.hear("losses", watch)
        with self._mutex:
            self._idle.append(worker)
        return Run(np.array(result["losses"]), np.array(result["counts"]))

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
