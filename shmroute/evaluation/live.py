"""Settings run by real processes: a runtime with its pager, and a worker for each stream that runs the whole model.

What the simulated loop (`shmroute.evaluation.loop`) cannot know is measured here: how long workers stood still for
want of an expert, what was read, what memory all of it took. The workers run at their own pace, as in production, so
two runs of one setting differ a little. They are started once and attach to each setting's runtime in turn.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import shmroute
from shmroute.errors import EvaluationError
from shmroute.evaluation.loop import Run, Setting
from shmroute.evaluation.worker import Task
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


class _Worker:
    """One worker process, which decodes one stream of every pool."""

    def __init__(self, task: Task, stream: int) -> None:
        threads = str(max(1, (os.cpu_count() or 1) // task.streams))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "shmroute.evaluation.live_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), threads),
            text=True,
            start_new_session=True,  # Ctrl-C is for the parent alone, which then ends this one
        )
        self.pid = self._process.pid
        self.send({**dataclasses.asdict(task), "stream": stream})

    def send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended; what it said last is read next
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def hear(self, key: str, watch: Callable[[float], None] | None = None) -> Any:
        """The value of the next message that has `key`; reports of progress before it go to `watch`."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            message = json.loads(line)
            if "error" in message:
                raise EvaluationError(message["error"])
            if key in message:
                return message[key]
            if watch is not None:
                watch(message["done"])
        raise EvaluationError(
            f"a worker ended with code {self._process.wait()} before it was done; its message, if it had one, is on "
            f"standard error"
        )

    def end(self) -> None:
        """Kill it, whatever it is doing."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):  # of what it never read
                pipe.close()


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
    workers = [_Worker(task, stream) for stream in range(task.streams)]
    try:
        found: list[LiveRun] = []
        for setting in settings:
            found.append(_run(setting, workers, lambda share: watch(len(found) + share)))
            watch(len(found))
        return found
    finally:
        for worker in workers:
            worker.end()


def _run(setting: Setting, workers: Sequence[_Worker], watch: Callable[[float], Any]) -> LiveRun:
    with shmroute.create(f"shmroute-eval-{os.getpid()}", setting.config, pager=True) as runtime:
        for worker in workers:
            worker.send({"runtime": runtime.name})
        for worker in workers:
            worker.hear("ready")
        began = time.monotonic()
        for worker in workers:
            worker.send({"go": True})
        # The last stream's progress stands for all: they are of equal length, and take turns on the cores.
        losses = [worker.hear("losses", watch if worker is workers[-1] else None) for worker in workers]
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
        for worker in workers:
            worker.send({"leave": True})
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
