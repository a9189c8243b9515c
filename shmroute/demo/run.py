"""Runs of the demonstration: start a runtime and its workers, watch them, check and report what they did."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError

import shmroute
from shmroute.config import RouterConfig, RuntimeConfig
from shmroute.demo.recording import Recording
from shmroute.demo.reference import dense_reference
from shmroute.errors import CheckpointError, ShmrouteError
from shmroute.metrics import RuntimeMetrics

TOLERANCE = 1e-3
"""Largest absolute error that a run without bonus may have."""

REFRESH = 0.2


class DemoError(ShmrouteError):
    """A worker of the demonstration failed, or a run did not show what it is there to show."""


@dataclass(frozen=True)
class WorkerReport:
    """What one worker did.

    Attributes
    ----------
    domain : str
    tokens : int
    seconds : float
    private_bytes : int
        Memory it shares with nobody.
    metrics : dict
        `WorkerMetrics.as_dict`.
    """

    domain: str
    tokens: int
    seconds: float
    private_bytes: int
    metrics: dict[str, Any]


@dataclass(frozen=True)
class RunReport:
    """What one run did, and how far its outputs are from the dense reference.

    Attributes
    ----------
    bonus : float
    workers : list of WorkerReport
    metrics : dict
        `RuntimeMetrics.as_dict` at the end.
    largest_error : float
        Largest absolute difference of an output element.
    relative_error : float
        Norm of the difference over norm of the reference.
    changed : int
        (token, expert) choices that the reference did not make.
    choices : int
    """

    bonus: float
    workers: list[WorkerReport]
    metrics: dict[str, Any]
    largest_error: float
    relative_error: float
    changed: int
    choices: int

    @property
    def hit_rate(self) -> float:
        """Of all workers together."""
        return float(self.metrics["hit_rate"])

    @property
    def tokens(self) -> int:
        """Of all workers together."""
        return sum(worker.tokens for worker in self.workers)

    @property
    def seconds(self) -> float:
        """Of the slowest worker; all start at the same moment."""
        return max(worker.seconds for worker in self.workers)

    def as_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {**vars(self), "workers": [vars(worker) for worker in self.workers], "hit_rate": self.hit_rate}


@dataclass(frozen=True)
class Progress:
    """How far a run is, for a display.

    Attributes
    ----------
    done : dict
        Tokens done by each domain's worker.
    expected : dict
        Tokens that each will do.
    metrics : RuntimeMetrics
    """

    done: dict[str, int]
    expected: dict[str, int]
    metrics: RuntimeMetrics


class Demo:
    """The checkpoint, its recorded streams and the dense reference, for any number of runs.

    Parameters
    ----------
    folder : Path
        A Mixtral checkpoint with ``activations.npz``.
    budget : str
        As in `RuntimeConfig.from_checkpoint`.
    tokens : int
        At most so many of each domain.
    router : RouterConfig
        Its bonus is replaced by each run's.
    """

    def __init__(self, folder: Path, budget: str, tokens: int, router: RouterConfig) -> None:
        self.folder = folder
        self._router = router
        self._budget = budget
        self._tokens = tokens
        self.recording = Recording.load(folder)
        self.config = RuntimeConfig.from_checkpoint(folder, budget, router=router)

    def compute_reference(self) -> None:
        """Compute what the model does without a cache; before the first run.

        Raises
        ------
        CheckpointError
            If the folder is not one that the reference, which is deliberately simple, can read.
        """
        try:
            self._outputs, self._choices = dense_reference(self.folder, self.recording.hidden, self.config.top_k)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                str(self.folder / "model.safetensors"),
                f"the demo's dense reference reads a Mixtral checkpoint in this one file, and could not: {error}",
            ) from error

    def run(self, bonus: float, watch: Callable[[Progress], None]) -> RunReport:
        """Play all streams at once, each in a worker process of its own.

        Parameters
        ----------
        bonus : float
        watch : callable
            Called a few times a second, and once at the end.

        Raises
        ------
        DemoError
            If a worker fails.
        """
        router = dataclasses.replace(self._router, cache_bonus=bonus)
        config = RuntimeConfig.from_checkpoint(self.folder, self._budget, router=router)
        domains = self.recording.domains()
        expected = {domain: len(self.recording.positions(domain, self._tokens)) for domain in domains}
        with (
            tempfile.TemporaryDirectory(prefix="shmroute-demo-") as scratch,
            shmroute.create(f"demo-{os.getpid()}", config, pager=True) as runtime,
        ):
            workers = {domain: self._start_worker(runtime.name, domain, Path(scratch)) for domain in domains}
            try:
                for domain, worker in workers.items():
                    if _read_line(worker) != "ready\n":
                        raise DemoError(f"the worker for {domain} did not start; its message is on standard error")
                done = dict.fromkeys(domains, 0)
                for worker in workers.values():
                    _send_line(worker)
                while any(worker.poll() is None for worker in workers.values()):
                    done = self._done(runtime, workers, done)
                    watch(Progress(done, expected, runtime.metrics()))
                    time.sleep(REFRESH)
                reports = [_report(domain, worker) for domain, worker in workers.items()]
                metrics = runtime.metrics()
                watch(Progress(expected, expected, metrics))
            finally:
                for worker in workers.values():
                    worker.kill()
                    worker.wait()
                    for pipe in (worker.stdin, worker.stdout):
                        assert pipe is not None
                        pipe.close()
            outputs, choices, positions = self._collect(domains, Path(scratch))
        difference = outputs - self._outputs[positions]
        kept = (choices[..., :, None] == self._choices[positions][..., None, :]).any(-1)
        return RunReport(
            bonus=bonus,
            workers=reports,
            metrics=metrics.as_dict(),
            largest_error=float(np.abs(difference).max()),
            relative_error=float(np.linalg.norm(difference) / np.linalg.norm(self._outputs[positions])),
            changed=int((~kept).sum()),
            choices=kept.size,
        )

    def _start_worker(self, name: str, domain: str, scratch: Path) -> subprocess.Popen[str]:
        # One core's worth of work each: numpy's own threads would only fight over the cores.
        environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        return subprocess.Popen(
            [
                sys.executable, "-m", "shmroute.demo.worker", name, "--data", str(self.folder), "--domain", domain,
                "--tokens", str(self._tokens), "--outputs", str(scratch / f"{domain}.npz"),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )  # fmt: skip

    def _done(
        self, runtime: shmroute.Runtime, workers: dict[str, subprocess.Popen[str]], before: dict[str, int]
    ) -> dict[str, int]:
        """Tokens that each worker has done; one that has left its lane keeps what it had."""
        metrics = runtime.metrics()
        mine = {domain: metrics.worker_of(worker.pid) for domain, worker in workers.items()}
        return {
            domain: before[domain] if worker is None else worker.counters["tokens"] // self.config.num_layers
            for domain, worker in mine.items()
        }

    def _collect(
        self, domains: list[str], scratch: Path
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Outputs and choices of all workers, and the positions in the recording that they belong to."""
        outputs, choices, positions = [], [], []
        for domain in domains:
            with np.load(scratch / f"{domain}.npz") as file:
                outputs.append(file["outputs"])
                choices.append(file["choices"])
            positions.append(self.recording.positions(domain, self._tokens))
        return np.concatenate(outputs), np.concatenate(choices), np.concatenate(positions)


def _read_line(worker: subprocess.Popen[str]) -> str:
    assert worker.stdout is not None
    return worker.stdout.readline()


def _send_line(worker: subprocess.Popen[str]) -> None:
    assert worker.stdin is not None
    worker.stdin.write("go\n")
    worker.stdin.flush()


def _report(domain: str, worker: subprocess.Popen[str]) -> WorkerReport:
    line = _read_line(worker)
    if worker.wait() != 0 or not line:
        raise DemoError(
            f"the worker for {domain} ended with code {worker.returncode}; its message is on standard error"
        )
    return WorkerReport(domain, **json.loads(line))


def shortcomings(plain: RunReport, biased: RunReport) -> list[str]:
    """What the two runs should have shown and did not; empty if all is well."""
    found = []
    if plain.largest_error > TOLERANCE:
        found.append(f"without bonus the largest error is {plain.largest_error:.2e}, above {TOLERANCE:g}")
    if plain.changed:
        found.append(f"without bonus {plain.changed} choices differ from the reference's")
    for run in (plain, biased):
        if run.metrics["total"]["misses"] == 0:
            found.append(f"the run with bonus {run.bonus:g} had no miss: the budget holds every expert in use")
        if run.metrics["pager"]["evictions"] == 0:
            found.append(f"the run with bonus {run.bonus:g} had no eviction: the budget holds every expert in use")
        if run.changed != run.metrics["total"]["changed"]:
            found.append(
                f"the runtime counted {run.metrics['total']['changed']} changed choices, the reference {run.changed}"
            )
    if biased.bonus > plain.bonus and biased.hit_rate <= plain.hit_rate:
        found.append(f"the bonus did not raise the hit rate ({plain.hit_rate:.3f} to {biased.hit_rate:.3f})")
    return found
