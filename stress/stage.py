"""Everything around one segment: the copied checkpoint, the truth about it, the segment, its pagers and its workers."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

import numpy as np

import shmroute
from shmroute import PagerConfig, RouterConfig, RuntimeConfig
from shmroute.shared.segment import SHM, Segment
from shmroute.sources.faulty import faulty_spec
from stress.crew import Crew, Worker
from stress.errors import StressFailure
from stress.pagers import Pagers, cleaned_up, wait_for_pager
from stress.programs import PATIENCE
from stress.timeline import Timeline
from stress.truth import WEIGHTS, Truth
from stress.work import WorkList

SPARE_LANES = 2
"""Lanes beyond one for each worker: for this process, and for a dead worker that is not reaped yet."""

SABOTAGES = ("digest", "output", "leak")
"""What may be made wrong on purpose, to see that it is noticed."""


class Stage:
    """A context manager that sets everything up, and at its end leaves nothing, whatever happened.

    Parameters
    ----------
    checkpoint : Path
        A Mixtral folder with ``activations.npz``. It is copied.
    budget : str
        As in `RuntimeConfig.from_checkpoint`.
    workers : int
    seed : int
        Of what workers draw.
    label : str
        Goes into the names of the segment and of the temporary folder.
    reattach : int
        Workers leave and attach anew after so many items; 0 for never.
    sabotage : str, optional
        One of `SABOTAGES`.

    Attributes
    ----------
    runtime : Runtime
        The owner's. It holds no worker lane until it needs an expert.
    weights : Path
        The file that experts are read from.
    control : Path
        Of the faults of reads; see `shmroute.sources.faulty`.
    """

    def __init__(
        self,
        checkpoint: Path,
        budget: str,
        workers: int,
        seed: int,
        label: str,
        *,
        reattach: int = 0,
        sabotage: str = "",
    ) -> None:
        self._checkpoint, self._budget, self._size = checkpoint, budget, workers
        self._seed, self._reattach, self._sabotage = random.Random(seed), reattach, sabotage
        self.name = f"{label}-{os.getpid()}"
        self._label = label
        self.timeline = Timeline()

    def __enter__(self) -> Stage:
        with contextlib.ExitStack() as stack:
            self._set_up(stack)
            self._stack = stack.pop_all()
        return self

    def _set_up(self, stack: contextlib.ExitStack) -> None:
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=f"shmroute-{self._label}-")))
        for inside in ("journals", "results", "checkpoint"):
            (self.folder / inside).mkdir()
        self.truth = Truth.of(self._checkpoint)
        self._save_truth()
        copy = self.folder / "checkpoint"
        for name in ("config.json", WEIGHTS):
            shutil.copy2(self._checkpoint / name, copy / name)
        self.weights, self.control = copy / WEIGHTS, self.folder / "faults.json"
        self.runtime = stack.enter_context(shmroute.create(self.name, self._config(copy)))
        self.segment: Segment = self.runtime._attachment.segment
        self.uuid = self.segment.uuid
        self.work = WorkList(self.truth, self.folder / "results")
        self.pagers = stack.enter_context(cleaned_up(Pagers(self.name, self.uuid, self.folder, self.timeline)))
        wait_for_pager(self.pagers)
        self.crew = Crew(self._size, self._hire, self.work, self.timeline)
        stack.callback(self.crew.clean_up)
        self.wait_until(lambda: len(self.crew.ready) == self._size, "all workers are ready")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        for path in self.shared_files():
            path.unlink(missing_ok=True)  # only after a failure, which has been told, is there any

    def _config(self, copy: Path) -> RuntimeConfig:
        config = RuntimeConfig.from_checkpoint(
            copy,
            self._budget,
            router=RouterConfig(cache_bonus=0.0),  # the outputs are the reference's then
            pager=PagerConfig(retry_after=0.05),
            max_workers=min(self._size + SPARE_LANES, 32),
        )
        assert config.source is not None
        return dataclasses.replace(config, source=faulty_spec(config.source, self.control))

    def _save_truth(self) -> None:
        """Write the truth for the workers, unless what they are told shall be wrong."""
        told = self.truth
        if self._sabotage == "digest":
            told = dataclasses.replace(told, digests=told.digests.copy())
            told.digests[0, 0] ^= np.uint64(1)
        if self._sabotage == "output":
            self.truth = dataclasses.replace(self.truth, outputs=self.truth.outputs + np.float32(0.01))
        told.save_for_workers(self.folder)

    def _hire(self, number: int) -> Worker:
        return Worker(number, self.name, self.folder, self._seed.randrange(1 << 32), self._reattach)

    # ---------------------------------------------------------- going on

    def step(self) -> None:
        """Hear everybody, replace the dead, hand out work. To be called all the time."""
        self.pagers.step()
        self.crew.step()

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Go on until something holds.

        Raises
        ------
        StressFailure
            If it does not come to hold.
        """
        deadline = time.monotonic() + PATIENCE
        while not condition():
            self.step()
            if time.monotonic() > deadline:
                raise StressFailure(f"it did not come about within {PATIENCE:g} s that {what}")
            time.sleep(0.005)

    def shared_files(self) -> list[Path]:
        """What the segment has in ``/dev/shm``: its file, its lock and its semaphores."""
        if not hasattr(self, "uuid"):
            return []
        return [path for path in SHM.iterdir() if path.name == f"shmroute.{self.name}" or self.uuid in path.name]

    # ---------------------------------------------------------- the end

    def finish_work(self) -> None:
        """Let everything that was begun be done, and let the workers leave."""
        self.work.close()
        self.wait_until(lambda: self.work.outstanding == 0 and self.crew.idle, "all work that was begun is done")
        self.crew.dismiss()
        deadline = time.monotonic() + PATIENCE
        while not self.crew.has_left():
            self.pagers.step()
            if time.monotonic() > deadline:
                raise StressFailure(f"workers did not leave within {PATIENCE:g} s after the end of the work")
            time.sleep(0.005)

    def remove(self) -> None:
        """Remove the segment, and wait until its pagers have ended of it."""
        if self._sabotage == "leak":
            (SHM / f"sem.shmroute-{self.uuid}-lane99").touch()
        self.runtime.close()
        deadline = time.monotonic() + PATIENCE
        while not self.pagers.closed():
            if time.monotonic() > deadline:
                raise StressFailure(f"the pagers did not end within {PATIENCE:g} s after the segment was removed")
            time.sleep(0.005)
