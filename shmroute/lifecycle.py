"""Making, joining and removing a shared cache of experts: `create`, `attach`, `destroy`."""

from __future__ import annotations

import dataclasses
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from shmroute.budget import too_few_for_a_cycle
from shmroute.config import RuntimeConfig, describe
from shmroute.errors import (
    CheckpointError,
    ConfigError,
    SegmentError,
    SegmentExistsError,
    SegmentNotFoundError,
    SmallBudgetWarning,
)
from shmroute.pager.process import pager_alive, standby_alive, start_pager, stop_pager
from shmroute.pager_lock import PagerLock
from shmroute.runtime import Runtime
from shmroute.shared.bell import Semaphore
from shmroute.shared.identity import is_dead
from shmroute.shared.kernel import load_kernels
from shmroute.shared.lanes import live_lanes
from shmroute.shared.layout import HEADER_OWNER
from shmroute.shared.removal import claim_destruction, claim_if_unused, is_published, unlink_segment
from shmroute.shared.segment import Segment, attach_segment, checked_name, create_segment
from shmroute.sources import ExpertSource
from shmroute.validation import require


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

    Warns
    -----
    SmallBudgetWarning
        If the slots do not hold one token's experts of all layers.

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
    require(isinstance(config, RuntimeConfig), f"config must be a RuntimeConfig, not a {type(config).__name__}")
    if checkpoint is not None:
        config = _with_source(config, checkpoint)
    if pager and config.source is None:
        raise ConfigError("pager=True needs a checkpoint to load from: pass checkpoint=, or a config made from one")
    problem = config.source and too_few_for_a_cycle(config.slots, config.num_layers, config.top_k)
    if problem:
        warnings.warn(problem, SmallBudgetWarning, stacklevel=2)
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
    geometry, spec = describe(checkpoint)
    if config.source_fingerprint and config.source_fingerprint != geometry.fingerprint:
        raise CheckpointError(
            str(checkpoint), "is not the checkpoint that the settings were made from; make them anew from this one"
        )
    for field in ("num_layers", "num_experts", "top_k", "expert_bytes"):
        if getattr(config, field) != getattr(geometry, field):
            raise ConfigError(
                f"{field} is {getattr(config, field)} in the settings, {getattr(geometry, field)} in the checkpoint; "
                f"use RuntimeConfig.from_checkpoint"
            )
    return dataclasses.replace(
        config,
        router=dataclasses.replace(config.router, **dataclasses.asdict(geometry.scoring)),
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
            try:
                freed = reclaim(name)
            except SegmentError as error:  # what is there is none that this process could judge
                raise SegmentExistsError(f"the name {name!r} is taken: {error}") from error
            if not freed:
                raise
    raise SegmentExistsError(f"the name {name!r} is being taken and freed by others all the time")


def reclaim(name: str) -> bool:
    """Remove a segment whose owner, pager and workers are all dead; whether the name may be free now.

    Raises
    ------
    SegmentError
        If what bears the name cannot be attached to.
    """
    try:
        segment = attach_segment(name, closing=True)
    except SegmentNotFoundError:
        return True
    try:

        def in_use() -> bool:
            owned = not is_dead(segment.read(HEADER_OWNER))
            return owned or pager_alive(segment) or standby_alive(segment) or bool(live_lanes(segment))

        if segment.closing:
            claimed = claim_destruction(segment)
        elif in_use():
            claimed = False
        else:
            with PagerLock(segment) as lock:  # a pager that is about to adopt it holds the lock
                claimed = lock.try_acquire() and claim_if_unused(segment, in_use)
        if claimed:
            unlink_segment(segment)
        return claimed
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
        semaphore = Semaphore(segment.semaphore_name(None))
        semaphore.post()
        # The files go before the pager does: should this process die in between, the pager finishes for it.
        unlink_segment(segment)
        semaphore.close()
        while pager_alive(segment) and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        segment.close()
