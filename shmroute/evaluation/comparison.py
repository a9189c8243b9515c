"""Settings compared with the unbiased choice, on the same tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shmroute.evaluation.crew import run_all
from shmroute.evaluation.live import LiveRun, run_all_live
from shmroute.evaluation.loop import Run, Setting
from shmroute.evaluation.worker import Task
from shmroute.shared.metrics import LaneCounter

RESAMPLES = 4000
"""Of the bootstrap."""

LEVEL = 0.95
"""Of the intervals."""


@dataclass(frozen=True)
class LiveCosts:
    """What a setting took of time, bandwidth and memory.

    Attributes
    ----------
    tokens_per_second : float
        Of all workers together.
    stall_per_token : float
        Seconds that a worker waited for experts, for each of its tokens in all layers.
    waits_per_token : float
        How often it did.
    bytes_per_token : float
        Read by the pager.
    workers_rss, workers_pss : int
        Summed over the workers, in bytes; the former counts the shared segment once for each.
    pager_rss, pager_pss : int
    segment : int
        Bytes of the shared segment; its pages are in the PSS of those who use them.
    """

    tokens_per_second: float
    stall_per_token: float
    waits_per_token: float
    bytes_per_token: float
    workers_rss: int
    workers_pss: int
    pager_rss: int
    pager_pss: int
    segment: int


@dataclass(frozen=True)
class Outcome:
    """What one setting gained and cost.

    Attributes
    ----------
    setting : Setting
    hit_rate : float
        Share of (token, chosen expert) pairs that were resident when routed.
    misses_left : float or None
        Misses, as a share of those of the unbiased choice with the same slots and policy; None if it had none.
    changed : float
        Share of the choices that the logits alone would not have made.
    loads_per_token : float
    perplexity : float
    perplexity_change : float
        Relative to the unbiased choice on the same tokens: 0.01 is one per cent more.
    low, high : float
        The 95 % interval of that, by bootstrap over pools.
    live : LiveCosts or None
        What real processes took, if such ran it.
    """

    setting: Setting
    hit_rate: float
    misses_left: float | None
    changed: float
    loads_per_token: float
    perplexity: float
    perplexity_change: float
    low: float
    high: float
    live: LiveCosts | None = None


def interval(differences: npt.NDArray[np.float64], seed: int = 0) -> tuple[float, float]:
    """The 95 % interval of a mean by bootstrap: of means of as many differences, drawn with replacement.

    Parameters
    ----------
    differences : ndarray
        float64 [n], independent of each other.
    seed : int
        The same gives the same interval.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(differences), (RESAMPLES, len(differences)))
    low, high = np.quantile(differences[drawn].mean(1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def unbiased(setting: Setting) -> Setting:
    """The same without a bonus."""
    config = setting.config
    router = dataclasses.replace(
        config.router, cache_bonus=0.0, memory_aware=False, rule="absolute", top_j=0, max_rank=0, spared_layers=0
    )
    return Setting(dataclasses.replace(config, router=router), (1.0,) * config.num_layers)


def compare(
    task: Task, settings: Sequence[Setting], jobs: int | None, watch: Callable[[float, int], Any]
) -> list[Outcome]:
    """Run settings, and what each is compared with.

    Parameters
    ----------
    task : Task
    settings : sequence of Setting
        Those with `memory_aware` off are outcomes of their own.
    jobs : int or None
        So many simulated at once; None to run them by real processes, one after the other.
    watch : callable
        Called several times a second with how many runs are done (a fraction of those under way), and of how many.

    Raises
    ------
    EvaluationError
        If a run fails.
    """
    needed = {
        one.to_json(): one for one in (*map(unbiased, settings), *settings)
    }  # by their JSON, since they have no hash
    wanted = list(needed.values())
    found: Sequence[Run]
    if jobs is None:
        found = run_all_live(task, wanted, lambda done: watch(done, len(needed)))
    else:
        found = run_all(task, wanted, jobs, lambda done: watch(done, len(needed)))
    runs = dict(zip(needed, found, strict=True))
    return [outcome(one, runs[one.to_json()], runs[unbiased(one).to_json()]) for one in settings]


def outcome(setting: Setting, run: Run, plain: Run) -> Outcome:
    """What a run says of its settings, beside the run without a bonus."""
    # A pool's streams share what is resident, so a pool is what is drawn again, not a window.
    differences = (run.losses - plain.losses).mean(axis=1)
    low, high = interval(differences)
    misses, plain_misses = run.total(LaneCounter.MISSES), plain.total(LaneCounter.MISSES)
    choices = misses + run.total(LaneCounter.HITS)
    return Outcome(
        setting=setting,
        hit_rate=run.hit_rate,
        misses_left=misses / plain_misses if plain_misses else None,
        changed=run.total(LaneCounter.CHANGED) / choices,
        loads_per_token=run.total(LaneCounter.LOADS) * setting.config.num_layers / run.total(LaneCounter.TOKENS),
        perplexity=math.exp(run.losses.mean()),
        perplexity_change=math.expm1(differences.mean()),
        low=math.expm1(low),
        high=math.expm1(high),
        live=_live_costs(setting, run) if isinstance(run, LiveRun) else None,
    )


def _live_costs(setting: Setting, run: LiveRun) -> LiveCosts:
    tokens = run.total(LaneCounter.TOKENS) / setting.config.num_layers
    return LiveCosts(
        tokens_per_second=tokens / run.seconds,
        stall_per_token=run.total(LaneCounter.WAIT_NS) / 1e9 / tokens,
        waits_per_token=run.total(LaneCounter.WAITS) / tokens,
        bytes_per_token=run.bytes_read / tokens,
        workers_rss=sum(worker.rss for worker in run.workers),
        workers_pss=sum(worker.pss for worker in run.workers),
        pager_rss=run.pager.rss,
        pager_pss=run.pager.pss,
        segment=run.segment,
    )
