"""Many processes that route at once: routes per second in all, relative to one process.

Each routes one token after the other through `route_into` for a fixed time, all from the same moment on. On one layer
they share its clock word and the words of the experts that they choose, and put tokens off
(`shmroute.routing.publication`; the table says what share of them); if they go through several layers in turn they
share as much, and put nothing off; on different layers they share nothing but the bell and the ring.

What sharing costs depends on what a line costs that another core has changed, so that is measured in the same rounds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from shmroute.bench.lines import line_transfer
from shmroute.bench.measuring import Contestant, contest, cpus
from shmroute.bench.partners import Partner, crew, held, let_go
from shmroute.bench.report import HIGHER, LOWER, Table, summary_figure, table
from shmroute.bench.stage import Bench, routing_runtime, token_rows
from shmroute.lifecycle import attach
from shmroute.runtime import Runtime

EXPERTS, TOP_K = 64, 6
PROCESSES = (2, 4, 8)
LAYERS = max(PROCESSES)
ONE_LAYER, OWN_LAYERS = "all on one layer", "each on its layer"
IN_TURN, LOCKED = f"all on {LAYERS} layers in turn", "all on one layer, behind one lock"

BETWEEN_LOOKS = 64
"""Routes between two looks at the clock."""

HEAD_START = 0.02
"""Seconds for all to be told before they start."""


def measure(bench: Bench) -> Iterator[Table]:
    """One table, and what a line costs."""
    cores = cpus_of(bench)
    window = 0.08 if bench.scale.quick else 0.4
    partners = crew(bench.resources, bench.shared, max(PROCESSES), cores)
    with routing_runtime(EXPERTS, TOP_K, layers=LAYERS) as runtime:
        call_all(partners, join, runtime.name)

        def crowd(name: str, count: int, way: str) -> Contestant:
            return Crowd(runtime, partners[:count], way, window).contestant(name)

        contestants = [crowd("1 process", 1, ONE_LAYER)]
        for count in PROCESSES:
            beyond = " (more than cores)" if count > len(cores) else ""
            contestants += [
                crowd(f"{count} processes, {way}{beyond}", count, way) for way in (OWN_LAYERS, ONE_LAYER, IN_TURN)
            ]
        contestants.append(crowd(f"2 processes, {LOCKED}", 2, LOCKED))
        lines = []
        if len(cores) > 1:
            lines.append(Contestant("a line that another core has changed", partial(line_transfer, partners, runtime)))
        else:
            bench.absent["what a line costs that another core has changed"] = "there is one core"
        results = contest([*contestants, *lines], bench.scale.few_rounds)
        call_all(partners, let_go)
    yield table(
        "concurrency/routes", f"routing by several processes, {EXPERTS} experts, top-{TOP_K}, {len(cores)} cores",
        "routes per ms", results[: len(contestants)], better=HIGHER,
        note="one token per route; the ratio is to one process alone",
    )  # fmt: skip
    for result in results[len(contestants) :]:
        figure = summary_figure(result.name, result.summary, 1.0)
        yield Table("concurrency/line", "what sharing costs", "ns", LOWER, (figure,))


def cpus_of(bench: Bench) -> list[int]:
    """The cores of the whole run: the bench's own thread is pinned while it measures."""
    found: list[int] = bench.shared.setdefault("cpus", cpus())
    return found


def call_all(partners: list[Partner], function: Any, *arguments: object) -> list[Any]:
    """Have all partners run a function at the same time."""
    for partner in partners:
        partner.begin(function, *arguments)
    return [partner.result() for partner in partners]


@dataclass
class Crowd:
    """Some processes that route at once.

    Attributes
    ----------
    runtime : Runtime
        That they have joined.
    partners : list of Partner
    way : str
        One of `ONE_LAYER`, `OWN_LAYERS`, `IN_TURN` and `LOCKED`.
    seconds : float
    """

    runtime: Runtime
    partners: list[Partner]
    way: str
    seconds: float
    tokens: int = 0
    deferred: int = 0

    def rate(self) -> float:
        """Routes per millisecond of all together."""
        before = self.runtime.metrics().total.counters
        start = time.monotonic_ns() + int(HEAD_START * 1e9)
        for number, partner in enumerate(self.partners):
            partner.begin(route_for, self.way, number, start, self.seconds)
        rates = [float(partner.result()) for partner in self.partners]
        after = self.runtime.metrics().total.counters
        self.tokens += after["tokens"] - before["tokens"]
        self.deferred += after["deferred"] - before["deferred"]
        return sum(rates)

    def contestant(self, name: str) -> Contestant:
        """As one side of a contest."""
        return Contestant(name, self.rate, lambda: {"put off": self.deferred / self.tokens})


# ---------------------------------------------------------- in the partners


def join(inherited: dict[str, Any], name: str) -> None:
    """Attach, and route once on each layer."""
    runtime = held["runtime"] = attach(name, progress=None)
    experts, weights = np.zeros(runtime.config.top_k, np.int32), np.zeros(runtime.config.top_k, np.float32)
    row = token_rows(runtime.config.num_experts)[0]
    for layer in range(runtime.config.num_layers):
        runtime.router(layer).route_into(row, experts, weights)


def route_for(inherited: dict[str, Any], way: str, number: int, start: int, seconds: float) -> float:
    """Route from a moment on for some time; routes per millisecond. `number` is which of the processes this is."""
    runtime, lock = held["runtime"], inherited["lock"]
    route = runtime.router(number if way == OWN_LAYERS else 0).route_into
    in_turn = [runtime.router(layer).route_into for layer in range(LAYERS)]
    rows = token_rows(runtime.config.num_experts)[:BETWEEN_LOOKS]
    experts, weights = np.zeros(runtime.config.top_k, np.int32), np.zeros(runtime.config.top_k, np.float32)
    end = start + int(seconds * 1e9)
    clock, count = time.monotonic_ns, 0
    while clock() < start:
        pass
    while (now := clock()) < end:
        if way == LOCKED:
            for row in rows:
                with lock:
                    route(row, experts, weights)
        elif way == IN_TURN:
            for row in rows[:: len(in_turn)]:
                for route in in_turn:
                    route(row, experts, weights)
        else:
            for row in rows:
                route(row, experts, weights)
        count += len(rows)
    return count / (max(now - start, 1) / 1e6)
