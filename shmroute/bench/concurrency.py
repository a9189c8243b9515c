"""Many processes that route at once: routes per second in all, relative to one process.

Each routes one token after the other through `route_into` for a fixed time, all from the same moment on. On one layer
they share its clock word and the words of the experts that they choose; on different layers they share nothing but
the bell and the ring.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from shmroute.bench.measuring import Contestant, contest, cpus
from shmroute.bench.partners import Partner, crew, held, let_go
from shmroute.bench.report import HIGHER, Table, table
from shmroute.bench.stage import Bench, routing_runtime, token_rows
from shmroute.lifecycle import attach

EXPERTS, TOP_K = 64, 6
PROCESSES = (2, 4, 8)
BETWEEN_LOOKS = 64
"""Routes between two looks at the clock."""

HEAD_START = 0.02
"""Seconds for all to be told before they start."""


def measure(bench: Bench) -> Iterator[Table]:
    """One table."""
    cores = cpus_of(bench)
    window = 0.08 if bench.scale.quick else 0.4
    partners = crew(bench.resources, bench.shared, max(PROCESSES), cores)
    with routing_runtime(EXPERTS, TOP_K, layers=max(PROCESSES)) as runtime:
        call_all(partners, join, runtime.name)
        contestants = [Contestant("1 process", partial(rate, partners[:1], True, False, window))]
        for count in PROCESSES:
            crowd = " (more than cores)" if count > len(cores) else ""
            for same in (False, True):
                where = "all on one layer" if same else "each on its layer"
                contestants.append(
                    Contestant(
                        f"{count} processes, {where}{crowd}", partial(rate, partners[:count], same, False, window)
                    )
                )
        contestants.append(
            Contestant(
                "2 processes, all on one layer, behind one lock", partial(rate, partners[:2], True, True, window)
            )
        )
        yield table(
            "concurrency/routes", f"routing by several processes, {EXPERTS} experts, top-{TOP_K}, {len(cores)} cores",
            "routes per ms", contest(contestants, bench.scale.few_rounds), better=HIGHER,
            note="one token per route; the ratio is to one process alone",
        )  # fmt: skip
        call_all(partners, let_go)


def cpus_of(bench: Bench) -> list[int]:
    """The cores of the whole run: the bench's own thread is pinned while it measures."""
    found: list[int] = bench.shared.setdefault("cpus", cpus())
    return found


def call_all(partners: list[Partner], function: Any, *arguments: object) -> list[Any]:
    """Have all partners run a function at the same time."""
    for partner in partners:
        partner.begin(function, *arguments)
    return [partner.result() for partner in partners]


def rate(partners: list[Partner], same_layer: bool, locked: bool, seconds: float) -> float:
    """Routes per millisecond of some processes together."""
    start = time.monotonic_ns() + int(HEAD_START * 1e9)
    for number, partner in enumerate(partners):
        partner.begin(route_for, 0 if same_layer else number, locked, start, seconds)
    return sum(float(partner.result()) for partner in partners)


# ---------------------------------------------------------- in the partners


def join(inherited: dict[str, Any], name: str) -> None:
    """Attach, and route once on each layer."""
    runtime = held["runtime"] = attach(name, progress=None)
    experts, weights = np.zeros(runtime.config.top_k, np.int32), np.zeros(runtime.config.top_k, np.float32)
    row = token_rows(runtime.config.num_experts)[0]
    for layer in range(runtime.config.num_layers):
        runtime.router(layer).route_into(row, experts, weights)


def route_for(inherited: dict[str, Any], layer: int, locked: bool, start: int, seconds: float) -> float:
    """Route from a moment on for some time; routes per millisecond."""
    runtime, lock = held["runtime"], inherited["lock"]
    route = runtime.router(layer).route_into
    rows = token_rows(runtime.config.num_experts)[:BETWEEN_LOOKS]
    experts, weights = np.zeros(runtime.config.top_k, np.int32), np.zeros(runtime.config.top_k, np.float32)
    end = start + int(seconds * 1e9)
    clock, count = time.monotonic_ns, 0
    while clock() < start:
        pass
    while (now := clock()) < end:
        if locked:
            for row in rows:
                with lock:
                    route(row, experts, weights)
        else:
            for row in rows:
                route(row, experts, weights)
        count += len(rows)
    return count / (max(now - start, 1) / 1e6)
