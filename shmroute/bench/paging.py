"""Paging: how fast the pager loads, beside plain reads of the same ranges, and how often it reads.

There are twice as many experts as slots, in two halves. Each sample asks for the half that is not resident, so every
load also evicts. Before that their affinity is raised, as routing does before a worker asks: otherwise all are worth
the same, and the pager may evict what was just asked for rather than what nobody wants. That each was loaded once is
shown beside the pager's figures.

*Warm* means that the file is in the page cache and the pager leaves it there; *cold*, that the cache was told to forget
the file just before each sample (a virtual machine's host may remember it all the same).
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np

from shmroute.bench.checkpoints import Checkpoint, checkpoint, disk_folder
from shmroute.bench.concurrency import call_all, cpus_of
from shmroute.bench.measuring import Contestant, bytes_read, contest, unpinned
from shmroute.bench.paging_peers import PEERS, LoadInto
from shmroute.bench.partners import crew, held, let_go
from shmroute.bench.report import HIGHER, LOWER, Table, exact, table
from shmroute.bench.stage import Bench, segment_name, segment_of
from shmroute.budget import slot_bytes_of
from shmroute.config import PagerConfig, RuntimeConfig
from shmroute.lifecycle import attach, create
from shmroute.runtime import Runtime
from shmroute.shared.layout import HEADER_PAGER
from shmroute.shared.words import identity_pid

IO_THREADS = 2
SUBJECT = "pager"
PATIENCE = 120.0

MIB = 1 << 20
QUICK_SIZES = ((MIB, 12), (8 * MIB, 4))
FULL_SIZES = ((MIB, 48), (16 * MIB, 12), (64 * MIB, 4))
"""Bytes of an expert, and how many are loaded in one sample."""

WORKERS = 4


def measure(bench: Bench) -> Iterator[Table]:
    """Bandwidths, then reads."""
    with unpinned():
        for size, count in QUICK_SIZES if bench.scale.quick else FULL_SIZES:
            with checkpoint(disk_folder(), 2 * count, size) as made:
                for cold in (False, True):
                    yield bandwidth(bench, made, cold)
        with checkpoint(disk_folder(), 8, MIB) as made:
            yield _reads(bench, made)


def bandwidth(bench: Bench, made: Checkpoint, cold: bool) -> Table:
    """One table: MB/s of the pager and its peers."""
    count, size = made.experts // 2, made.expert_bytes
    temperature = "cold" if cold else "warm"
    with ExitStack() as resources:
        enter = resources.enter_context
        target = enter(_memory(made))
        pool = enter(ThreadPoolExecutor(IO_THREADS))
        contestants = [_pager_contestant(SUBJECT, bench, made, cold, enter(paged(made, IO_THREADS)))]
        if cold:
            dropping = enter(paged(made, IO_THREADS, drop=True))
            name = "pager that then drops the file's pages (the default)"
            contestants.append(_pager_contestant(name, bench, made, cold, dropping))
        for name, make in PEERS.items():
            contestants.append(
                Contestant(
                    name,
                    partial(_by_threads, pool, make(made, cold, resources), target, cycle(_halves(made)), made, cold),
                )
            )
        results = contest(contestants, bench.scale.rounds)
    return table(
        f"paging/{size}/{temperature}",
        f"{count} experts of {size / MIB:.3g} MiB, {temperature} page cache, {IO_THREADS} threads", "MB/s", results,
        better=HIGHER,
    )  # fmt: skip


def _pager_contestant(name: str, bench: Bench, made: Checkpoint, cold: bool, runtime: Runtime) -> Contestant:
    wanted = (bench.scale.rounds + 1) * (made.experts // 2)  # with the sample that warms up

    def details() -> dict[str, float]:
        return {"loads each": runtime.metrics().pager.counters["loads"] / wanted}

    return Contestant(name, partial(_by_pager, runtime, cycle(_halves(made)), made, cold), details)


def _halves(made: Checkpoint) -> list[list[int]]:
    half = made.experts // 2
    return [list(range(half)), list(range(half, made.experts))]


@contextmanager
def paged(made: Checkpoint, io_threads: int, *, drop: bool = False, slots: int | None = None) -> Iterator[Runtime]:
    """A runtime with a pager over a checkpoint, and slots for half of its experts."""
    budget = (slots or made.experts // 2) * slot_bytes_of(made.expert_bytes)
    config = RuntimeConfig.from_checkpoint(
        made.folder, budget,
        pager=PagerConfig(io_threads=io_threads, drop_page_cache=drop, prefetch=0),
    )  # fmt: skip
    with create(segment_name(), config, pager=True, progress=None) as runtime:
        yield runtime


@contextmanager
def _memory(made: Checkpoint) -> Iterator[list[memoryview]]:
    """Slots of a segment that no pager serves: the same kind of memory, of which the peers may do as they like."""
    config = RuntimeConfig(1, made.experts, 1, made.expert_bytes, made.experts // 2)
    with create(segment_name(), config, progress=None) as runtime:
        pool = runtime._attachment.pool
        slots = [pool.writable(slot) for slot in range(config.slots)]
        yield slots
        slots.clear()


def _by_pager(runtime: Runtime, halves: Iterator[list[int]], made: Checkpoint, cold: bool) -> float:
    """MB/s until each expert of a half has been leased once."""
    experts = next(halves)
    runtime.affinity(0).update(experts)
    if cold:
        made.forget()
    began = time.perf_counter()
    for _ in runtime.experts(0, experts, timeout=PATIENCE):
        pass
    return len(experts) * made.expert_bytes / (time.perf_counter() - began) / 1e6


def _by_threads(
    pool: ThreadPoolExecutor,
    load: LoadInto,
    target: list[memoryview],
    halves: Iterator[list[int]],
    made: Checkpoint,
    cold: bool,
) -> float:
    experts = next(halves)
    if cold:
        made.forget()
    began = time.perf_counter()
    list(pool.map(load, experts, target))
    return len(experts) * made.expert_bytes / (time.perf_counter() - began) / 1e6


# ---------------------------------------------------------- how often something is read


def _reads(bench: Bench, made: Checkpoint) -> Table:
    """Four workers miss the same experts at the same moment; how often each was read, by the kernel's count."""
    partners = crew(bench.resources, bench.shared, WORKERS, cpus_of(bench))
    total = made.experts * made.expert_bytes
    with paged(made, IO_THREADS, slots=made.experts) as runtime:
        pager = identity_pid(segment_of(runtime).read(HEADER_PAGER))
        call_all(partners, be_attached, runtime.name)
        before = bytes_read(pager)
        call_all(partners, take_all, made.experts)
        cached = (bytes_read(pager) - before) / total
        loads = runtime.metrics().pager.counters["loads"]
        call_all(partners, let_go)
    alone = sum(call_all(partners, read_all, str(made.path), made.begin, total)) / total
    return Table(
        "paging/reads", f"{WORKERS} workers that miss the same {made.experts} experts at the same moment",
        "reads per expert", LOWER,
        (
            exact("one cache", round(cached, 2), None, loads=loads),
            exact("each worker reads for itself (numpy.fromfile)", round(alone, 2), round(cached, 2)),
        ),
        "bytes that the processes asked the file system for, over the experts' bytes; loads as the pager counts them",
    )  # fmt: skip


def be_attached(inherited: dict[str, Any], name: str) -> None:
    """Attach and claim a lane."""
    held["runtime"] = attach(name, progress=None)
    held["runtime"].router(0)


def take_all(inherited: dict[str, Any], count: int) -> None:
    """Lease each expert once."""
    for _ in held["runtime"].experts(0, list(range(count)), timeout=PATIENCE):
        pass


def read_all(inherited: dict[str, Any], path: str, begin: int, length: int) -> int:
    """Read the experts' range into private memory; how many bytes that were by the kernel's count."""
    before = bytes_read(os.getpid())
    np.fromfile(path, np.uint8, length, offset=begin)
    return bytes_read(os.getpid()) - before
