"""Policies and budgets over one trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shmroute.pager.eviction.names import POLICIES
from shmroute.replay.accesses import Accesses, accesses_of
from shmroute.replay.belady import belady_hits
from shmroute.replay.serving import hits_of
from shmroute.replay.timing import Machine, waiting
from shmroute.traces.trace import Trace

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
    """

    policy: str
    slots: int
    hit_rate: float
    on_time: float
    bytes_per_token: float
    stall_per_token: float


def replay(
    trace: Trace,
    slots: Sequence[int],
    policies: Sequence[str],
    machine: Machine,
    *,
    workers: int = 1,
    one_by_one: bool = False,
    observe_every: int = 1,
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
    """
    steps = accesses_of(trace, workers)
    published = steps.one_by_one() if one_by_one else steps
    return [
        _outcome(steps, published, budget, policy, machine, observe_every) for budget in slots for policy in policies
    ]


def _outcome(
    steps: Accesses, published: Accesses, slots: int, policy: str, machine: Machine, observe_every: int
) -> Outcome:
    hits = belady_hits(steps, slots) if policy == BELADY else hits_of(published, slots, policy, observe_every)
    on_time, stall = waiting(steps, hits, machine)
    misses = len(hits) - int(hits.sum())
    return Outcome(policy, slots, float(hits.mean()), on_time, misses * machine.expert_bytes / steps.num_tokens, stall)
