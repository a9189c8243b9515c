"""Sweeps for the plots: what a token costs against E, k, T and W, and what the pager reads per second.

Each is a dictionary that `shmroute.bench.plots` can draw and JSON can hold: ``name``, ``title``, ``x`` and ``y``
(labels), ``log`` (which axes are logarithmic), ``marks`` (vertical lines: label and x), ``series`` (by name: x, median,
p25 and p75, lists of equal length).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from itertools import cycle
from typing import Any

import numpy as np

from shmroute.bench import kernels, scaling
from shmroute.bench.checkpoints import checkpoint, disk_folder
from shmroute.bench.concurrency import IN_TURN, ONE_LAYER, OWN_LAYERS, PROCESSES, Crowd, call_all, cpus_of, join
from shmroute.bench.contention import simulate
from shmroute.bench.measuring import Contestant, Loop, Summary, contest, unpinned
from shmroute.bench.paging import MIB, _by_pager, _by_threads, _halves, _memory, paged
from shmroute.bench.paging_peers import plain_reads
from shmroute.bench.partners import crew, let_go
from shmroute.bench.routing import Way
from shmroute.bench.routing_peers import numpy_route
from shmroute.bench.stage import ROWS, Bench, logits, routing_runtime, token_rows
from shmroute.errors import ShmrouteError

SHMROUTE, SELECTION, EAGER, NUMPY = "route_into", "selection alone", "the reference's rule", "numpy"

NAMES = (
    "routing-experts",
    "routing-top-k",
    "routing-tokens",
    "routing-workers",
    "routing-cores-simulated",
    "paging-size",
    "paging-threads",
)
"""Of all curves, in the order in which they are measured."""

LARGEST_MIB = 350
"""Of an expert. Four of them are on the disk, four in shared memory at a time: 1.5 GB each."""


def measure(bench: Bench) -> Iterator[dict[str, Any]]:
    """All curves that can be measured here."""
    yield _against_experts(bench)
    yield _against_top_k(bench)
    yield _against_tokens(bench)
    yield _against_workers(bench)
    if len(cpus_of(bench)) > 1:
        yield _against_cores(bench)
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


def _curve(
    name: str, title: str, x: str, y: str, log: str, series: _Series, marks: Sequence[tuple[str, float]] = ()
) -> dict[str, Any]:
    assert name in NAMES
    return {"name": name, "title": title, "x": x, "y": y, "log": log, "series": series.by_name, "marks": list(marks)}


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
            # One token of it would be handed over by Numba, which takes longer than the token does.
            **({} if tokens is None else {SELECTION: Way(select.compiled(), ids, weights, kernels.PrivatePlan(other))}),
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
    with routing_runtime(64, 6, layers=max(PROCESSES)) as runtime:
        call_all(partners, join, runtime.name)
        for count in values:
            contestants = [
                Contestant(way, partial(_ns_per_token, Crowd(runtime, partners[:count], way, window)))
                for way in (OWN_LAYERS, ONE_LAYER, IN_TURN)
            ]
            for result in contest(contestants, bench.scale.few_rounds):
                series.add(result.name, count, result.summary)
        call_all(partners, let_go)
    cores = len(cpus_of(bench))
    title = f"Workers that route at once, 64 experts, top-6, {cores} cores"
    marks = [(f"{cores} cores", float(cores))]
    return _curve("routing-workers", title, "worker processes W", "ns per token of a worker", "", series, marks)


def _against_cores(bench: Bench) -> dict[str, Any]:
    """Of the simulation; see `shmroute.bench.scaling`."""
    series = _Series()
    for scenario in scaling.scenarios(scaling.parameters(bench)):
        if scenario.load.between == 0:  # with compute between it would be a line along the axis
            for count in scaling.CORES:
                outcome = simulate(scaling.LARGE, count, scenario.load)
                series.add(scenario.title, count, Summary.of([outcome.routes_per_ms]))
    marks = [("one chiplet", 8.0), ("one socket", 32.0)]
    title = f"SIMULATED: routing on {scaling.LARGE.name}, 256 experts, top-8"
    return _curve("routing-cores-simulated", title, "cores, one worker each", "routes per ms", "xy", series, marks)


def _ns_per_token(crowd: Crowd) -> float:
    """What a token costs each of some processes."""
    return len(crowd.partners) * 1e6 / crowd.rate()


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
    mib = (0.1, 1, 8) if bench.scale.quick else (0.1, 0.3, 1, 4, 16, 64, 128, LARGEST_MIB)
    series = _Series()
    for value in mib:
        count = int(min(max(64 / value, 2), 64))
        try:
            _bandwidth(bench, series, value, int(value * MIB), count, 2)
        except ShmrouteError as error:
            if not series.by_name:
                raise
            bench.absent[f"loads of experts of {value:g} MiB or more"] = str(error)  # no room for them
            break
    title = "Loads, 2 at a time, warm page cache"
    return _curve("paging-size", title, "expert size, MiB", "MB/s", "xy", series)


def _against_threads(bench: Bench) -> dict[str, Any]:
    series = _Series()
    for threads in (1, 2, 4) if bench.scale.quick else (1, 2, 3, 4, 6, 8, 12, 16):
        _bandwidth(bench, series, threads, 4 * MIB, 16, threads)
    cores = len(cpus_of(bench))
    title, marks = "Loads of experts of 4 MiB, warm page cache", [(f"{cores} cores", float(cores))]
    return _curve("paging-threads", title, "loads at a time (I/O threads)", "MB/s", "", series, marks)
