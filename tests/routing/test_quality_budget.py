"""The quality budget: from any bonus to the cap within 2,000 tokens, and there it stays, whoever routes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from runtimes import Residency

from shmroute.config import RouterConfig
from shmroute.demo.recording import Recording
from shmroute.errors import ConfigError
from shmroute.routing import MemoryAwareRouter
from shmroute.routing.plan import Plan, Turns
from shmroute.routing.quality_budget import MOST, START, period_of
from shmroute.routing.route import route_rows
from shmroute.runtime import Runtime
from shmroute.shared.layout import BONUS_CONTROL, LINE
from shmroute.shared.words import control_adjustments

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny-mixtral"
MAKE = Callable[..., Runtime]
Logits = npt.NDArray[np.float32]


def synthetic(experts: int, tokens: int, seed: int) -> Logits:
    """Independent tokens of one distribution, in which some experts are liked better than others."""
    liking = np.random.default_rng(7).normal(0, 0.5, experts)
    return (np.random.default_rng(seed).normal(0, 1.5, (tokens, experts)) + liking).astype(np.float32)


def recorded(layer: int) -> Logits:
    """A real model's gate logits, [2816, 8]."""
    with np.load(TINY / "activations.npz") as file:
        gate = file["gate"][layer]
    return np.ascontiguousarray(Recording.load(TINY).hidden[:, layer] @ gate.T)


def cost(
    logits: Logits, resident: npt.NDArray[np.bool_], k: int, bonus: float, measure: str
) -> npt.NDArray[np.float64]:
    """What each token loses by a bonus: the definition, without the router."""
    best = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    chosen = np.argsort(-(logits.astype(np.float64) + bonus * resident), axis=1, kind="stable")[:, :k]
    if measure == "changed":
        return 1 - (chosen[:, :, None] == best[:, None, :]).any(2).sum(1) / k
    share = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    share /= share.sum(1, keepdims=True)
    return np.take_along_axis(share, best, 1).sum(1) - np.take_along_axis(share, chosen, 1).sum(1)


@functools.cache
def cost_curve(experts: int, k: int, measure: str) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Bonuses, and what each costs a token of `synthetic` on average where every other expert is resident."""
    tokens, resident = synthetic(experts, 50_000, seed=12345), np.arange(experts) % 2 == 0
    bonuses = np.geomspace(1e-3, 20, 40)
    return bonuses, np.array([cost(tokens, resident, k, bonus, measure).mean() for bonus in bonuses])


class Stream:
    """Routes tokens over a fixed residency, every other expert, one token after the other.

    Parameters
    ----------
    scale : float
        Of the logits.
    workers : int
        That take turns.
    """

    def __init__(
        self, make: MAKE, experts: int, k: int, cap: float, measure: str, start: float,
        *, scale: float = 1.0, workers: int = 1,
    ) -> None:  # fmt: skip
        router = RouterConfig(cache_bonus=start, quality_budget=cap, budget_measure=measure)
        self.runtime = make(num_experts=experts, top_k=k, slots=experts // 2, router=router, max_workers=8)
        self.residency = Residency(self.runtime)
        self.residency.load(0, *range(0, experts, 2))
        self.experts, self.k, self.cap, self.measure, self.scale = experts, k, cap, measure, scale
        attachment = self.runtime._attachment
        self._plans = [
            Plan(attachment.segment, 0, lane, attachment.powers.ctypes.data, Turns(1)) for lane in range(1, workers + 1)
        ]

    @property
    def router(self) -> MemoryAwareRouter:
        return self.runtime.router(0)

    def word(self, offset: int) -> int:
        segment = self.runtime._attachment.segment
        return segment.read(segment.layout.bonus + offset)

    def ratio(self) -> float:
        """What the present bonus costs on average, in caps; of logits that are scaled, so is the bonus."""
        bonuses, costs = cost_curve(self.experts, self.k, self.measure)
        return float(np.interp(np.log(self.router.cache_bonus / self.scale), np.log(bonuses), costs)) / self.cap

    def route(self, logits: Logits, batch: int = 1) -> None:
        for number, first in enumerate(range(0, len(logits), batch)):
            rows = logits[first : first + batch] * np.float32(self.scale)
            experts, weights = np.empty((len(rows), self.k), np.int32), np.empty((len(rows), self.k), np.float32)
            assert route_rows(self._plans[number % len(self._plans)].address, rows, experts, weights) >= 0


CASES = [(8, 2, 0.05, "changed"), (64, 6, 0.02, "changed"), (8, 2, 0.01, "lost-mass"), (64, 6, 0.01, "lost-mass")]
A_CASE = CASES[0]


@pytest.mark.parametrize("start", [0.0, 1e-3, 0.5, 50.0])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_from_any_bonus_it_reaches_the_cap_within_two_thousand_tokens_and_stays(
    make_runtime: MAKE, case: tuple[int, int, float, str], start: float
) -> None:
    stream = Stream(make_runtime, *case, start)
    tokens = synthetic(stream.experts, 24_000, seed=3)
    stream.route(tokens[:2000])
    assert stream.ratio() == pytest.approx(1, abs=0.25)
    stream.route(tokens[2000:8000])
    for first in range(8000, 24_000, 200):
        stream.route(tokens[first : first + 200])
        assert stream.ratio() == pytest.approx(1, abs=0.10)


@pytest.mark.parametrize("workers", [2, 7])
@pytest.mark.parametrize("start", [0.0, 50.0])
def test_several_workers_steer_together(make_runtime: MAKE, workers: int, start: float) -> None:
    stream = Stream(make_runtime, *A_CASE, start, workers=workers)
    tokens = synthetic(stream.experts, 16_000, seed=4)
    stream.route(tokens[:2000])
    assert stream.ratio() == pytest.approx(1, abs=0.3)
    stream.route(tokens[2000:])
    assert stream.ratio() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("scale", [1e-3, 300.0])
def test_the_scale_of_the_logits_does_not_matter(make_runtime: MAKE, scale: float) -> None:
    stream = Stream(make_runtime, *A_CASE, 0.15, scale=scale)
    stream.route(synthetic(stream.experts, 8000, seed=5))
    assert stream.ratio() == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("batch", [3, 500])
def test_batches_count_token_by_token(make_runtime: MAKE, batch: int) -> None:
    stream = Stream(make_runtime, *A_CASE, 0.0)
    stream.route(synthetic(stream.experts, 24_000, seed=6), batch)
    assert stream.ratio() == pytest.approx(1, abs=0.15)


def test_after_the_stream_changes_it_finds_the_cap_again(make_runtime: MAKE) -> None:
    stream = Stream(make_runtime, *A_CASE, 0.15)
    stream.route(synthetic(stream.experts, 12_000, seed=8))
    before = stream.router.cache_bonus
    stream.scale = 20.0
    stream.route(synthetic(stream.experts, 4000, seed=9))
    assert stream.router.cache_bonus == pytest.approx(20 * before, rel=0.4)


def test_what_a_user_sets_is_a_new_start(make_runtime: MAKE) -> None:
    stream = Stream(make_runtime, *A_CASE, 0.15)
    stream.route(synthetic(stream.experts, 8000, seed=10))
    for value in (30.0, 0.0):
        stream.router.cache_bonus = value
        stream.route(synthetic(stream.experts, 4000, seed=11))
        assert stream.ratio() == pytest.approx(1, abs=0.25)


def test_where_everything_hits_the_bonus_does_not_rise(make_runtime: MAKE) -> None:
    stream = Stream(make_runtime, *A_CASE, 0.15)
    hits = np.full((3000, stream.experts), -5, np.float32)
    hits[:, [0, 2]] = 5
    stream.route(hits)
    assert stream.router.cache_bonus == pytest.approx(0.15)
    assert control_adjustments(stream.word(BONUS_CONTROL)) > 10  # it looked, and let it be


def test_where_nothing_can_be_spent_the_bonus_ends_at_its_limit_and_comes_back(make_runtime: MAKE) -> None:
    stream = Stream(make_runtime, *A_CASE, 0.0)
    stream.residency.evict(0, *range(2, stream.experts, 2))
    misses = np.zeros((6000, stream.experts), np.float32)
    misses[:, [0, 1]] = 5  # 1 is missed, and there is no resident expert but 0 to choose instead
    stream.route(misses)
    assert START < stream.router.cache_bonus <= MOST
    stream.residency.load(0, *range(2, stream.experts, 2))
    stream.route(synthetic(stream.experts, 2000, seed=13))
    assert stream.ratio() == pytest.approx(1, abs=0.3)


@pytest.mark.parametrize("resident", [[], list(range(8))], ids=["none resident", "all resident"])
def test_tokens_that_no_bonus_could_change_do_not_count(make_runtime: MAKE, resident: list[int]) -> None:
    config = RouterConfig(cache_bonus=0.25, quality_budget=0.01, budget_measure="changed")
    runtime = make_runtime(num_experts=8, top_k=2, slots=8, router=config)
    Residency(runtime).load(0, *resident)
    runtime.router(0).route(synthetic(8, 3000, seed=14))
    segment = runtime._attachment.segment
    assert segment.read(segment.layout.bonus + BONUS_CONTROL) == 0
    assert runtime.router(0).cache_bonus == 0.25


def test_without_a_budget_no_bonus_moves(make_runtime: MAKE) -> None:
    runtime = make_runtime(num_experts=8, top_k=2, slots=4, router=RouterConfig(cache_bonus=0.25))
    Residency(runtime).load(0, 0, 2, 4, 6)
    runtime.router(0).route(synthetic(8, 3000, seed=15))
    assert runtime.router(0).cache_bonus == 0.25
    segment = runtime._attachment.segment
    line = segment.buffer[segment.layout.bonus : segment.layout.bonus + LINE]
    assert not any(line[8:])


@pytest.mark.parametrize(("cap", "measure"), [(0.05, "changed"), (0.01, "lost-mass")])
@pytest.mark.parametrize("layer", [0, 5])
def test_on_a_real_models_tokens_the_mean_cost_is_the_cap(
    make_runtime: MAKE, layer: int, cap: float, measure: str
) -> None:
    """Half of the experts resident, the least recently used one replaced at each miss.

    Where hardly anything misses any more, less than the cap is spent.
    """
    logits = recorded(layer)
    router = RouterConfig(cache_bonus=0.0, quality_budget=cap, budget_measure=measure)
    runtime = make_runtime(num_experts=8, top_k=2, slots=4, router=router)
    residency, used = Residency(runtime), dict.fromkeys(range(4), -1)
    residency.load(0, *used)
    costs, misses = [], 0
    for token, row in enumerate(logits):
        resident = np.isin(np.arange(8), list(used))
        costs.append(cost(row[None], resident, 2, runtime.router(0).cache_bonus, measure)[0])
        decision = runtime.router(0).route(row)
        chosen = decision.experts.tolist()
        misses += 2 - decision.hits if token >= 800 else 0
        for expert in chosen:
            if expert not in used:
                oldest = min((other for other in used if other not in chosen), key=used.__getitem__)
                del used[oldest]
                residency.evict(0, oldest)
                residency.load(0, expert)
            used[expert] = token
    assert np.mean(costs[800:]) <= 1.15 * cap
    assert np.mean(costs[800:]) >= 0.85 * cap or misses < 0.01 * 2 * len(costs[800:])


def test_a_period_is_longer_the_less_may_change() -> None:
    assert [period_of(cap, "changed", 2) for cap in (0.5, 0.02, 0.0001)] == [32, 100, 1024]
    assert [period_of(cap, "lost-mass", 2) for cap in (0.5, 0.01, 0.0001)] == [32, 64, 640]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quality_budget": 0}, r"quality_budget must be a number in \(0, 0.5\]"),
        ({"quality_budget": 0.6}, r"quality_budget must be a number in \(0, 0.5\]"),
        ({"quality_budget": "1%"}, r"quality_budget must be a number"),
        ({"quality_budget": 0.01, "memory_aware": False}, "needs memory_aware=True"),
        ({"budget_measure": "perplexity"}, "budget_measure must be one of"),
        ({"budget_measure": ["changed"]}, "budget_measure must be one of"),
    ],
)
def test_settings_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RouterConfig(**settings)  # type: ignore[arg-type]
