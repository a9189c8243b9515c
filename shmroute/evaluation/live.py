"""Settings run by real processes: a runtime with its pager, and a worker for each stream that runs the whole model.

What the simulated loop (`shmroute.evaluation.loop`) cannot know is measured here: how long workers stood still for
want of an expert, what was read, what memory all of it took. The workers run at their own pace, as in production, so
two runs of one setting differ a little. They are started once and attach to each setting's runtime in turn.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import shmroute
from shmroute.errors import EvaluationError
from shmroute.evaluation.loop import Run, Setting
from shmroute.evaluation.worker import Task
from shmroute.evaluation.worker_process import WorkerProcess
from shmroute.metrics import RuntimeMetrics
from shmroute.process_memory import ProcessMemory, memory_of
from shmroute.shared.metrics import LaneCounter


@dataclass(frozen=True)
class LiveRun(Run):
    """What one setting did, run by real processes. `counts` is int64 [streams, counters].

    Attributes
    ----------
    seconds : float
        From the start of all workers until the last had ended.
    bytes_read : int
        By the pager.
    workers : tuple of ProcessMemory
        Of each worker, at the end of its work; the segment is in the RSS of each, as far as it read of it.
    pager : ProcessMemory
    segment : int
        Bytes of the shared segment.
    """

    seconds: float
    bytes_read: int
    workers: tuple[ProcessMemory, ...]
    pager: ProcessMemory
    segment: int


def _started(task: Task, stream: int) -> WorkerProcess:
    """The process that decodes one stream of every pool."""
    worker = WorkerProcess("shmroute.evaluation.live_worker", max(1, (os.cpu_count() or 1) // task.streams))
    worker.send(json.dumps({**dataclasses.asdict(task), "stream": stream}))
    return worker


def _tell(workers: Sequence[WorkerProcess], **message: Any) -> None:
    for worker in workers:
        worker.send(json.dumps(message))


def run_all_live(task: Task, settings: Sequence[Setting], watch: Callable[[float], Any]) -> list[LiveRun]:
    """Run all settings, one after the other.

    Parameters
    ----------
    task : Task
    settings : sequence of Setting
        Without `layer_factors`; each has at least as many workers as the task has streams.
    watch : callable
        Called several times a second with how many settings are done, and of the one under way the share.

    Raises
    ------
    EvaluationError
        If a worker fails.
    """
    workers = [_started(task, stream) for stream in range(task.streams)]
    try:
        found: list[LiveRun] = []
        for setting in settings:
            found.append(_run(setting, workers, lambda share: watch(len(found) + share)))
            watch(len(found))
        return found
    finally:
        for worker in workers:
            worker.end()


def _run(setting: Setting, workers: Sequence[WorkerProcess], watch: Callable[[float], Any]) -> LiveRun:
    with shmroute.create(f"shmroute-eval-{os.getpid()}", setting.config, pager=True) as runtime:
        _tell(workers, runtime=runtime.name)
        for worker in workers:
            worker.hear("ready")
        began = time.monotonic()
        _tell(workers, go=True)
        # The last stream's progress stands for all: they are of equal length, and take turns on the cores.
        losses = [worker.hear("losses", watch if worker is workers[-1] else None)["losses"] for worker in workers]
        seconds = time.monotonic() - began
        metrics = runtime.metrics()
        run = LiveRun(
            losses=np.array(losses).T,
            counts=np.array([_counts(metrics, worker.pid) for worker in workers]),
            seconds=seconds,
            bytes_read=metrics.pager.counters["bytes_read"],
            workers=tuple(memory_of(worker.pid) for worker in workers),
            pager=memory_of(_pager_of(metrics)),
            segment=metrics.pool_bytes + metrics.control_bytes,
        )
        _tell(workers, leave=True)
        for worker in workers:
            worker.hear("left")
    return run


def _counts(metrics: RuntimeMetrics, pid: int) -> list[int]:
    mine = metrics.worker_of(pid)
    if mine is None:
        raise EvaluationError(f"worker {pid} has lost its lane")
    return [mine.counters[counter.name.lower()] for counter in LaneCounter]


def _pager_of(metrics: RuntimeMetrics) -> int:
    if metrics.pager.pid is None:
        raise EvaluationError("the pager has died; its message, if it had one, is on standard error")
    return metrics.pager.pid
