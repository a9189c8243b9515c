"""Sweeps for the plots: what a token costs against E, k, T and W, and what the pager reads per second.

Each is a dictionary that `shmroute.bench.plots` can draw and JSON can hold: ``name``, ``title``, ``x`` and ``y``
(labels), ``log`` (which axes are logarithmic), ``series`` (by name: x, median, p25 and p75, lists of equal length).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np

from shmroute.bench import kernels
from shmroute.bench.checkpoints import checkpoint, disk_folder
from shmroute.bench.concurrency import call_all, cpus_of, join, rate
from shmroute.bench.measuring import Contestant, Loop, Summary, contest, unpinned
from shmroute.bench.paging import MIB, _by_pager, _by_threads, _halves, _memory, paged
from shmroute.bench.paging_peers import plain_reads
from shmroute.bench.partners import Partner, crew, let_go
from shmroute.bench.routing import Way
from shmroute.bench.routing_peers import numpy_route
from shmroute.bench.stage import ROWS, Bench, logits, routing_runtime, token_rows
from shmroute.errors import ShmrouteError

SHMROUTE, SELECTION, EAGER, NUMPY = "route_into", "selection alone", "the reference's rule", "numpy"


def measure(bench: Bench) -> Iterator[dict[str, Any]]:
    """All curves."""
    yield _against_experts(bench)
    yield _against_top_k(bench)
    yield _against_tokens(bench)
    yield _against_workers(bench)
    with unpinned():
        yield _against_size(bench)
        yield _against_threads(bench)


class _Series:
    """Collects points by the name of what was measured."""

    def __init__(self) -> None:
        self.by_name: dict[str, dict[str, list[float]]] = {}

    def add(self, name: str, x: float, summary: Summary) -> None:
        """One point."""
        series = self.by_name.setdefault(name, {"x": [], "median": [], "p25": [], "p75": []})
        for key, value in (("x", x), ("median", summary.median), ("p25", summary.p25), ("p75", summary.p75)):
            series[key].append(value)


def _curve(name: str, title: str, x: str, y: str, log: str, series: _Series) -> dict[str, Any]:
    return {"name": name, "title": title, "x": x, "y": y, "log": log, "series": series.by_name}


# ---------------------------------------------------------- routing


def _costs(bench: Bench, experts: int, top_k: int, tokens: int | None) -> Iterator[tuple[str, Summary]]:
    """What a token costs by four ways to route, in ns."""
    shape = (top_k,) if tokens is None else (tokens, top_k)
    ids, weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    select, eager = (
        (kernels.select_token, kernels.eager_token) if tokens is None else (kernels.select_batch, kernels.eager_batch)
    )
    rows: Sequence[Any] = (
        token_rows(experts) if tokens is None else [logits(tokens, experts, i) for i in range(-(-ROWS // tokens))]
    )
    with routing_runtime(experts, top_k) as runtime, routing_runtime(experts, top_k) as other:
        ways = {
            SHMROUTE: Way(runtime.router(0).route_into, ids, weights),
            SELECTION: Way(select.compiled(), ids, weights, kernels.PrivatePlan(other)),
            EAGER: Way(eager.compiled(), ids, weights, kernels.PrivatePlan(other)),
            NUMPY: Way(numpy_route(ids, weights), ids, weights),
        }
        per = len(rows) * (tokens or 1)
        contestants = [
            Contestant(name, Loop(way.loop(rows), bench.scale.loop_seconds, per)) for name, way in ways.items()
        ]
        for result in contest(contestants, bench.scale.few_rounds):
            yield result.name, result.summary


def _sweep(bench: Bench, values: Sequence[int], at: Callable[[int], tuple[int, int, int | None]]) -> _Series:
    series = _Series()
    for value in values:
        for name, summary in _costs(bench, *at(value)):
            series.add(name, value, summary)
    return series


def _against_experts(bench: Bench) -> dict[str, Any]:
    values = (16, 64, 256, 1024) if bench.scale.quick else (8, 16, 32, 64, 128, 256, 512, 1024)
    series = _sweep(bench, values, lambda experts: (experts, min(8, experts), None))
    return _curve("routing-experts", "One token, top-8", "experts E", "ns per token", "xy", series)


def _against_top_k(bench: Bench) -> dict[str, Any]:
    values = (1, 4, 16) if bench.scale.quick else (1, 2, 4, 6, 8, 12, 16, 32)
    series = _sweep(bench, values, lambda top_k: (256, top_k, None))
    return _curve("routing-top-k", "One token, 256 experts", "experts chosen k", "ns per token", "xy", series)


def _against_tokens(bench: Bench) -> dict[str, Any]:
    values = (1, 16, 256) if bench.scale.quick else (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    series = _sweep(bench, values, lambda tokens: (256, 8, tokens))
    return _curve("routing-tokens", "Batches, 256 experts, top-8", "tokens T in a call", "ns per token", "xy", series)


def _against_workers(bench: Bench) -> dict[str, Any]:
    values = (1, 2, 4) if bench.scale.quick else (1, 2, 3, 4, 6, 8)
    window = 0.08 if bench.scale.quick else 0.3
    series = _Series()
    partners = crew(bench.resources, bench.shared, max(values), cpus_of(bench))
    with routing_runtime(64, 6, layers=max(values)) as runtime:
        call_all(partners, join, runtime.name)
        for count in values:
            contestants = [
                Contestant(name, partial(_ns_per_token, partners[:count], same_layer, window))
                for name, same_layer in (("each on its layer", False), ("all on one layer", True))
            ]
            for result in contest(contestants, bench.scale.few_rounds):
                series.add(result.name, count, result.summary)
        call_all(partners, let_go)
    title = f"Workers that route at once, 64 experts, top-6, {len(cpus_of(bench))} cores"
    return _curve("routing-workers", title, "worker processes W", "ns per token of a worker", "y", series)


def _ns_per_token(partners: list[Partner], same_layer: bool, window: float) -> float:
    """What a token costs each of some processes."""
    return len(partners) * 1e6 / rate(partners, same_layer, False, window)


# ---------------------------------------------------------- paging


def _bandwidth(bench: Bench, series: _Series, x: float, size: int, count: int, threads: int) -> None:
    """One point of the pager and of plain reads, with a warm page cache."""
    with ExitStack() as resources:
        enter = resources.enter_context
        made = enter(checkpoint(disk_folder(), 2 * count, size))
        runtime, target = enter(paged(made, threads)), enter(_memory(made))
        pool, load = enter(ThreadPoolExecutor(threads)), plain_reads(made, False, resources)
        mine, theirs = cycle(_halves(made)), cycle(_halves(made))
        contestants = [
            Contestant("pager", lambda: _by_pager(runtime, mine, made, False)),
            Contestant("plain preadv + xxh3", lambda: _by_threads(pool, load, target, theirs, made, False)),
        ]
        for result in contest(contestants, bench.scale.few_rounds):
            series.add(result.name, x, result.summary)


def _against_size(bench: Bench) -> dict[str, Any]:
    mib = (0.1, 1, 8) if bench.scale.quick else (0.1, 0.3, 1, 4, 16, 64, 128, 350)
    series = _Series()
    for value in mib:
        count = int(min(max(64 / value, 2), 64))
        try:
            _bandwidth(bench, series, value, int(value * MIB), count, 2)
        except ShmrouteError:
            if not series.by_name:
                raise
            break  # no room for larger ones, on the disk or in shared memory
    return _curve("paging-size", "Loads, 2 threads, warm page cache", "expert size, MiB", "MB/s", "xy", series)


def _against_threads(bench: Bench) -> dict[str, Any]:
    series = _Series()
    for threads in (1, 2, 4) if bench.scale.quick else (1, 2, 3, 4, 6, 8):
        _bandwidth(bench, series, threads, 4 * MIB, 16, threads)
    return _curve("paging-threads", "Loads of experts of 4 MiB, warm page cache", "I/O threads", "MB/s", "", series)
