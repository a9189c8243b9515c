"""`Runtime`: what a process holds of a shared cache of experts; `create` and `attach` make one."""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import math
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from shmroute.attachment import Attachment, attachment_to, leave
from shmroute.config import RuntimeConfig
from shmroute.errors import (
    CheckpointError,
    ConfigError,
    RuntimeClosedError,
    SegmentError,
    SegmentExistsError,
    SegmentNotFoundError,
)
from shmroute.leases import ExpertLease, ExpertRows, Leases, hand_out, prefetch
from shmroute.pager.process import pager_alive, standby_alive, start_pager, stop_pager
from shmroute.routing import MemoryAwareRouter
from shmroute.shared.affinity import ExpertAffinity, checked_ids
from shmroute.shared.atomic import WORD
from shmroute.shared.bell import Semaphore
from shmroute.shared.identity import is_dead
from shmroute.shared.kernel import load_kernels
from shmroute.shared.lanes import lane_identities, live_lanes
from shmroute.shared.layout import HEADER_OWNER, HEADER_PAGER, LANE_BASELINE, LANE_SHARD
from shmroute.shared.metrics import (
    LANE_SHARD_WORDS,
    PAGER_SHARD_WORDS,
    PagerMetrics,
    WorkerMetrics,
    snapshot_words,
)
from shmroute.shared.ring import PUSHED, ring_push
from shmroute.shared.segment import (
    Segment,
    attach_segment,
    checked_name,
    claim_destruction,
    create_segment,
    segment_path,
    unlink_segment,
)
from shmroute.shared.words import NO_LANE, NORMAL, PAGE_OUT, identity_pid, pack_request
from shmroute.sources import ExpertSource, open_source

DEFAULT_TIMEOUT = 5.0
"""Seconds to wait for an expert."""

_open_runtimes: weakref.WeakSet[Runtime] = weakref.WeakSet()


@dataclass(frozen=True)
class RuntimeMetrics:
    """One snapshot of everything that is counted. Counters are read one by one, so they may be a call apart.

    Attributes
    ----------
    total : WorkerMetrics
        All workers that ever were.
    workers : tuple of WorkerMetrics
        Those attached now.
    pager : PagerMetrics
    resident : int
        Experts in slots now.
    slots : int
    pool_bytes, control_bytes : int
        Memory held for experts, and for everything else (slot headers included).
    """

    total: WorkerMetrics
    workers: tuple[WorkerMetrics, ...]
    pager: PagerMetrics
    resident: int
    slots: int
    pool_bytes: int
    control_bytes: int

    @property
    def hit_rate(self) -> float | None:
        """Of all workers together; None before the first route."""
        return self.total.hit_rate

    def worker_of(self, pid: int) -> WorkerMetrics | None:
        """What one process did since it attached; None if it holds no lane."""
        return next((worker for worker in self.workers if worker.pid == pid), None)

    def as_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            "hit_rate": self.hit_rate,
            "resident": self.resident,
            "slots": self.slots,
            "pool_bytes": self.pool_bytes,
            "control_bytes": self.control_bytes,
            "total": self.total.as_dict(),
            "workers": [worker.as_dict() for worker in self.workers],
            "pager": self.pager.as_dict(),
        }


class Runtime:
    """One process's hold on a shared cache of experts. Made by `create` or `attach`; a context manager.

    Methods may be called from several threads. All raise `RuntimeClosedError` after `close`.

    Attributes
    ----------
    name : str
    config : RuntimeConfig
    owner : bool
        Whether leaving the runtime ends it for everybody.
    """

    def __init__(self, segment: Segment, *, owner: bool, pager: subprocess.Popen[bytes] | None = None) -> None:
        self._attachment: Attachment = attachment_to(segment)
        self.name = segment.name
        self.config = segment.config
        self.owner = owner
        self._pager = pager
        self._pid = os.getpid()
        self._mutex = threading.RLock()
        self._routers: dict[int, MemoryAwareRouter] = {}
        self._leases: Leases | None = None
        self._gates: dict[int, npt.NDArray[np.float32]] = {}
        self._closed = False
        _open_runtimes.add(self)

    # ---------------------------------------------------------- routing

    def router(self, layer: int) -> MemoryAwareRouter:
        """The router of one layer; the same object every time. Claims a lane.

        Raises
        ------
        ValueError
            If there is no such layer.
        NoWorkerLane
            If all lanes are taken by live processes.
        """
        self._check_layer(layer)
        with self._mutex:
            self._check_open()
            if layer not in self._routers:
                self._routers[layer] = MemoryAwareRouter(self._attachment, layer)
            return self._routers[layer]

    def affinity(self, layer: int) -> ExpertAffinity:
        """The affinity of one layer's experts. Claims no lane.

        Raises
        ------
        ValueError
            If there is no such layer.
        """
        self._check_layer(layer)
        self._check_open()
        return ExpertAffinity(self._attachment, layer)

    def gate(self, layer: int) -> npt.NDArray[np.float32]:
        """The router weights of one layer from the checkpoint, float32 [E, hidden]: logits are ``x @ gate.T``.

        Raises
        ------
        ValueError
            If there is no such layer.
        ConfigError
            If the runtime has no checkpoint.
        CheckpointError
            If it cannot be read here.
        """
        self._check_layer(layer)
        with self._mutex:
            self._check_open()
            if layer not in self._gates:
                self._gates[layer] = self._attachment.source().gate(layer)
            return self._gates[layer]

    # ---------------------------------------------------------- experts

    def expert(self, layer: int, expert: int, timeout: float = DEFAULT_TIMEOUT) -> ExpertLease:
        """One lease, as a context manager that gives the expert's weights.

        Parameters
        ----------
        layer, expert : int
        timeout : float
            Seconds to wait if the expert is not resident.

        Returns
        -------
        ExpertLease
            ``with`` it; entering may raise what is below.

        Raises
        ------
        ValueError
            If there is no such expert, or the timeout is negative.
        LeaseHeldError
            If the expert is not resident and this thread holds a lease.
        ExpertLoadError
            If the expert cannot be loaded.
        ExpertTimeout, PagerUnavailable
            If it was not resident in time: because the pager is busy, or because there is none at work.
        SegmentClosingError
            If the segment is being destroyed.
        """
        self._check_expert(layer, expert)
        return ExpertLease(self._lease_table(), self._attachment, layer, expert, _checked_timeout(timeout))

    def experts(
        self, layer: int, experts: npt.NDArray[np.integer] | Sequence[int], timeout: float = DEFAULT_TIMEOUT
    ) -> Iterator[ExpertRows]:
        """Each expert that some tokens chose, once, as it becomes resident; one lease at a time.

        All that are missing are requested at once; resident ones come first, so they are computed while the others
        load. Leaving the loop early releases the lease.

        Parameters
        ----------
        layer : int
        experts : ndarray of int, [k] or [T, k]
            The tokens' choices.
        timeout : float
            Seconds to wait for each expert that is not resident.

        Yields
        ------
        expert : int
        rows, ranks : ndarray
            int64 of equal length: the tokens that chose it, ascending, and at which rank.
        weights : ExpertWeights
            Valid until the next step of the iteration.

        Raises
        ------
        As `expert`.
        """
        self._check_layer(layer)
        ids = checked_ids(experts, self.config.num_experts)
        return hand_out(self._lease_table(), self._attachment, layer, ids, _checked_timeout(timeout))

    def resident(self, layer: int) -> list[int]:
        """Sorted ids of a layer's experts that the router takes for resident now."""
        self._check_layer(layer)
        self._check_open()
        with self._attachment.in_use() as segment:
            row = segment.address + segment.layout.resident + layer * segment.layout.resident_row_bytes
            words = snapshot_words(row, -(-self.config.num_experts // 64))
        bits = np.unpackbits(words.view(np.uint8), bitorder="little")[: self.config.num_experts]
        return [int(expert) for expert in np.flatnonzero(bits)]

    def prefetch(self, layer: int, experts: Sequence[int] | npt.NDArray[np.integer]) -> int:
        """Hint that experts will be wanted soon; how many requests that queued.

        A prefetch yields to every demand and is cancelled when it has waited too long.
        """
        self._check_layer(layer)
        return prefetch(self._lease_table(), layer, experts, self.config.num_experts)

    def page_out(self, layer: int, expert: int) -> bool:
        """Hint that an expert may be evicted first; whether the pager's queue took the hint."""
        self._check_expert(layer, expert)
        self._check_open()
        with self._attachment.in_use() as segment:
            layout = segment.layout
            request = pack_request(layer, expert, PAGE_OUT, NORMAL, NO_LANE)
            taken = bool(ring_push(segment.address + layout.ring, layout.ring_bits, request) == PUSHED)
            self._attachment.ring_pager()
        return taken

    # ---------------------------------------------------------- looking

    def metrics(self) -> RuntimeMetrics:
        """One snapshot of all counters. Claims no lane."""
        self._check_open()
        with self._attachment.in_use() as segment:
            return read_metrics(segment)

    # ---------------------------------------------------------- end

    def close(self) -> None:
        """Let go of everything; the owner also stops the pager and removes the segment.

        Leases still held by other threads are released, waits end with `RuntimeClosedError`. Views of weights that are
        still referenced keep their memory mapped until they go (a `ResourceWarning` says so), but their bytes may
        change from now on. Does nothing the second time.
        """
        with self._mutex:
            if self._closed:
                return
            self._closed = True
        _open_runtimes.discard(self)
        if os.getpid() != self._pid:
            return  # a forked child holds nothing
        try:
            if self.owner:
                self._destroy()
        finally:
            self._routers.clear()
            self._leases = None
            leave(self._attachment)

    def _destroy(self) -> None:
        with contextlib.suppress(RuntimeClosedError), self._attachment.in_use() as segment:
            claimed = claim_destruction(segment)
            if self._pager is not None:
                stop_pager(self._pager)
            if claimed:
                unlink_segment(segment)

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---------------------------------------------------------- checks

    def _lease_table(self) -> Leases:
        self._check_open()
        if self._leases is None:
            self._leases = self._attachment.one(Leases)
        return self._leases

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeClosedError(f"the runtime {self.name!r} was closed; attach to it again")
        self._attachment.check_open()

    def _check_layer(self, layer: int) -> None:
        if not isinstance(layer, int | np.integer) or not 0 <= layer < self.config.num_layers:
            raise ValueError(f"layer must be an integer from 0 to {self.config.num_layers - 1}, not {layer!r}")

    def _check_expert(self, layer: int, expert: int) -> None:
        self._check_layer(layer)
        if not isinstance(expert, int | np.integer) or not 0 <= expert < self.config.num_experts:
            raise ValueError(f"expert must be an integer from 0 to {self.config.num_experts - 1}, not {expert!r}")


def _checked_timeout(timeout: float) -> float:
    if not isinstance(timeout, int | float) or not math.isfinite(timeout) or timeout < 0:
        raise ValueError(f"timeout must be a finite number of seconds, 0 or more, not {timeout!r}")
    return float(timeout)


def read_metrics(segment: Segment) -> RuntimeMetrics:
    """A snapshot of a segment's counters; the mapping must stay for the length of the call."""
    layout, base = segment.layout, segment.address
    identities = lane_identities(segment)
    total = np.zeros(LANE_SHARD_WORDS, np.int64)
    workers = []
    for lane in range(segment.config.max_workers):
        shard = snapshot_words(base + layout.lane(lane) + LANE_SHARD, LANE_SHARD_WORDS)
        total += shard
        if lane in identities:
            baseline = snapshot_words(base + layout.lane(lane) + LANE_BASELINE, LANE_SHARD_WORDS)
            workers.append(WorkerMetrics.from_words(shard - baseline, lane, identity_pid(identities[lane])))
    pager = segment.read(HEADER_PAGER)
    pager_words = snapshot_words(base + layout.pager, PAGER_SHARD_WORDS)
    bitmap = snapshot_words(base + layout.resident, layout.num_layers * layout.resident_row_bytes // WORD)
    return RuntimeMetrics(
        total=WorkerMetrics.from_words(total, None, None),
        workers=tuple(workers),
        pager=PagerMetrics.from_words(pager_words, None if is_dead(pager) else identity_pid(pager)),
        resident=int(np.bitwise_count(bitmap.view(np.uint64)).sum()),
        slots=segment.config.slots,
        pool_bytes=segment.config.budget_bytes,
        control_bytes=layout.total_bytes - segment.config.budget_bytes,
    )


# ------------------------------------------------------------------ making one


class _CompilationReport:
    """Shows on standard error that kernels are being compiled: one line that counts, or two lines in a file."""

    def __init__(self) -> None:
        self._begun = False

    def __call__(self, done: int, total: int, name: str) -> None:
        if sys.stderr.isatty():
            sys.stderr.write(f"\r\x1b[Kshmroute: compiling kernels, once for this version: {done} of {total} {name}")
            if done == total:
                sys.stderr.write("\n")
        elif not self._begun:
            sys.stderr.write("shmroute: compiling kernels, once for this version …\n")
        elif done == total:
            sys.stderr.write("shmroute: compiled\n")
        sys.stderr.flush()
        self._begun = True


report_compilation = _CompilationReport()
"""The default `progress` of `create` and `attach`."""


def create(
    name: str,
    config: RuntimeConfig,
    *,
    checkpoint: str | Path | ExpertSource | None = None,
    pager: bool = False,
    progress: Callable[[int, int, str], None] | None = report_compilation,
) -> Runtime:
    """Make a shared cache of experts and own it: leaving the runtime ends it for everybody.

    Parameters
    ----------
    name : str
        By which other processes of this user attach.
    config : RuntimeConfig
    checkpoint : str, Path or ExpertSource, optional
        Where the experts come from; must fit `config`. Not needed if `config` came from a checkpoint.
    pager : bool
        Also start the pager, which ends with this process.
    progress : callable, optional
        See `shmroute.shared.kernel.load_kernels`.

    Raises
    ------
    ConfigError
        If the checkpoint does not fit the settings, or there is none to page from.
    CheckpointError
        If the checkpoint cannot be served.
    SegmentExistsError
        If the name is taken by a segment that somebody uses. One whose owner, pager and workers are all dead is
        removed first.
    SharedMemoryFullError
        If ``/dev/shm`` has no room.
    PagerStartError
        If the pager did not come up.
    """
    checked_name(name)
    if checkpoint is not None:
        config = _with_source(config, checkpoint)
    if pager and config.source is None:
        raise ConfigError("pager=True needs a checkpoint to load from: pass checkpoint=, or a config made from one")
    load_kernels(progress)
    segment = create_or_reclaim(name, config)
    process = None
    try:
        if pager:
            process = start_pager(segment, segment.read(HEADER_OWNER))
        return Runtime(segment, owner=True, pager=process)
    except BaseException:
        claim_destruction(segment)
        unlink_segment(segment)
        if process is not None:
            stop_pager(process)
        segment.close()
        raise


def _with_source(config: RuntimeConfig, checkpoint: str | Path | ExpertSource) -> RuntimeConfig:
    """The settings, with a source that must fit them."""
    source = open_source(checkpoint)
    try:
        geometry, spec = source.geometry, source.spec
    finally:
        if source is not checkpoint:
            source.close()
    if config.source_fingerprint and config.source_fingerprint != geometry.fingerprint:
        raise CheckpointError(
            str(checkpoint), "is not the checkpoint that the settings were made from; make them anew from this one"
        )
    for field in ("num_layers", "num_experts", "expert_bytes"):
        if getattr(config, field) != getattr(geometry, field):
            raise ConfigError(
                f"{field} is {getattr(config, field)} in the settings, {getattr(geometry, field)} in the checkpoint; "
                f"use RuntimeConfig.from_checkpoint"
            )
    return dataclasses.replace(
        config,
        router=dataclasses.replace(config.router, renormalize=geometry.renormalize),
        layer_numbers=geometry.layer_numbers,
        hidden_size=geometry.hidden_size,
        tensors=geometry.tensors,
        source=spec,
        source_fingerprint=geometry.fingerprint,
    )


def create_or_reclaim(name: str, config: RuntimeConfig) -> Segment:
    """`create_segment`, after removing a segment of that name whose users are all dead."""
    for _ in range(10):
        try:
            return create_segment(name, config)
        except SegmentExistsError:
            if not reclaim(name):
                raise
    raise SegmentExistsError(f"the name {name!r} is being taken and freed by others all the time")


def reclaim(name: str) -> bool:
    """Remove a segment whose owner, pager and workers are all dead; whether the name may be free now."""
    try:
        segment = attach_segment(name, closing=True)
    except SegmentNotFoundError:
        return True
    except SegmentError:
        return False  # not ours to judge: the caller reports that the name is taken
    try:
        if not segment.closing:
            owned = not is_dead(segment.read(HEADER_OWNER))
            if owned or pager_alive(segment) or standby_alive(segment) or live_lanes(segment):
                return False
        if not claim_destruction(segment):
            return False
        unlink_segment(segment)
        return True
    finally:
        segment.close()


def attach(name: str, *, progress: Callable[[int, int, str], None] | None = report_compilation) -> Runtime:
    """Attach to a cache that another process made, any number of times.

    A worker lane is claimed at the first router or expert; looking claims none.

    Parameters
    ----------
    name : str
    progress : callable, optional
        See `shmroute.shared.kernel.load_kernels`.

    Raises
    ------
    SegmentNotFoundError, SegmentPermissionError, SegmentForeignError, SegmentVersionError, SegmentTruncatedError,
    SegmentNamespaceError, SegmentLayoutError, SegmentClosingError
        Each for what its name says.
    """
    checked_name(name)
    load_kernels(progress)
    return Runtime(attach_segment(name), owner=False)


def is_published(segment: Segment) -> bool:
    """Whether the segment's name still stands for it."""
    try:
        status = segment_path(segment.name).stat()
    except FileNotFoundError:
        return False
    return (status.st_dev, status.st_ino) == segment.inode


def destroy(name: str, *, timeout: float = 10.0) -> None:
    """Remove a segment, whoever uses it: waiting workers get `SegmentClosingError`, its pager ends.

    Raises
    ------
    SegmentError
        If it cannot be attached to, or another live process is removing it and does not finish in time.
    """
    load_kernels(report_compilation)
    segment = attach_segment(name, closing=True)
    try:
        deadline = time.monotonic() + timeout
        while not claim_destruction(segment):
            if not is_published(segment):
                return  # the other one is done
            if time.monotonic() > deadline:
                raise SegmentExistsError(f"{name!r} is being destroyed by another process, which does not finish")
            time.sleep(0.01)
        if pager_alive(segment):
            semaphore = Semaphore(segment.semaphore_name(None))
            semaphore.post()
            semaphore.close()
        while pager_alive(segment) and time.monotonic() < deadline:
            time.sleep(0.01)
        unlink_segment(segment)
    finally:
        segment.close()


@atexit.register
def _close_all() -> None:
    for runtime in list(_open_runtimes):
        runtime.close()
