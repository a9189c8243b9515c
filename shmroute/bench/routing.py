"""Routing: one token and batches, beside the parts it is made of and other ways to choose.

| contestant | what its difference to `route_into` says |
|---|---|
| three arrays into compiled code | what no function with this interface can undercut |
| selection alone | what all of sharing costs: residency, affinity, counters, requests |
| the reference's rule | what lazy decay saves: every score decays by a CAS at every token (and nothing is counted) |
| behind a lock | what one lock for all workers would cost, nobody else wanting it |
| without timing | what the latency histogram costs: two readings of the clock |
| half / nothing resident | the bonus, and what a miss adds when its request is already queued |

Then, with half of the experts resident, each rule of the cache beside the absolute bonus, and each scoring of models.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from shmroute.bench import kernels
from shmroute.bench.measuring import Contestant, Latencies, Loop, contest, contest_anew
from shmroute.bench.report import Table, table
from shmroute.bench.routing_peers import PEERS
from shmroute.bench.stage import ROWS, Bench, logits, routing_runtime, token_rows
from shmroute.config import RouterConfig
from shmroute.runtime import Runtime

GEOMETRIES = ((8, 2), (64, 6), (128, 8), (256, 8))
"""(E, k): those of Mixtral, DeepSeek-V2 and OLMoE, Qwen3-MoE, DeepSeek-V3."""

BATCHES = (32, 256)

RULED_BATCH = 256

RULED_EXPERTS = 64
"""From so many on rules are measured: with fewer there is little for them to choose from."""

RULED: dict[str, Callable[[int, int], RouterConfig]] = {
    "absolute": lambda experts, k: RouterConfig(),
    "cache-prior, J = 2": lambda experts, k: RouterConfig(rule="cache-prior", top_j=2),
    "max-rank, J = 2, M = 2 k": lambda experts, k: RouterConfig(
        rule="max-rank", top_j=2, max_rank=min(2 * k, experts), cache_bonus=1.0
    ),
    "cumulative-threshold, J = 2": lambda experts, k: RouterConfig(
        rule="cumulative-threshold", top_j=2, cache_bonus=0.6
    ),
    "probability": lambda experts, k: RouterConfig(rule="probability", cache_bonus=0.01),
    "absolute, not renormalised": lambda experts, k: RouterConfig(renormalize=False),
    "absolute, best 4 of 8 groups": lambda experts, k: RouterConfig(n_group=8, topk_group=4),
    "absolute, sigmoid": lambda experts, k: RouterConfig(scoring="sigmoid", cache_bonus=0.03),
    "absolute, sigmoid, best 4 of 8 groups by two": lambda experts, k: RouterConfig(
        scoring="sigmoid", n_group=8, topk_group=4, group_score="top2-sum", cache_bonus=0.03
    ),
}
"""Rules and scorings for a number of experts and of choices; the first is the subject."""

SUBJECT = "route_into"


def measure(bench: Bench) -> Iterator[Table]:
    """All routing tables."""
    for experts, top_k in GEOMETRIES:
        yield _one_token(bench, experts, top_k)
        yield _latency(bench, experts, top_k)
        for tokens in BATCHES:
            yield _batch(bench, experts, top_k, tokens)
        if experts >= RULED_EXPERTS:
            yield _rules(bench, experts, top_k)


@contextlib.contextmanager
def _runtimes(experts: int, top_k: int) -> Iterator[dict[str, Runtime]]:
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        yield {
            "all": enter(routing_runtime(experts, top_k)),
            "untimed": enter(routing_runtime(experts, top_k, metrics=False)),
            "half": enter(routing_runtime(experts, top_k, resident=range(0, experts, 2))),
            "none": enter(routing_runtime(experts, top_k, resident=[])),
            "eager": enter(routing_runtime(experts, top_k)),
        }


@dataclass(frozen=True)
class Way:
    """One way to route: ``call(row, experts, weights)``, or ``call(plan's address, row, experts, weights)``.

    Called as they are, without a wrapper in between, which would cost as much as some of them do.
    """

    call: Callable[..., object]
    experts: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    plan: kernels.PrivatePlan | None = None

    def loop(self, rows: Sequence[Any]) -> Callable[[int], None]:
        """For `Loop`: so many times all rows."""
        call, experts, weights, plan = self.call, self.experts, self.weights, self.plan

        def run(count: int) -> None:
            for _ in range(count):
                for row in rows:
                    call(row, experts, weights)

        def run_with_plan(count: int) -> None:
            address = plan.address if plan else 0
            for _ in range(count):
                for row in rows:
                    call(address, row, experts, weights)

        return run if plan is None else run_with_plan

    def latencies(self, rows: Sequence[Any], count: int) -> Latencies:
        """Of single calls."""
        call, experts, weights, plan = self.call, self.experts, self.weights, self.plan
        if plan is None:
            return Latencies(lambda row: call(row, experts, weights), rows, count)
        return Latencies(lambda row: call(plan.address, row, experts, weights), rows, count)


def ways(bench: Bench, runtimes: dict[str, Runtime], top_k: int, tokens: int | None) -> dict[str, Way]:
    """All ways to route one token (`tokens` None) or a batch, by name; the first is the subject."""
    shape = (top_k,) if tokens is None else (tokens, top_k)
    ids, weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
    token = tokens is None

    def into(name: str) -> Way:
        return Way(runtimes[name].router(0).route_into, ids, weights)

    def kernel(loop: kernels.OnDemand) -> Way:
        return Way(loop.compiled(), ids, weights, kernels.PrivatePlan(runtimes["eager"]))

    found = {
        SUBJECT: into("all"),
        "… without timing": into("untimed"),
        "… half of the experts resident": into("half"),
        "… nothing resident, all requested": into("none"),
        "three arrays into compiled code": kernel(kernels.bare_token if token else kernels.bare_batch),
        "selection alone, nothing shared": kernel(kernels.select_token if token else kernels.select_batch),
        "the reference's rule, a CAS per expert": kernel(kernels.eager_token if token else kernels.eager_batch),
        "route_into behind a multiprocessing.Lock": Way(_locked(into("all").call), ids, weights),
    }
    for name, make in PEERS.items():
        try:
            found[name] = Way(make(ids, weights), ids, weights)
        except ImportError as error:
            bench.absent[name] = str(error)
    return found


def _locked(route: Callable[..., object]) -> Callable[..., object]:
    lock = multiprocessing.Lock()

    def call(row: Any, experts: Any, weights: Any) -> None:
        with lock:
            route(row, experts, weights)

    return call


@contextlib.contextmanager
def _loops(bench: Bench, experts: int, top_k: int, tokens: int | None) -> Iterator[list[Contestant]]:
    """Fresh runtimes, arrays and loops."""
    rows: list[Any] = token_rows(experts)
    if tokens is not None:
        rows = [logits(tokens, experts, seed) for seed in range(-(-2 * ROWS // tokens))]
    per = len(rows) * (tokens or 1)
    with _runtimes(experts, top_k) as runtimes:
        yield [
            Contestant(name, Loop(way.loop(rows), bench.scale.loop_seconds, per))
            for name, way in ways(bench, runtimes, top_k, tokens).items()
        ]


def _one_token(bench: Bench, experts: int, top_k: int) -> Table:
    return table(
        f"routing/{experts}x{top_k}/token", f"one token, {experts} experts, top-{top_k}", "ns",
        contest_anew(partial(_loops, bench, experts, top_k, None), bench.scale.rounds),
        note="in a loop; every expert resident unless it says otherwise",
    )  # fmt: skip


def _latency(bench: Bench, experts: int, top_k: int) -> Table:
    contestants = []
    with _runtimes(experts, top_k) as runtimes:
        for name, way in ways(bench, runtimes, top_k, None).items():
            latencies = way.latencies(token_rows(experts), bench.scale.calls)
            contestants.append(Contestant(name, latencies, latencies.details))
        results = contest(contestants, bench.scale.few_rounds)
    return table(
        f"routing/{experts}x{top_k}/latency", f"one token, {experts} experts, top-{top_k}: each call by itself", "ns",
        results, note="percentiles of all calls, with one reading of the clock in each; max is the scheduler's",
    )  # fmt: skip


def _batch(bench: Bench, experts: int, top_k: int, tokens: int) -> Table:
    return table(
        f"routing/{experts}x{top_k}/batch{tokens}", f"batches of {tokens}, {experts} experts, top-{top_k}",
        "ns per token", contest_anew(partial(_loops, bench, experts, top_k, tokens), bench.scale.rounds),
    )  # fmt: skip


@contextlib.contextmanager
def _ruled_loops(bench: Bench, experts: int, top_k: int) -> Iterator[list[Contestant]]:
    """One runtime for each entry of `RULED`, half of its experts resident."""
    rows = [logits(RULED_BATCH, experts, seed) for seed in range(-(-2 * ROWS // RULED_BATCH))]
    ids, weights = np.zeros((RULED_BATCH, top_k), np.int32), np.zeros((RULED_BATCH, top_k), np.float32)
    with contextlib.ExitStack() as stack:
        contestants = []
        for name, make in RULED.items():
            runtime = stack.enter_context(
                routing_runtime(experts, top_k, resident=range(0, experts, 2), router=make(experts, top_k))
            )
            way = Way(runtime.router(0).route_into, ids, weights)
            contestants.append(
                Contestant(name, Loop(way.loop(rows), bench.scale.loop_seconds, len(rows) * RULED_BATCH))
            )
        yield contestants


def _rules(bench: Bench, experts: int, top_k: int) -> Table:
    return table(
        f"routing/{experts}x{top_k}/rules", f"rules and scorings: batches of {RULED_BATCH}, {experts} experts, "
        f"top-{top_k}", "ns per token", contest_anew(partial(_ruled_loops, bench, experts, top_k), bench.scale.rounds),
        note="half of the experts resident",
    )  # fmt: skip
