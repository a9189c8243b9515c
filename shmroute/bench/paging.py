"""Paging: how fast the pager loads, beside plain reads of the same ranges, and how often it reads.

Two times are taken of the pager: until all that was asked for is resident, which is its own work, and until one worker
has leased each, as `Runtime.experts` hands them out. The memory of both the pager and its peers has been written to
before: the sample that warms up sees to that.

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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import cycle, islice
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
from shmroute.errors import ShmrouteError
from shmroute.lifecycle import attach, create
from shmroute.runtime import Runtime
from shmroute.shared.atomic import WORD
from shmroute.shared.layout import HEADER_PAGER
from shmroute.shared.words import RESIDENT, URGENT, expert_state, identity_pid

IO_THREADS = 2
SUBJECT = "pager, until all are resident"
LEASED = "pager, until a worker has leased each once"
PATIENCE = 120.0

MIB = 1 << 20
QUICK_SIZES = ((MIB, 64), (8 * MIB, 12))
FULL_SIZES = ((MIB, 256), (4 * MIB, 64), (16 * MIB, 16), (64 * MIB, 4))
"""Bytes of an expert, and how many are loaded in one sample: enough for that to take longer than it takes to begin."""

MISS_SIZES = (192 << 10, MIB)
MISSES = 15
"""Misses in one sample of the time that one takes."""

REST = 0.002
"""Seconds between two misses, in which the pager falls asleep."""

LOOK = 0.0005
"""Seconds between two looks whether all are resident: to be woken for each would cost the cores that are measured."""

WORKERS = 4


def measure(bench: Bench) -> Iterator[Table]:
    """Bandwidths, then single misses, then reads."""
    with unpinned():
        for size, count in QUICK_SIZES if bench.scale.quick else FULL_SIZES:
            with checkpoint(disk_folder(), 2 * count, size) as made:
                for cold in (False, True):
                    yield bandwidth(bench, made, cold)
        for size in MISS_SIZES:
            with checkpoint(disk_folder(), 2, size) as made:
                yield one_miss(bench, made)
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
        contestants = [
            _pager_contestant(SUBJECT, _until_resident, bench, made, cold, enter(paged(made, IO_THREADS))),
            _pager_contestant(LEASED, _by_pager, bench, made, cold, enter(paged(made, IO_THREADS))),
        ]
        if cold:
            dropping = enter(paged(made, IO_THREADS, drop=True))
            name = "the first, and the file's pages dropped (the default)"
            contestants.append(_pager_contestant(name, _until_resident, bench, made, cold, dropping))
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


def _pager_contestant(
    name: str,
    load: Callable[[Runtime, Iterator[list[int]], Checkpoint, bool], float],
    bench: Bench,
    made: Checkpoint,
    cold: bool,
    runtime: Runtime,
) -> Contestant:
    wanted = (bench.scale.rounds + 1) * (made.experts // 2)  # with the sample that warms up

    def details() -> dict[str, float]:
        return {"loads each": runtime.metrics().pager.counters["loads"] / wanted}

    return Contestant(name, partial(load, runtime, cycle(_halves(made)), made, cold), details)


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


def _until_resident(runtime: Runtime, halves: Iterator[list[int]], made: Checkpoint, cold: bool) -> float:
    """MB/s until each expert of a half that was asked for is resident."""
    experts = next(halves)
    runtime.affinity(0).update(experts)
    leases, segment = runtime._lease_table(), segment_of(runtime)
    row = segment.layout.row(segment.layout.experts, 0)
    if cold:
        made.forget()
    began = time.perf_counter()
    for expert in experts:
        leases.submit(0, expert, URGENT)
    for expert in experts:
        while expert_state(segment.read(row + expert * WORD)) != RESIDENT:
            if time.perf_counter() - began > PATIENCE:
                raise ShmrouteError(f"expert {expert} was not resident within {PATIENCE:g} s")
            time.sleep(LOOK)
    return len(experts) * made.expert_bytes / (time.perf_counter() - began) / 1e6


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


# ---------------------------------------------------------- one miss


def one_miss(bench: Bench, made: Checkpoint) -> Table:
    """One table: microseconds from a request to the lease, with nothing else to do and a warm page cache."""
    with ExitStack() as resources:
        runtime = resources.enter_context(paged(made, IO_THREADS, slots=1))
        target = resources.enter_context(_memory(made))
        plain = PEERS["plain preadv + xxh3"](made, False, resources)
        wanted = (bench.scale.rounds + 1) * MISSES

        def miss(expert: int) -> None:
            with runtime.expert(0, expert, timeout=PATIENCE):
                pass

        def loads() -> dict[str, float]:
            return {"loads each": runtime.metrics().pager.counters["loads"] / wanted}

        results = contest(
            [
                Contestant(
                    "pager, from the request to the lease", partial(_each_after_a_rest, miss, cycle((0, 1))), loads
                ),
                Contestant(
                    "plain preadv + xxh3 in the thread that wants it",
                    partial(_each_after_a_rest, lambda expert: plain(expert, target[0]), cycle((0, 1))),
                ),
            ],
            bench.scale.rounds,
        )
    title = f"one miss of {made.expert_bytes / MIB:.3g} MiB, warm page cache"
    return table(f"paging/{made.expert_bytes}/miss", title, "µs", results)


def _each_after_a_rest(load: Callable[[int], object], experts: Iterator[int]) -> float:
    """The median of `MISSES` loads, in µs."""
    durations = []
    for expert in islice(experts, MISSES):
        time.sleep(REST)
        began = time.perf_counter()
        load(expert)
        durations.append(time.perf_counter() - began)
    return float(np.median(durations)) * 1e6


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
