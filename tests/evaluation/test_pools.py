"""Pools against a replay of their own choices, and against themselves."""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt
import pytest

from shmroute.config import PagerConfig, RouterConfig, RuntimeConfig
from shmroute.errors import NonFiniteLogitsError
from shmroute.evaluation.loop import steps
from shmroute.evaluation.pools import Pools
from shmroute.replay.accesses import accesses_of
from shmroute.replay.serving import serve_accesses
from shmroute.shared.metrics import LaneCounter
from shmroute.traces import Trace

LAYERS, EXPERTS, STREAMS, TOKENS = 3, 8, 2, 40
FACTORS = (1.0,) * LAYERS


def config_of(slots: int, policy: str = "lru", bonus: float = 0.0) -> RuntimeConfig:
    return RuntimeConfig(
        LAYERS, EXPERTS, 2, 1, slots,
        router=RouterConfig(cache_bonus=bonus, metrics=False), pager=PagerConfig(eviction=policy), max_workers=STREAMS,
    )  # fmt: skip


def made_logits(pools: int, seed: int = 1) -> npt.NDArray[np.float32]:
    """float32 [pools, STREAMS, TOKENS, LAYERS, EXPERTS], each token's a little like the one's before."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((pools, STREAMS, TOKENS, LAYERS, EXPERTS)).astype(np.float32)
    for token in range(1, TOKENS):
        logits[:, :, token] += logits[:, :, token - 1] / 2
    return logits


def play(config: RuntimeConfig, logits: npt.NDArray[np.float32]) -> tuple[Pools, npt.NDArray[np.int32]]:
    """The pools at the end, and the choices, int32 [pools, STREAMS, TOKENS, LAYERS, 2]."""
    pools = Pools(config, FACTORS, len(logits))
    chosen = np.zeros((*logits.shape[:-1], 2), np.int32)
    for token, stream, layer in steps(STREAMS, TOKENS, LAYERS):
        chosen[:, stream, token, layer], _ = pools.step(stream, layer, logits[:, stream, token, layer])
    return pools, chosen


@pytest.mark.parametrize("policy", ["lru", "least-stale"])
def test_without_a_bonus_a_pool_hits_what_a_replay_of_its_choices_hits(policy: str) -> None:
    logits = made_logits(1)
    pools, chosen = play(config_of(12, policy), logits)
    assert (chosen == np.argsort(-logits, axis=-1)[..., :2]).all()
    sequences = np.repeat(np.arange(STREAMS), TOKENS)
    trace = Trace("made", "made", chosen[0].reshape(-1, LAYERS, 2), EXPERTS, seq_id=sequences)
    counts = pools.counts().sum((0, 1))
    accesses = accesses_of(trace, STREAMS)
    served = serve_accesses(accesses, 12, policy)
    assert counts[LaneCounter.HITS] == served.hits.sum()
    assert counts[LaneCounter.HITS] + counts[LaneCounter.MISSES] == chosen.size
    assert counts[LaneCounter.LOADS] == counts[LaneCounter.MISSES]
    assert counts[LaneCounter.EVICTIONS] == counts[LaneCounter.LOADS] - 12


def test_a_bonus_makes_choices_follow_residency_and_is_counted() -> None:
    logits = made_logits(4)
    plain, own = play(config_of(12), logits)
    biased, chosen = play(config_of(12, bonus=1.0), logits)
    changed = ~(chosen[..., :, None] == own[..., None, :]).any(-1)
    assert biased.counts()[..., LaneCounter.CHANGED].sum() == changed.sum() > 0
    assert plain.counts()[..., LaneCounter.CHANGED].sum() == 0
    assert biased.counts()[..., LaneCounter.HITS].sum() > plain.counts()[..., LaneCounter.HITS].sum()


def test_pools_know_nothing_of_each_other() -> None:
    logits = made_logits(3)
    together, chosen = play(config_of(10, bonus=0.5), logits)
    for pool in range(3):
        alone, mine = play(config_of(10, bonus=0.5), logits[pool : pool + 1])
        assert (mine[0] == chosen[pool]).all()
        assert (alone.counts()[0] == together.counts()[pool]).all()


def test_two_slots_are_enough_for_two_experts_a_token_and_all_slots_load_each_expert_once() -> None:
    logits = made_logits(2)
    tight, _ = play(config_of(2), logits)
    assert tight.counts()[..., LaneCounter.HITS].sum() < 2 * STREAMS * TOKENS
    roomy, chosen = play(config_of(LAYERS * EXPERTS), logits)
    used = [sum(len(np.unique(chosen[pool, :, :, layer])) for layer in range(LAYERS)) for pool in range(2)]
    assert roomy.counts()[..., LaneCounter.LOADS].sum(1).tolist() == used
    assert roomy.counts()[..., LaneCounter.EVICTIONS].sum() == 0


def test_logits_that_cannot_be_routed_are_an_error() -> None:
    pools = Pools(config_of(12), FACTORS, 2)
    logits = np.zeros((2, EXPERTS), np.float32)
    logits[1, :7] = np.nan
    with pytest.raises(NonFiniteLogitsError, match="row 1 of the logits has 1 finite"):
        pools.step(0, 0, logits)


def test_steps_keep_each_stream_in_its_own_order_and_all_at_one_pace() -> None:
    order = steps(3, 5, 4)
    assert len(order) == len(set(order)) == 3 * 5 * 4
    for stream in range(3):
        mine = [(position, layer) for position, other, layer in order if other == stream]
        assert mine == sorted(mine)
    at = [0, 0, 0]
    for _, stream, _ in order:
        at[stream] += 1
        assert max(at) - min(at) <= 4
    assert steps(1, 2, 2) == [(0, 0, 0), (0, 0, 1), (1, 0, 0), (1, 0, 1)]


def test_a_router_that_does_not_look_at_memory_chooses_as_without_a_bonus() -> None:
    logits = made_logits(1)
    config = config_of(12, bonus=2.0)
    off = dataclasses.replace(config, router=dataclasses.replace(config.router, memory_aware=False))
    assert (play(off, logits)[1] == play(config_of(12), logits)[1]).all()
    assert (play(config, logits)[1] != play(off, logits)[1]).any()
