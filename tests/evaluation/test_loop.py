"""The closed loop: what must hold whatever the model, and that runs repeat."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from shmroute.config import PagerConfig, RouterConfig, RuntimeConfig
from shmroute.evaluation.comparison import interval, outcome
from shmroute.evaluation.decoder import Decoder
from shmroute.evaluation.loop import Run, Setting, run
from shmroute.shared.metrics import LANE_COUNTERS, LaneCounter

CHECKPOINT = __file__.rsplit("/tests/", 1)[0] + "/examples/tiny-mixtral"


def config_of(budget: str, bonus: float = 0.0, policy: str = "expected-next-use", streams: int = 4) -> Setting:
    config = RuntimeConfig.from_checkpoint(
        CHECKPOINT, budget, router=RouterConfig(cache_bonus=bonus, metrics=False), pager=PagerConfig(eviction=policy),
        max_workers=streams,
    )  # fmt: skip
    return Setting(config, (1.0,) * 6)


def played(decoder: Decoder, windows: npt.NDArray[np.int64], config: Setting) -> Run:
    return run(decoder, windows, config, lambda share: None)


def test_a_run_repeats_to_the_last_bit(decoder: Decoder, windows: npt.NDArray[np.int64]) -> None:
    one, other = (played(decoder, windows, config_of("50%", 0.5)) for _ in range(2))
    assert (one.losses == other.losses).all()
    assert (one.counts == other.counts).all()


def test_without_a_bonus_the_budget_and_the_policy_change_hits_and_no_loss(
    decoder: Decoder, windows: npt.NDArray[np.int64]
) -> None:
    runs = [
        played(decoder, windows, config_of(budget, 0.0, policy))
        for budget, policy in (("25%", "lru"), ("50%", "lru"), ("50%", "expected-next-use"), ("100%", "lru"))
    ]
    assert all((other.losses == runs[0].losses).all() for other in runs)
    assert len({other.hit_rate for other in runs}) == 4
    assert runs[0].hit_rate < runs[1].hit_rate < runs[3].hit_rate
    assert (runs[3].counts.sum(1)[:, LaneCounter.LOADS] <= 48).all()


def test_with_all_experts_resident_a_bonus_changes_hardly_a_choice(
    decoder: Decoder, windows: npt.NDArray[np.int64]
) -> None:
    found = played(decoder, windows, config_of("100%", 1e-9))
    plain = played(decoder, windows, config_of("100%"))
    assert found.total(LaneCounter.CHANGED) == 0
    assert (found.losses == plain.losses).all()


def test_a_stronger_bonus_hits_more_and_a_very_strong_one_costs(
    decoder: Decoder, windows: npt.NDArray[np.int64]
) -> None:
    runs = [played(decoder, windows, config_of("50%", bonus)) for bonus in (0.0, 0.5, 20.0)]
    assert runs[0].hit_rate < runs[1].hit_rate < runs[2].hit_rate
    assert runs[2].losses.mean() > runs[0].losses.mean() + 0.1


def test_progress_ends_at_one(decoder: Decoder, windows: npt.NDArray[np.int64]) -> None:
    shares: list[float] = []
    run(decoder, windows[:1, :1], config_of("50%", streams=1), shares.append)
    assert shares == sorted(shares)
    assert len(shares) == windows.shape[2] - 1
    assert shares[-1] == 1


def test_an_interval_holds_the_mean_of_most_samples_and_repeats() -> None:
    rng = np.random.default_rng(3)
    samples = rng.normal(2.0, 1.0, (200, 60))
    intervals = [interval(sample) for sample in samples]
    assert 0.88 < np.mean([low < 2.0 < high for low, high in intervals]) < 0.99
    assert interval(samples[0]) == intervals[0]


def test_an_outcome_counts_against_the_run_without_a_bonus() -> None:
    counts = np.zeros((2, 1, LANE_COUNTERS), np.int64)
    counts[..., LaneCounter.TOKENS], counts[..., LaneCounter.HITS], counts[..., LaneCounter.MISSES] = 60, 90, 30
    plain = Run(np.array([[1.0], [3.0]]), counts)
    better = counts.copy()
    better[..., LaneCounter.HITS], better[..., LaneCounter.MISSES] = 108, 12
    better[..., LaneCounter.CHANGED], better[..., LaneCounter.LOADS] = 6, 10
    found = outcome(config_of("50%", 0.5), Run(plain.losses + np.log(1.02), better), plain)
    assert (found.hit_rate, found.misses_left, found.changed, found.loads_per_token) == (0.9, 0.4, 0.05, 1.0)
    assert found.perplexity == pytest.approx(np.exp(2) * 1.02)
    assert (found.perplexity_change, found.low, found.high) == pytest.approx((0.02, 0.02, 0.02))
    counts[..., LaneCounter.MISSES] = 0
    assert outcome(config_of("50%"), plain, plain).misses_left is None
