"""``python -m shmroute.bench.models_crew``: workers that decode with one model, and what they did and held.

The first line on standard input is a JSON object, the fields of `CrewTask`; one line answers, the fields of
`CrewReport`. All processes stay as they are until the next line, or until standard input ends.

Workers are forked from a process that has imported everything, as servers do that preload: what the libraries take is
there once for all of them. (This package and Numba with it are in all of them, Transformers' by itself too: some 50 MB
that those would not need.) Then each loads the model by itself, one after the other, decodes when all are ready, and
waits. A worker uses one thread. Whoever starts this process may be killed at any time, and so may it: all others then
end, and a pager that is left alone removes its segment.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import gc
import json
import multiprocessing
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import transformers

import shmroute
from shmroute.bench.checkpoints import forget_pages
from shmroute.bench.models_checkpoint import weights_of
from shmroute.bench.models_tasks import COPIED, SHARED, CrewReport, CrewTask
from shmroute.bench.partners import PartnerError
from shmroute.errors import ShmrouteError
from shmroute.integrations.transformers import load
from shmroute.process_memory import memory_of
from shmroute.shared.kernel import load_kernels

TIMEOUT = 120.0
"""Seconds to wait for an expert: where several workers share a slow disk, many are before it."""

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class _Times(transformers.StoppingCriteria):  # type: ignore[misc]
    """Notes when each token was done, and stops when time is up."""

    def __init__(self, seconds: float) -> None:
        self.done: list[float] = []
        self._until = time.monotonic() + seconds

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.done.append(time.monotonic())
        return torch.full((len(input_ids),), self.done[-1] >= self._until)


@contextlib.contextmanager
def _model(task: CrewTask, runtime_name: str | None) -> Iterator[Any]:
    if runtime_name is not None:
        with shmroute.attach(runtime_name) as runtime:
            model = load(task.folder, runtime, timeout=TIMEOUT)
            yield model
            del model
        return
    # As it comes by default: what is stored as it is computed with stays a view of the mapped file.
    model = transformers.AutoModelForCausalLM.from_pretrained(task.folder, dtype=torch.bfloat16, local_files_only=True)
    model.eval().requires_grad_(False)
    if task.manner == COPIED:
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    yield model


def _work(connection: Connection, task: CrewTask, number: int) -> None:
    """A worker's life: each step when it is told to."""
    die_with_parent()
    torch.set_num_threads(1)
    try:
        with _model(task, connection.recv()) as model:
            connection.send({})
            connection.recv()
            first = number * (model.config.vocab_size // task.workers)
            prompt = torch.arange(first, first + task.prompt)[None]
            times = _Times(task.seconds)
            with torch.no_grad():
                output = model.generate(
                    prompt, max_new_tokens=task.tokens, do_sample=False,
                    stopping_criteria=transformers.StoppingCriteriaList([times]),
                )  # fmt: skip
            connection.send({"ids": output[0, task.prompt :].tolist(), "done": times.done})
            connection.recv()
    except Exception as error:  # noqa: BLE001 - whatever it is, it is told
        connection.send({"error": f"{type(error).__name__}: {error}"})


class _Worker:
    def __init__(self, task: CrewTask, number: int) -> None:
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs, task, number), daemon=True)
        self._process.start()
        theirs.close()
        assert self._process.pid is not None
        self.pid = self._process.pid

    def tell(self, what: object) -> None:
        self._connection.send(what)

    def hear(self) -> dict[str, Any]:
        """Its next message; waits for its death too, since the pipe stays open in workers forked later."""
        if self._connection not in wait([self._connection, self._process.sentinel]):
            self._process.join()
            raise PartnerError(f"a worker ended with code {self._process.exitcode}")
        message: dict[str, Any] = self._connection.recv()
        if "error" in message:
            raise PartnerError(f"a worker failed: {message['error']}")
        return message

    def end(self) -> None:
        self._process.kill()
        self._process.join()


def storage_bytes(pid: int) -> int:
    """What a process had the kernel fetch from disks, reading ahead included, from ``/proc/PID/io``."""
    fields = re.findall(r"^read_bytes: (\d+)$", Path(f"/proc/{pid}/io").read_text(), re.MULTILINE)
    return int(fields[0])


@contextlib.contextmanager
def _runtime(task: CrewTask) -> Iterator[shmroute.Runtime | None]:
    """For `SHARED`, a runtime with a pager."""
    if task.manner != SHARED:
        yield None
        return
    router = shmroute.RouterConfig() if task.bonus is None else shmroute.RouterConfig(cache_bonus=task.bonus)
    config = shmroute.RuntimeConfig.from_checkpoint(task.folder, task.budget, router=router)
    with shmroute.create(f"bench-{os.getpid()}", config, pager=True, progress=None) as runtime:
        yield runtime


@contextlib.contextmanager
def crew_at_work(task: CrewTask) -> Iterator[CrewReport]:
    """Do a task; the processes last until the end of the block.

    Raises
    ------
    PartnerError
        If a worker fails or is killed.
    """
    if task.manner == SHARED:
        load_kernels()
    gc.collect()
    gc.freeze()  # else the collector writes to pages that are shared with the workers
    with contextlib.ExitStack() as resources:
        workers = []
        for number in range(task.workers):
            workers.append(_Worker(task, number))
            resources.callback(workers[-1].end)
        runtime = resources.enter_context(_runtime(task))
        for worker in workers:
            worker.tell(None if runtime is None else runtime.name)
            worker.hear()
        forget_pages(weights_of(Path(task.folder)))
        pids = [os.getpid(), *(worker.pid for worker in workers), *_pager_of(runtime)]
        read = sum(map(storage_bytes, pids))
        began = time.monotonic()
        for worker in workers:
            worker.tell("go")
        answers = [worker.hear() for worker in workers]
        seconds = max(answer["done"][-1] for answer in answers) - began
        read = sum(map(storage_bytes, pids)) - read
        memory = [memory_of(pid) for pid in pids]
        report = CrewReport(
            ids=[answer["ids"] for answer in answers],
            seconds=seconds,
            later_rate=sum(_later_rate(answer["done"]) for answer in answers),
            storage_bytes=read,
            pss=sum(one.pss for one in memory),
            rss=sum(one.rss for one in memory),
            processes=len(pids),
        )
        if runtime is not None:
            metrics = runtime.metrics()
            counters = metrics.total.counters
            report = dataclasses.replace(
                report, hit_rate=metrics.hit_rate, changed=counters["changed"] / (counters["hits"] + counters["misses"])
            )
        yield report


def _later_rate(done: list[float]) -> float:
    """Tokens per second of the second half of a worker's tokens."""
    if len(done) < 2:
        return 0.0
    half = len(done) // 2
    return (len(done) - half) / (done[-1] - done[half - 1])


def _pager_of(runtime: shmroute.Runtime | None) -> list[int]:
    if runtime is None:
        return []
    pid = runtime.metrics().pager.pid
    assert pid is not None, "it was started with the runtime"
    return [pid]


def main() -> int:
    """Do one task, and stay until told to leave."""
    die_with_parent()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    task = CrewTask(**json.loads(sys.stdin.readline()))
    try:
        with crew_at_work(task) as report:
            print(json.dumps(dataclasses.asdict(report)), flush=True)
            sys.stdin.readline()
    except ShmrouteError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
