"""``python -m stress.worker``: one worker, which may be killed or stopped at any instruction.

Reads items of work from standard input, a line each, and leaves at its end. Its main thread plays the items: routes and
computes recorded tokens through all layers. A second thread visits experts at random meanwhile, often with no patience,
so that two threads share the process's lane. The bytes under every lease of either are compared with the file's, when
the lease is taken and before it is given back.

Errors of the runtime are told in the journal and what they hit is tried again: whether they had to be expected is for
the reader to judge, who knows which faults were in force. Anything else ends the worker with a traceback.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

import shmroute
from shmroute.errors import (
    CheckpointError,
    ExpertLoadError,
    ExpertTimeout,
    NoWorkerLane,
    PagerUnavailable,
    RuntimeClosedError,
    ShmrouteError,
)
from shmroute.shared.pool import ExpertWeights
from stress.journal import Count, Journal, Tally
from stress.timeline import PATIENT
from stress.truth import digest_of, load_for_worker
from stress.work import Item, result_path

T = TypeVar("T")

RETRY_AFTER = 0.02
VISIT_PAUSE = 0.004
LONGEST_STAY = 0.01
WORKING_NICENESS = 5
"""Whoever is at work, always busy, yields to pagers and to workers that are starting, of which there are many."""

BATCHES = (1, 1, 2, 4)
"""Tokens routed at once, to draw from."""

REPORTED = (ExpertLoadError, ExpertTimeout, PagerUnavailable, NoWorkerLane, CheckpointError)
"""What a fault may lead to."""


class WrongBytesError(Exception):
    """The bytes under a lease are not the file's."""


def feed_forward(weights: ExpertWeights, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """A gated SiLU expert on hidden states [n, H]."""
    gate = x @ weights["gate"].astype(np.float32).T
    inner = gate / (1 + np.exp(-gate)) * (x @ weights["up"].astype(np.float32).T)
    result: npt.NDArray[np.float32] = inner @ weights["down"].astype(np.float32).T
    return result


class Reporter:
    """Counts and events, and the digests that bytes are compared with."""

    def __init__(self, journal: Journal, tally: Tally, digests: npt.NDArray[np.uint64]) -> None:
        self.journal = journal
        self.tally = tally
        self._digests = digests
        self._adding = threading.Lock()  # counts of two threads

    def count(self, count: Count, amount: int = 1) -> None:
        """Add to a count."""
        with self._adding:
            self.tally.add(count, amount)

    def check(self, layer: int, expert: int, weights: ExpertWeights) -> None:
        """Compare bytes under a lease with the file's.

        Raises
        ------
        WrongBytesError
            If they differ. It has been told.
        """
        found, expected = digest_of(weights.raw), int(self._digests[layer, expert])
        self.count(Count.CHECKS)
        if found != expected:
            what = f"expert {expert} of layer {layer} has digest {found:016x} under a lease, the file {expected:016x}"
            self.journal.tell("wrong", message=what)
            raise WrongBytesError(what)

    @contextlib.contextmanager
    def reporting(self, **details: Any) -> Iterator[None]:
        """Tell what a fault may lead to, with the time span of the block, and raise it again."""
        began = time.monotonic()
        try:
            yield
        except REPORTED as error:
            if isinstance(error, ExpertLoadError):
                details |= {"layer": error.layer, "expert": error.expert, "reason": error.reason}
            kind = "CheckpointError" if isinstance(error, CheckpointError) else type(error).__name__
            ended = time.monotonic()
            self.journal.tell("error", kind=kind, message=str(error), began=began, ended=ended, **details)
            raise

    def persist(self, attempt: Callable[[], T], **details: Any) -> T:
        """Do something until it succeeds, telling each time that it did not."""
        while True:
            try:
                with self.reporting(**details):
                    return attempt()
            except REPORTED:
                self.count(Count.RETRIES)
                time.sleep(RETRY_AFTER)


class Player:
    """Plays items on one runtime."""

    def __init__(self, runtime: shmroute.Runtime, reporter: Reporter, hidden: npt.NDArray[np.float32]) -> None:
        self._runtime = runtime
        self._reporter = reporter
        self._hidden = hidden
        layers = range(runtime.config.num_layers)
        self._routers = [reporter.persist(partial(runtime.router, layer)) for layer in layers]
        self._gates = [reporter.persist(partial(runtime.gate, layer)) for layer in layers]

    def play(self, item: Item, results: Path, random_: random.Random) -> None:
        """Route and compute an item's tokens, and leave the outputs and choices where they are looked for."""
        config = self._runtime.config
        hidden = np.asarray(self._hidden[item.first : item.first + item.count])
        outputs = np.zeros_like(hidden)
        choices = np.zeros((*hidden.shape[:2], config.top_k), np.int32)
        first = 0
        while first < item.count:
            rows = slice(first, min(first + random_.choice(BATCHES), item.count))
            for layer in range(config.num_layers):
                x = hidden[rows, layer]
                weights = np.zeros((len(x), config.top_k), np.float32)
                chosen = np.zeros((len(x), config.top_k), np.int32)
                self._routers[layer].route_into(x @ self._gates[layer].T, chosen, weights)
                self._reporter.count(Count.TOKENS, len(x))
                choices[rows, layer] = chosen
                outputs[rows, layer] = self._reporter.persist(
                    partial(self._compute, layer, x, chosen, weights), timeout=PATIENT
                )
            first = rows.stop
        path = result_path(results, item)
        draft = path.with_suffix(f".{os.getpid()}.npz")
        np.savez(draft, outputs=outputs, choices=choices)
        draft.replace(path)

    def _compute(
        self, layer: int, x: npt.NDArray[np.float32], chosen: npt.NDArray[np.int32], weights: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        out = np.zeros_like(x)
        for expert, rows, ranks, w in self._runtime.experts(layer, chosen, timeout=PATIENT):
            self._reporter.count(Count.LEASES)
            self._reporter.check(layer, expert, w)
            out[rows] += weights[rows, ranks, None] * feed_forward(w, x[rows])
            self._reporter.check(layer, expert, w)
        return out


class Visitor(threading.Thread):
    """Visits experts at random, gives hints and looks around, until told to end.

    Attributes
    ----------
    failure : BaseException or None
        What ended it before it was told to.
    """

    def __init__(self, runtime: shmroute.Runtime, reporter: Reporter, random_: random.Random) -> None:
        super().__init__(name="visitor", daemon=True)
        self._runtime = runtime
        self._reporter = reporter
        self._random = random_
        self._end = threading.Event()
        self.failure: BaseException | None = None

    def run(self) -> None:
        """Go on until `end`, or until something is wrong."""
        try:
            while not self._end.wait(self._random.uniform(0, 2 * VISIT_PAUSE)):
                self._step()
        except RuntimeClosedError as error:
            if not self._end.is_set():
                self.failure = error
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            self.failure = error

    def end(self) -> None:
        """Tell it to end, and wait until it has."""
        self._end.set()
        self.join()

    def _step(self) -> None:
        config, draw = self._runtime.config, self._random
        layer, expert = draw.randrange(config.num_layers), draw.randrange(config.num_experts)
        chance = draw.random()
        if chance < 0.7:
            self._visit(layer, expert, draw.choice((0.0, 0.1, 20.0, 20.0)))
        elif chance < 0.8:
            self._runtime.prefetch(layer, [expert, draw.randrange(config.num_experts)])
            self._reporter.count(Count.HINTS)
        elif chance < 0.95:
            self._runtime.page_out(layer, expert)
            self._reporter.count(Count.HINTS)
        else:
            self._runtime.metrics()
            self._runtime.resident(layer)
            self._runtime.affinity(layer).top(2)
            self._reporter.count(Count.LOOKS)

    def _visit(self, layer: int, expert: int, timeout: float) -> None:
        with (
            contextlib.suppress(*REPORTED),
            self._reporter.reporting(timeout=timeout),
            self._runtime.expert(layer, expert, timeout) as weights,
        ):
            self._reporter.count(Count.LEASES)
            self._reporter.check(layer, expert, weights)
            if self._random.random() < 0.5:
                self._runtime.page_out(layer, expert)  # asks for what must not be done while the lease is held
                self._reporter.count(Count.HINTS)
            time.sleep(self._random.uniform(0, LONGEST_STAY))
            self._reporter.check(layer, expert, weights)


def work(
    name: str, reporter: Reporter, folder: Path, hidden: npt.NDArray[np.float32], reattach: int, seed: int
) -> None:
    """Do items until there are no more; with `reattach`, on a new runtime after so many."""
    ready = False
    while True:
        with shmroute.attach(name) as runtime:
            reporter.count(Count.ATTACHES)
            player = Player(runtime, reporter, hidden)
            visitor = Visitor(runtime, reporter, random.Random(seed))
            visitor.start()
            if not ready:
                reporter.journal.tell("ready")
                os.nice(WORKING_NICENESS)
                ready = True
            done = 0
            try:
                while line := sys.stdin.readline():
                    item = Item.parse(line)
                    player.play(item, folder / "results", random.Random(seed + item.number))
                    reporter.journal.tell("done", item=item.number)
                    if visitor.failure is not None:
                        raise visitor.failure
                    done += 1
                    if done == reattach:
                        break
                else:
                    return
            finally:
                visitor.end()


def main() -> int:
    """Attach, work, leave."""
    parser = argparse.ArgumentParser(prog="python -m stress.worker")
    parser.add_argument("name", help="of the segment")
    parser.add_argument("--folder", required=True, type=Path, help="with the truth; results go to a folder in it")
    parser.add_argument("--journal", required=True, type=Path)
    parser.add_argument("--tally", required=True, type=Path)
    parser.add_argument("--seed", required=True, type=int)
    parser.add_argument("--reattach", type=int, default=0, help="leave and attach anew after so many items; 0: never")
    arguments = parser.parse_args()
    hidden, digests = load_for_worker(arguments.folder)
    reporter = Reporter(Journal(arguments.journal), Tally(arguments.tally), digests)
    try:
        work(arguments.name, reporter, arguments.folder, hidden, arguments.reattach, arguments.seed)
    except (ShmrouteError, WrongBytesError) as error:
        reporter.journal.tell("failed", kind=type(error).__name__, message=str(error))
        raise
    reporter.journal.tell("left")
    return 0


if __name__ == "__main__":
    sys.exit(main())
