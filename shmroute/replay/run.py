"""Policies, prefetching and budgets over one trace."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from shmroute.config import PagerConfig
from shmroute.pager.eviction.names import POLICIES
from shmroute.replay.accesses import Accesses, accesses_of
from shmroute.replay.belady import belady_hits
from shmroute.replay.player import play
from shmroute.replay.prefetching import NONE, ORACLE, foreseen, predictors_of
from shmroute.replay.serving import Served, on_demand, serve_accesses
from shmroute.replay.timing import Machine, waiting
from shmroute.shared.metrics import PrefetchOutcome
from shmroute.traces.trace import Trace
from shmroute.validation import require

BELADY = "belady"
ALL = (*POLICIES, BELADY)
PREFETCH_COUNTS = tuple(outcome.name.lower() for outcome in PrefetchOutcome)


@dataclass(frozen=True)
class Outcome:
    """What one policy did with one budget and one way of prefetching.

    Attributes
    ----------
    policy, prefetch : str
    slots : int
    hit_rate : float
        Share of accesses whose expert was resident, or being loaded for another worker.
    on_time : float
        Share of accesses whose expert was there when the worker would compute it.
    bytes_per_token, stall_per_token : float
        Loaded, and seconds waited.
    loads : int
        In all.
    prefetches : dict
        How many prefetches came to which `PrefetchOutcome`, of all predictors, by its name in lower case: ``issued``,
        ``completed``, ``useful``, ``wasted``, ``overtaken``, ``cancelled``.
    prefetch_accuracy : float or None
        Useful ones, of those completed; None without any.
    """

    policy: str
    prefetch: str
    slots: int
    hit_rate: float
    on_time: float
    bytes_per_token: float
    stall_per_token: float
    loads: int
    prefetches: dict[str, int]
    prefetch_accuracy: float | None


def replay(
    trace: Trace,
    slots: Sequence[int],
    policies: Sequence[str],
    machine: Machine,
    *,
    workers: int = 1,
    one_by_one: bool = False,
    observe_every: int = 1,
    prefetch: Sequence[str] = (NONE,),
) -> list[Outcome]:
    """Each policy with each budget and each way of prefetching.

    Parameters
    ----------
    trace : Trace
    slots : sequence of int
        For all layers together.
    policies : sequence of str
        Of `ALL`.
    machine : Machine
    workers : int
        That share the trace's tokens.
    one_by_one : bool
        Each access is published by itself, as in textbooks, and not a token's k choices of a layer at once.
    observe_every : int
        The pager looks at what was published once in so many steps.
    prefetch : sequence of str
        As `predictors_of` takes them. Belady's rule is replayed without any, once for each budget.

    Raises
    ------
    ConfigError
        If one is unknown, or asked for with `one_by_one`: prefetching goes by whole steps.
    """
    for name in prefetch:
        predictors_of(name)
    require(not one_by_one or set(prefetch) <= {NONE}, "prefetching goes by whole steps: leave out --one-by-one")
    steps = accesses_of(trace, workers)
    published = steps.one_by_one() if one_by_one else steps
    outcomes = []
    for budget, policy in itertools.product(slots, policies):
        if policy == BELADY:
            outcomes.append(_on_demand(steps, on_demand(steps, belady_hits(steps, budget)), budget, policy, machine))
            continue
        for name in prefetch:
            if name != NONE:
                outcomes.append(_ahead(steps, budget, policy, machine, name, observe_every))
                continue
            served = serve_accesses(published, budget, policy, observe_every)
            if one_by_one:
                served = on_demand(steps, served.hits)
            outcomes.append(_on_demand(steps, served, budget, policy, machine))
    return outcomes


def _on_demand(steps: Accesses, served: Served, slots: int, policy: str, machine: Machine) -> Outcome:
    on_time, stall = waiting(steps, served, machine)
    loads = len(served.loads)
    return Outcome(
        policy, NONE, slots, float(served.hits.mean()), on_time, loads * machine.expert_bytes / steps.num_tokens, stall,
        loads, dict.fromkeys(PREFETCH_COUNTS, 0), None,
    )  # fmt: skip


def _ahead(steps: Accesses, slots: int, policy: str, machine: Machine, prefetch: str, observe_every: int) -> Outcome:
    # One thread: the model's channel loads one expert at a time.
    pager = PagerConfig(io_threads=1, predictors=predictors_of(prefetch), eviction=policy)
    told = foreseen(steps) if prefetch == ORACLE else None
    played = play(steps, slots, machine, pager, told=told, observe_every=observe_every)
    return Outcome(
        policy, prefetch, slots, played.hit_rate, played.on_time,
        played.loads * machine.expert_bytes / steps.num_tokens, played.stall_per_token, played.loads,
        dict(zip(PREFETCH_COUNTS, played.outcomes.sum(axis=0).tolist(), strict=True)), played.accuracy,
    )  # fmt: skip
