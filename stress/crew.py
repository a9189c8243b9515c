"""The workers: a fixed number of places, in each of which there is a worker; whoever dies is replaced."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stress.errors import StressFailure
from stress.journal import Count, Tail, Tally
from stress.programs import Program
from stress.timeline import Timeline
from stress.work import Item, WorkList


class Worker(Program):
    """One worker process, and what it has told so far.

    Attributes
    ----------
    ready : bool
        Whether it has attached.
    item : Item or None
        What it is at.
    tally : Tally
    """

    def __init__(self, number: int, name: str, folder: Path, seed: int, reattach: int) -> None:
        self._files = [folder / "journals" / f"worker-{number}.{kind}" for kind in ("jsonl", "tally", "out", "err")]
        journal, tally, output, _ = self._files
        self.tail = Tail(journal)
        self.tally = Tally(tally)
        self.ready = False
        self.item: Item | None = None
        arguments = [name, "--folder", str(folder), "--journal", str(journal), "--tally", str(tally)]
        arguments += ["--seed", str(seed), "--reattach", str(reattach)]
        super().__init__("stress.worker", arguments, output, reads=True)

    def assign(self, item: Item) -> None:
        """Give it something to do."""
        self.item = item
        assert self.popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it died just now; whoever finds that gives the item back
            self.popen.stdin.write(item.line().encode())
            self.popen.stdin.flush()

    def dismiss(self) -> None:
        """Tell it that there is no more work."""
        assert self.popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.popen.stdin.close()

    def clean_up(self) -> None:
        """End it, and remove what it wrote: a run may have thousands of workers."""
        super().clean_up()
        self.tail.close()
        for file in self._files:
            file.unlink(missing_ok=True)


class Crew:
    """All workers of a run.

    Parameters
    ----------
    size : int
    hire : callable
        Starts the worker of a number.
    work : WorkList
    timeline : Timeline

    Attributes
    ----------
    workers : list of Worker
    killed : int
        Workers that died of a kill and were replaced.
    errors : Counter
        Errors that workers told and the timeline explains, by kind; of loads by reason.
    """

    def __init__(self, size: int, hire: Callable[[int], Worker], work: WorkList, timeline: Timeline) -> None:
        self._hire = hire
        self._work = work
        self._timeline = timeline
        self._numbers = itertools.count()
        self._dismissed = False
        self._past: Counter[Count] = Counter()
        self.killed = 0
        self.errors: Counter[str] = Counter()
        self.workers: list[Worker] = []
        for _ in range(size):
            self.workers.append(hire(next(self._numbers)))

    @property
    def ready(self) -> list[Worker]:
        """Those at work."""
        return [worker for worker in self.workers if worker.ready and not worker.killed]

    @property
    def idle(self) -> bool:
        """Whether nobody has anything to do, and all have told that they are ready."""
        return all(worker.ready and worker.item is None for worker in self.workers)

    def counts(self) -> Counter[Count]:
        """What all workers that ever were have counted."""
        total = Counter(self._past)
        for worker in self.workers:
            total.update(worker.tally.read())
        return total

    def step(self) -> None:
        """Hear everybody, replace the dead, hand out work.

        Raises
        ------
        StressFailure
            If a worker told something that must not be, or ended by itself.
        """
        for place, worker in enumerate(self.workers):
            ended = not worker.running  # asked first: what it told is complete then
            for line in worker.tail.lines():
                self._hear(worker, json.loads(line))
            if ended:
                self._bury(worker)
                self.workers[place] = self._hire(next(self._numbers))
            elif worker.ready and not worker.killed and worker.item is None and (item := self._work.take()) is not None:
                worker.assign(item)

    def dismiss(self) -> None:
        """Let all leave: to be called when they are idle."""
        for worker in self.workers:
            worker.resume()
            worker.dismiss()

    def has_left(self) -> bool:
        """After `dismiss`: whether all are gone, in good order.

        Raises
        ------
        StressFailure
            If one left otherwise.
        """
        for worker in list(self.workers):
            ended = not worker.running
            for line in worker.tail.lines():
                self._hear(worker, json.loads(line))
            if ended:
                if worker.popen.returncode != 0:
                    raise self._unexpected_end(worker)
                self._retire(worker)
                self.workers.remove(worker)
        return not self.workers

    def clean_up(self) -> None:
        """End everybody at once."""
        for worker in self.workers:
            worker.clean_up()
        self.workers.clear()

    def _hear(self, worker: Worker, told: dict[str, Any]) -> None:
        match told["event"]:
            case "ready":
                worker.ready = True
            case "done":
                assert worker.item is not None and worker.item.number == told["item"]
                self._work.finish(worker.item)
                worker.item = None
            case "error":
                if not self._timeline.explains(told):
                    raise StressFailure(
                        f"worker {worker.pid} got an error that no fault explains: {told['kind']}: {told['message']}"
                    )
                kind = told["kind"]
                self.errors[f"{kind}: {told['reason']}" if kind == "ExpertLoadError" else kind] += 1
            case "wrong":
                raise StressFailure(f"worker {worker.pid}: {told['message']}")
            case "failed":
                raise StressFailure(f"worker {worker.pid} failed: {told['kind']}: {told['message']}\n{worker.messages}")

    def _bury(self, worker: Worker) -> None:
        if not worker.killed:
            raise self._unexpected_end(worker)
        self.killed += 1
        if worker.item is not None:
            self._work.give_back(worker.item)
        self._retire(worker)

    def _retire(self, worker: Worker) -> None:
        self._past.update(worker.tally.read())
        worker.clean_up()

    def _unexpected_end(self, worker: Worker) -> StressFailure:
        code = worker.popen.returncode
        return StressFailure(f"worker {worker.pid} ended by itself with code {code}:\n{worker.messages}")
