"""Policies and budgets over one trace."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from shmroute.pager.eviction.names import POLICIES
from shmroute.replay.accesses import Accesses, accesses_of
from shmroute.replay.belady import belady_hits
from shmroute.replay.prefetching import Prefetcher, nothing
from shmroute.replay.serving import LOAD_AHEAD, Served, on_demand, serve_accesses
from shmroute.replay.timing import Machine, waiting
from shmroute.traces.trace import Trace
from shmroute.validation import require

BELADY = "belady"
ALL = (*POLICIES, BELADY)


@dataclass(frozen=True)
class Outcome:
    """What one policy did with one budget.

    Attributes
    ----------
    policy : str
    slots : int
    hit_rate : float
        Share of accesses whose expert was resident, or being loaded for another worker.
    on_time : float
        Share of accesses whose expert was there when the worker would compute it.
    bytes_per_token, stall_per_token : float
        Loaded, and seconds waited.
    prefetches_per_token : float
        Loads ahead of demand.
    prefetch_accuracy : float or None
        The share of those that was wanted before it went; None without any.
    """

    policy: str
    slots: int
    hit_rate: float
    on_time: float
    bytes_per_token: float
    stall_per_token: float
    prefetches_per_token: float
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
    prefetcher: Prefetcher = nothing,
) -> list[Outcome]:
    """Each policy with each budget.

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
    prefetcher : Prefetcher
        Asks for experts ahead of demand. Belady's rule has none, and one is for whole steps, not with `one_by_one`.

    Raises
    ------
    ConfigError
        If both are asked for.
    """
    require(prefetcher is nothing or not one_by_one, "a prefetcher asks once a step: leave out --one-by-one")
    steps = accesses_of(trace, workers)
    published = steps.one_by_one() if one_by_one else steps
    proposals = prefetcher(published)
    outcomes = []
    for budget, policy in itertools.product(slots, policies):
        if policy == BELADY:
            served = on_demand(steps, belady_hits(steps, budget))
        else:
            served = serve_accesses(published, budget, policy, proposals, observe_every)
            if one_by_one:
                served = on_demand(steps, served.hits)
        outcomes.append(_outcome(steps, served, budget, policy, machine))
    return outcomes


def _outcome(steps: Accesses, served: Served, slots: int, policy: str, machine: Machine) -> Outcome:
    on_time, stall = waiting(steps, served, machine)
    loads, ahead = len(served.loads), int(served.loads[:, LOAD_AHEAD].sum())
    return Outcome(
        policy,
        slots,
        float(served.hits.mean()),
        on_time,
        loads * machine.expert_bytes / steps.num_tokens,
        stall,
        ahead / steps.num_tokens,
        served.useful / ahead if ahead else None,
    )
