"""How far routing would scale: measured where there are two cores for it, SIMULATED up to 64.

Measured, in the same rounds: what a token costs a worker that waits for nobody, publishing at once and putting off; how
long before it needs its lines it asks for them; what a line costs that another core has changed; and the routes of two
processes that share layers. The simulation (`shmroute.bench.contention`) gets the first three and has to foretell the
last: that is its only test here. Nothing in it was fitted.

The tables of 1 to 64 cores are what it says of a machine that is not there: two sockets of 32 cores each, eight of them
on a chiplet, with the latencies of a dual AMD EPYC 7R13 in the README of github.com/nviennot/core-to-core-latency
(23 ns on a chiplet, 107 ns on a socket, 197 ns between sockets), and cores as fast as this machine's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from shmroute.bench import kernels
from shmroute.bench.concurrency import (
    EXPERTS,
    IN_TURN,
    LAYERS,
    ONE_LAYER,
    TOP_K,
    Crowd,
    call_all,
    cpus_of,
    join,
)
from shmroute.bench.contention import Load, Machine, Outcome, simulate
from shmroute.bench.lines import line_transfer
from shmroute.bench.measuring import Summary, ratios
from shmroute.bench.partners import Partner, crew, held, let_go
from shmroute.bench.report import HIGHER, LOWER, NEITHER, Figure, Table, exact, summary_figure
from shmroute.bench.stage import Bench, logits, routing_runtime
from shmroute.errors import ShmrouteError
from shmroute.routing.plan_words import SHARED, TOKENS_PUT_OFF

CORES = (1, 2, 4, 8, 16, 32, 64)
LARGE = Machine("two sockets of 32 cores", 8, 32, 23.0, 107.0, 197.0)
LARGE_LAYERS, LARGE_EXPERTS, LARGE_TOP_K = 61, 256, 8
COMPUTE = 20_000.0
"""Nanoseconds that a worker computes between two layers: little, for the experts of a large model."""

REPETITIONS = 2_000
"""Repetitions of what is timed in one go."""


def measure(bench: Bench) -> Iterator[Table]:
    """What was measured, how well the simulation foretells it, and what it says of more cores."""
    cores = cpus_of(bench)
    if len(cores) < 2:
        raise ShmrouteError("the group 'scaling' measures what a line of another core costs, and there is one core")
    partners = crew(bench.resources, bench.shared, 2, cores)
    window = 0.05 if bench.scale.quick else 0.2
    small = _measured(bench, partners, window, EXPERTS, TOP_K)
    yield _costs(small, EXPERTS, TOP_K)
    yield _validation(small)
    large = _measured(bench, partners, window, LARGE_EXPERTS, LARGE_TOP_K)
    yield _costs(large, LARGE_EXPERTS, LARGE_TOP_K)
    yield from simulated(large)


def parameters(bench: Bench) -> dict[str, list[float]]:
    """What `scenarios` needs, measured."""
    partners = crew(bench.resources, bench.shared, 2, cpus_of(bench))
    return _measured(bench, partners, 0.05, LARGE_EXPERTS, LARGE_TOP_K)


# ---------------------------------------------------------- measured

AT_ONCE, PUT_OFF = "a token, published at once", f"a token, {TOKENS_PUT_OFF} published together"
AHEAD_AT_ONCE, AHEAD_PUT_OFF = "between asking for lines and needing them, at once", "… together"
CHANGING_AT_ONCE, CHANGING_PUT_OFF = "changing the lines, at once", "… of all together"
LINE = "a line that another core has changed"


def _measured(bench: Bench, partners: list[Partner], window: float, experts: int, top_k: int) -> dict[str, list[float]]:
    """By name, a value for each round."""
    with routing_runtime(experts, top_k, layers=LAYERS) as runtime:
        call_all(partners, join, runtime.name)
        one = partners[0]
        samples: dict[str, Callable[[], float]] = {
            AT_ONCE: lambda: float(one.call(cost_at_once, window)),
            PUT_OFF: lambda: float(one.call(cost_put_off, window)),
            AHEAD_AT_ONCE: lambda: float(one.call(ahead, 1, 1)),
            AHEAD_PUT_OFF: lambda: float(one.call(ahead, TOKENS_PUT_OFF, 0)),
            CHANGING_AT_ONCE: lambda: float(one.call(changing, 1)),
            CHANGING_PUT_OFF: lambda: float(one.call(changing, TOKENS_PUT_OFF)),
            LINE: partial(line_transfer, partners, runtime),
            ONE_LAYER: Crowd(runtime, partners, ONE_LAYER, window).rate,
            IN_TURN: Crowd(runtime, partners, IN_TURN, window).rate,
        }
        for sample in samples.values():
            sample()
        values: dict[str, list[float]] = {name: [] for name in samples}
        for _ in range(bench.scale.few_rounds):
            for name, sample in samples.items():
                values[name].append(sample())
        call_all(partners, let_go)
    return values


def cost_at_once(inherited: dict[str, Any], seconds: float) -> float:
    """Nanoseconds for a token of a worker that is alone on a layer."""
    route, rows, experts, weights = _loop(held["runtime"])
    began = time.perf_counter_ns()
    until, count = began + int(seconds * 1e9), 0
    while (now := time.perf_counter_ns()) < until:
        for row in rows:
            route(row, experts, weights)
        count += len(rows)
    return (now - began) / count


def cost_put_off(inherited: dict[str, Any], seconds: float) -> float:
    """The same if it takes the layer for shared; nobody else has its lines."""
    runtime = held["runtime"]
    route, rows, experts, weights = _loop(runtime)
    seen = runtime.router(0)._hot._turns._seen[0]
    began = time.perf_counter_ns()
    until, count = began + int(seconds * 1e9), 0
    while (now := time.perf_counter_ns()) < until:
        for first in range(0, len(rows), TOKENS_PUT_OFF):
            seen[SHARED] = 1  # each publication finds out that it is not
            for row in rows[first : first + TOKENS_PUT_OFF]:
                route(row, experts, weights)
        count += len(rows)
    return (now - began) / count


def ahead(inherited: dict[str, Any], tokens: int, weigh: int) -> float:
    """Nanoseconds between asking for the lines of some tokens and needing them."""
    plan, values, experts, weights = _batch(held["runtime"], tokens)
    prepare = kernels.prepare_publication.compiled()
    began = time.perf_counter_ns()
    prepare(plan.address, values, experts, weights, weigh, REPETITIONS)
    return (time.perf_counter_ns() - began) / REPETITIONS


def changing(inherited: dict[str, Any], tokens: int) -> float:
    """Nanoseconds that publishing some tokens takes from there."""
    plan, _, experts, _ = _batch(held["runtime"], tokens)
    publish = kernels.publish_many.compiled()
    began = time.perf_counter_ns()
    publish(plan.address, experts, REPETITIONS)
    return (time.perf_counter_ns() - began) / REPETITIONS - ahead(inherited, tokens, 0)


def _batch(runtime: Any, tokens: int) -> tuple[kernels.PrivatePlan, Any, Any, Any]:
    """Tokens that have been routed, and a plan to do more with them."""
    config = runtime.config
    values = logits(tokens, config.num_experts)
    experts, weights = np.zeros((tokens, config.top_k), np.int32), np.zeros((tokens, config.top_k), np.float32)
    runtime.router(0).route_into(values, experts, weights)
    return kernels.PrivatePlan(runtime), values, experts, weights


def _loop(runtime: Any) -> tuple[Any, list[Any], Any, Any]:
    """A layer's hot path, and 256 tokens for it: as many as are a multiple of what may be put off."""
    config = runtime.config
    rows = list(logits(256, config.num_experts))
    return (
        runtime.router(0).route_into, rows, np.zeros(config.top_k, np.int32), np.zeros(config.top_k, np.float32)
    )  # fmt: skip


def _costs(measured: dict[str, list[float]], experts: int, top_k: int) -> Table:
    names = (AT_ONCE, PUT_OFF, AHEAD_AT_ONCE, AHEAD_PUT_OFF, CHANGING_AT_ONCE, CHANGING_PUT_OFF, LINE)
    figures = [
        summary_figure(
            name, Summary.of(measured[name]), Summary.of(ratios(measured[name], measured[AT_ONCE])).median
        )
        for name in names
    ]  # fmt: skip
    return Table(
        f"scaling/costs-{experts}", f"what a worker's token costs, {experts} experts, top-{top_k}", "ns", LOWER,
        tuple(figures), "a worker that waits for nobody; the line is what it may have to wait for",
    )  # fmt: skip


# ---------------------------------------------------------- simulated


def _load(measured: dict[str, float], put_off: bool, layers: int, experts: int, top_k: int) -> Load:
    names = (PUT_OFF, AHEAD_PUT_OFF, CHANGING_PUT_OFF) if put_off else (AT_ONCE, AHEAD_AT_ONCE, CHANGING_AT_ONCE)
    private, before, during = (measured[name] for name in names)
    return Load(layers, experts, top_k, TOKENS_PUT_OFF if put_off else 1, private, before, during)


def _validation(measured: dict[str, list[float]]) -> Table:
    """What two processes do, and what the simulation says that they do, round by round."""
    figures: list[Figure] = []
    for way, put_off, layers in ((ONE_LAYER, True, 1), (IN_TURN, False, LAYERS)):
        foretold = []
        for values in zip(*measured.values(), strict=True):
            here = dict(zip(measured, values, strict=True))
            machine = Machine("this one", 1, 1, here[LINE], here[LINE], here[LINE])
            foretold.append(simulate(machine, 2, _load(here, put_off, layers, EXPERTS, TOP_K)).routes_per_ms)
        seen = measured[way]
        figures += [
            summary_figure(f"{way}: measured", Summary.of(seen), 1.0),
            summary_figure(f"{way}: simulated", Summary.of(foretold), Summary.of(ratios(foretold, seen)).median),
        ]
    return Table(
        "scaling/validation", f"two processes, {EXPERTS} experts, top-{TOP_K}: the simulation beside what it foretells",
        "routes per ms", NEITHER, tuple(figures), "the ratio is to what was measured in the same rounds",
    )  # fmt: skip


@dataclass(frozen=True)
class Scenario:
    """What is simulated on many cores; `key` and `title` name it."""

    key: str
    title: str
    load: Load


def scenarios(measured: dict[str, list[float]]) -> list[Scenario]:
    """From the medians of what was measured."""
    middle = {name: Summary.of(values).median for name, values in measured.items()}
    sizes = (LARGE_EXPERTS, LARGE_TOP_K)
    at_once = _load(middle, False, LARGE_LAYERS, *sizes)
    together, turn = f"{TOKENS_PUT_OFF} tokens published together", f"{LARGE_LAYERS} layers in turn"
    computing = f"{turn}, {COMPUTE / 1000:g} µs of compute between"
    return [
        Scenario(
            "one-layer-at-once", "all on one layer, if each token were published", _load(middle, False, 1, *sizes)
        ),
        Scenario("one-layer", f"all on one layer, {together}", _load(middle, True, 1, *sizes)),
        Scenario("in-turn", turn, at_once),
        Scenario("in-turn-computing", computing, replace(at_once, between=COMPUTE)),
    ]


def simulated(measured: dict[str, list[float]]) -> Iterator[Table]:
    """A table for each scenario."""
    for one in scenarios(measured):
        outcomes = [simulate(LARGE, count, one.load) for count in CORES]
        yield Table(
            f"scaling/simulated-{one.key}", f"SIMULATED: {one.title}", "routes per ms", HIGHER,
            tuple(_row(count, outcome, outcomes[0]) for count, outcome in zip(CORES, outcomes, strict=True)),
            f"{LARGE.name}, {LARGE_EXPERTS} experts, top-{LARGE_TOP_K}; ÷ first: speed-up; wait: ns that a token waits "
            "for lines; clock, use: % of the time that the busiest line of a clock, or of experts, is on its way",
        )  # fmt: skip


def _row(count: int, outcome: Outcome, alone: Outcome) -> Figure:
    return exact(
        f"{count} cores" if count > 1 else "1 core", outcome.routes_per_ms, alone.routes_per_ms,
        wait=outcome.wait, clock=100 * outcome.clock, use=100 * outcome.use,
    )  # fmt: skip
