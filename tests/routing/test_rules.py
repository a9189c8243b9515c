"""Every routing rule against its definition, with every scoring: choices, weights, and what is counted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from runtimes import Residency, small_config, unique_name

from routing.reference import Reference, apart
from shmroute import config as names
from shmroute.config import RouterConfig
from shmroute.errors import ConfigError, NonFiniteLogitsError
from shmroute.lifecycle import create
from shmroute.routing import codes
from shmroute.routing import plan_words as p
from shmroute.routing.router import MemoryAwareRouter
from shmroute.routing.vectors import put_word, word_at
from shmroute.runtime import Runtime
from shmroute.shared.atomic import COMPILED
from shmroute.shared.layout import BONUS_SPREAD, LINE
from shmroute.shared.words import SPREAD_COUNT_MAX, pack_spread, spread_count, spread_mean

Logits = npt.NDArray[np.float32]
EXAMPLES = 80 if COMPILED else 4


@contextlib.contextmanager
def routed(
    config: RouterConfig,
    num_experts: int,
    top_k: int,
    resident: set[int],
    bias: Logits | None = None,
    device: set[int] | None = None,
) -> Iterator[tuple[Runtime, MemoryAwareRouter]]:
    """A runtime with some experts resident, perhaps some in a GPU, and its router."""
    given_config = small_config(num_experts=num_experts, top_k=top_k, slots=num_experts, router=config)
    with create(unique_name(), given_config, progress=None) as runtime:
        Residency(runtime).load(0, *resident)
        router = runtime.router(0)
        if bias is not None:
            router.correction_bias = bias
        if device is not None:
            router.set_device_residency(bitmap_of(device, num_experts))
        yield runtime, router


def bitmap_of(experts: set[int], num_experts: int) -> npt.NDArray[np.int64]:
    """int64 [⌈E/64⌉] with the bits of some experts."""
    bits = np.isin(np.arange(-(-num_experts // 64) * 64), list(experts))
    return np.packbits(bits, bitorder="little").view(np.int64)


def spread_word(runtime: Runtime, value: int | None = None) -> int:
    """The layer's spread word; set first if a value is given."""
    segment = runtime._attachment.segment
    offset = segment.layout.bonus + 0 * LINE + BONUS_SPREAD
    if value is not None:
        segment.write(offset, value)
    return segment.read(offset)


def rows_with_gaps(source: np.random.Generator, tokens: int, num_experts: int, kind: str) -> Logits:
    """Logits that are equal or at least 1/8 apart; some are not finite if the kind says so."""
    rows = source.integers(-32, 33, (tokens, num_experts)).astype(np.float32) / 8
    if kind == "ties":
        rows = np.round(rows / 2).astype(np.float32)
    if kind == "gaps":
        rows[source.random(rows.shape) < 0.2] = source.choice([np.nan, np.inf, -np.inf])
    return rows


@st.composite
def cases(draw: st.DrawFn, scoring: str) -> dict[str, Any]:
    """Sizes, settings, logits and residency."""
    size, groups = draw(st.sampled_from([(3, 1), (9, 1), (16, 1), (20, 1), (70, 1), (4, 2), (5, 4), (9, 8), (33, 4)]))
    num_experts = size * groups
    topk_group = draw(st.integers(1, groups))
    top_k = draw(st.integers(1, min(topk_group * size, 20)))
    rule = draw(st.sampled_from(names.RULES))
    guarded = rule in ("cache-prior", "max-rank", "cumulative-threshold")
    score = draw(st.sampled_from(names.GROUP_SCORES)) if size > 1 else "max"
    config = RouterConfig(
        rule=rule, scoring=scoring, n_group=groups, topk_group=topk_group, group_score=score,
        cache_bonus=draw(st.sampled_from([0.0, 0.125, 0.25, 0.5, 0.75, 1.0, 3.0])),
        top_j=draw(st.integers(0, top_k)) if guarded else 0,
        host_share=draw(st.sampled_from([0.0, 0.25, 0.5, 1.0])),
        max_rank=draw(st.integers(top_k, num_experts)) if rule == "max-rank" else 0,
        renormalize=draw(st.booleans()), routed_scaling_factor=draw(st.sampled_from([1.0, 2.5])),
    )  # fmt: skip
    source = np.random.default_rng(draw(st.integers(0, 2**32)))
    bias = np.zeros(num_experts, np.float32)
    if scoring == "sigmoid":
        bias = (source.integers(-8, 9, num_experts) / 64).astype(np.float32)
    return {
        "config": config,
        "top_k": top_k,
        "bias": bias,
        "rows": rows_with_gaps(source, 6, num_experts, draw(st.sampled_from(["plain", "ties", "gaps"]))),
        "resident": set(np.flatnonzero(source.random(num_experts) < draw(st.sampled_from([0.2, 0.5, 0.9]))).tolist()),
        "spread": draw(st.sampled_from([0.0, 0.5, 3.25])),
        "device": draw(st.none() | st.sets(st.integers(0, num_experts - 1))),
    }


def decidable(reference: Reference, row: Logits) -> bool:
    """Whether enough experts can be chosen, and no two scores are so close that float32 might tell them otherwise."""
    scores = reference.choosing_scores(row)
    if (scores > -np.inf).sum() < reference.top_k:
        return False
    # Experts of the same logit and bias have the same score however it is rounded; others, if only in real numbers.
    finite = np.flatnonzero(scores > -np.inf)
    differing = finite[np.unique(np.stack([row, reference.bias])[:, finite], axis=1, return_index=True)[1]]
    if reference.config.scoring == "sigmoid" and not apart(scores[differing], 1e-5):
        return False
    strength, share = reference.config.cache_bonus, reference.config.host_share
    if reference.config.scoring == "sigmoid" or reference.config.rule == "probability":
        base = reference.probabilities(row) if reference.config.rule == "probability" else scores
        amount = strength * (reference.spread if reference.config.rule == "cache-prior" else 1.0)
        raised = np.concatenate([base[differing] + extra for extra in {0.0, amount, amount * share}])
        if not apart(raised[np.abs(raised) >= 1e-7], 2e-6):
            return False
    if reference.config.group_score == "top2-sum" and reference.config.scoring == "sigmoid":
        sigmoids = np.where(np.isfinite(row), 1 / (1 + np.exp(-row.astype(np.float64))) + reference.bias, -np.inf)
        two = np.sort(sigmoids.reshape(reference.config.n_group, -1), axis=1)[:, -2:].sum(axis=1)
        if not apart(two, 1e-5):
            return False
    if reference.config.rule == "cumulative-threshold":
        order = np.lexsort((np.arange(len(row)), -scores))
        reached = np.cumsum(reference.probabilities(row)[order])
        if (np.abs(reached - strength) < 1e-5).any() or (np.abs(reached - strength * share) < 1e-5).any():
            return False
    return True


@pytest.mark.parametrize("scoring", names.SCORINGS)
@settings(max_examples=EXAMPLES)
@given(data=st.data())
def test_every_rule_chooses_weighs_and_counts_by_its_definition(scoring: str, data: st.DataObject) -> None:
    case = data.draw(cases(scoring))
    config, top_k, resident, device = case["config"], case["top_k"], case["resident"], case["device"]
    reference = Reference(config, top_k, case["bias"], case["spread"])
    rows = np.array([row for row in case["rows"] if decidable(reference, row)], np.float32)
    assume(len(rows))
    bias = case["bias"] if scoring == "sigmoid" else None
    with routed(config, rows.shape[1], top_k, resident, bias, device) as (runtime, router):
        spread_word(runtime, pack_spread(4, case["spread"]))
        decision = router.route(rows)
        metrics = runtime.metrics().total
        counters = metrics.counters
    expected = [reference.choice(row, resident, device) for row in rows]
    assert decision.experts.tolist() == expected
    for row, chosen, weights in zip(rows, expected, decision.weights, strict=True):
        assert weights == pytest.approx(reference.weights(row, chosen), rel=2e-6, abs=1e-9)
    own, pairs = [reference.own(row) for row in rows], [expert for row in expected for expert in row]
    assert counters["device_hits"] == sum(expert in (device or set()) for expert in pairs)
    assert counters["hits"] == decision.hits == sum(expert in resident | (device or set()) for expert in pairs)
    assert counters["changed"] == sum(len(set(c) - set(o)) for c, o in zip(expected, own, strict=True))
    assert counters["nonfinite"] == int((~np.isfinite(rows)).sum())
    lost = sum(reference.lost(row, chosen) for row, chosen in zip(rows, expected, strict=True))
    assert metrics.lost_mass == metrics.as_dict()["lost_mass"] == pytest.approx(lost, abs=1e-5)


@pytest.mark.parametrize("scoring", names.SCORINGS)
@pytest.mark.parametrize("rule", names.RULES)
def test_at_strength_zero_every_rule_is_the_model_s_own_routing(rule: str, scoring: str) -> None:
    rows = np.random.default_rng(0).normal(size=(40 if COMPILED else 3, 64)).astype(np.float32)
    results = []
    for config in (
        RouterConfig(rule=rule, scoring=scoring, cache_bonus=0.0, max_rank=20 if rule == "max-rank" else 0),
        RouterConfig(scoring=scoring, memory_aware=False),
    ):
        with routed(config, 64, 8, set(range(0, 64, 2))) as (runtime, router):
            decision = router.route(rows)
            assert runtime.metrics().total.counters["changed"] == 0
            assert runtime.metrics().total.counters["lost_mass"] == 0
        results.append((decision.experts.tolist(), decision.weights.tolist()))
    assert results[0] == results[1]


@pytest.mark.parametrize("rule", names.RULES)
def test_the_strength_of_any_rule_can_be_changed_at_any_time(rule: str) -> None:
    row = np.linspace(1, 0, 16, dtype=np.float32)
    config = RouterConfig(rule=rule, cache_bonus=0.0, max_rank=16 if rule == "max-rank" else 0)
    with routed(config, 16, 2, {12, 15}) as (runtime, router):
        spread_word(runtime, pack_spread(1, 1.0))
        assert router.route(row).experts.tolist() == [0, 1]
        router.cache_bonus = 1.5
        assert router.route(row).experts.tolist() == [12, 15]
        assert runtime.metrics().total.counters["changed"] == 2
        router.cache_bonus = 0.0
        assert router.route(row).experts.tolist() == [0, 1]


@pytest.mark.parametrize("rule", ["cache-prior", "max-rank", "cumulative-threshold"])
@pytest.mark.parametrize("top_j", [1, 2, 3])
def test_the_best_j_are_chosen_in_any_case(rule: str, top_j: int) -> None:
    row = np.linspace(1, 0, 16, dtype=np.float32)
    config = RouterConfig(rule=rule, cache_bonus=1.0, top_j=top_j, max_rank=16 if rule == "max-rank" else 0)
    with routed(config, 16, 3, {10, 11, 12, 13}) as (runtime, router):
        spread_word(runtime, pack_spread(1, 1.0))
        chosen = router.route(row).experts.tolist()
    assert chosen == [*range(top_j), *range(10, 13 - top_j)]


def test_an_expert_outside_the_admitted_groups_is_not_chosen_however_strong_the_rule() -> None:
    row = np.array([5, 1, 0, 0, 4, 4, 0, 0], np.float32)
    config = RouterConfig(n_group=4, topk_group=2, cache_bonus=100.0)
    with routed(config, 8, 2, {1, 2, 3, 6, 7}) as (_, router):
        assert router.route(row).experts.tolist() == [1, 0]


def test_too_few_experts_in_the_admitted_groups_refuse_the_batch() -> None:
    row = np.full(8, np.nan, np.float32)
    row[:3] = 1, 2, 0
    with routed(RouterConfig(n_group=4, topk_group=1), 8, 2, set()) as (runtime, router):
        assert router.route(row).experts.tolist() == [1, 0]
        row[0] = np.nan
        with pytest.raises(NonFiniteLogitsError, match="has 1 finite values"):
            router.route(row)
        assert runtime.metrics().total.counters["tokens"] == 1


# ------------------------------------------------------------------ the spread


def test_the_spread_is_the_mean_of_all_tokens_and_one_for_all_of_a_call() -> None:
    rows = np.random.default_rng(3).normal(size=(50 if COMPILED else 5, 20)).astype(np.float32)
    rows[1, 3] = np.nan
    spreads = np.nanmax(rows, axis=1) - np.nanmin(rows, axis=1)
    with routed(RouterConfig(rule="cache-prior", cache_bonus=0.5), 20, 4, set(range(10))) as (runtime, router):
        assert router.route(rows).experts.tolist() == [np.argsort(-row, kind="stable")[:4].tolist() for row in rows]
        assert router._second.words[p.SPREAD_USED] == 0
        word = spread_word(runtime)
        assert spread_count(word) == len(rows)
        assert spread_mean(word) == pytest.approx(spreads.mean(), abs=1e-5)
        router.route(rows[0])
        assert router._second.words[p.SPREAD_USED] == word
        assert spread_mean(spread_word(runtime)) == pytest.approx(
            (spreads.sum() + spreads[0]) / (len(rows) + 1), abs=1e-5
        )


def test_a_refused_batch_leaves_no_spread() -> None:
    rows = np.zeros((2, 8), np.float32)
    rows[1] = np.nan
    with routed(RouterConfig(rule="cache-prior"), 8, 2, {1}) as (runtime, router):
        with pytest.raises(NonFiniteLogitsError):
            router.route(rows)
        assert spread_word(runtime) == 0
        router.route(np.array([3, 1, 1, 1, 1, 1, 1, 0], np.float32))
        assert spread_mean(spread_word(runtime)) == 3.0


def test_the_spread_forgets_at_a_constant_rate_and_has_a_largest_value() -> None:
    row = np.zeros(8, np.float32)
    with routed(RouterConfig(rule="cache-prior"), 8, 2, {1}) as (runtime, router):
        spread_word(runtime, pack_spread(SPREAD_COUNT_MAX, 4.0))
        router.route(row)
        assert spread_count(spread_word(runtime)) == SPREAD_COUNT_MAX
        assert spread_mean(spread_word(runtime)) == pytest.approx(4 - 4 / SPREAD_COUNT_MAX, abs=2e-6)
        spread_word(runtime, 0)
        row[0] = 3e38
        router.route(row)
        assert spread_mean(spread_word(runtime)) == 2.0**20


def test_a_call_says_by_what_strength_it_chose(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime()
    router = runtime.router(0)
    router.route(np.zeros(8, np.float32))
    assert router._second.words[p.STRENGTH] == 0  # nothing is resident
    Residency(runtime).load(0, 3)
    router.route(np.zeros(8, np.float32))
    assert router._second.words[p.STRENGTH] / 2**32 == pytest.approx(0.15)


# ------------------------------------------------------------------ settings and the correction bias


def test_the_kernels_know_the_names() -> None:
    assert [names.SCORINGS.index(name) for name in ("softmax", "sigmoid")] == [codes.SOFTMAX, codes.SIGMOID]
    assert [names.GROUP_SCORES.index(name) for name in ("max", "top2-sum")] == [codes.GROUP_MAX, codes.GROUP_TOP2_SUM]
    assert [
        names.RULES.index(name)
        for name in ("absolute", "cache-prior", "max-rank", "cumulative-threshold", "probability")
    ] == [codes.ABSOLUTE, codes.CACHE_PRIOR, codes.MAX_RANK, codes.CUMULATIVE_THRESHOLD, codes.PROBABILITY]


@pytest.mark.parametrize(
    ("settings_", "complaint"),
    [
        (
            {"rule": "relative"},
            "rule must be one of absolute, cache-prior, max-rank, cumulative-threshold, probability",
        ),
        ({"rule": 1}, "rule must be one of"),
        ({"scoring": "tanh"}, "scoring must be one of softmax, sigmoid, not 'tanh'"),
        ({"group_score": "sum"}, "group_score must be one of max, top2-sum, not 'sum'"),
        ({"top_j": 1}, "top_j is 1, but the rule 'absolute' keeps none"),
        ({"rule": "probability", "top_j": 1}, "top_j is 1, but the rule 'probability' keeps none"),
        ({"rule": "max-rank"}, "max_rank is 0 and the rule 'max-rank'"),
        ({"max_rank": 4}, "max_rank is 4 and the rule 'absolute'"),
        ({"n_group": 4, "topk_group": 5}, "topk_group must be an integer from 1 to n_group = 4, not 5"),
        ({"n_group": 0}, "n_group must be an integer"),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor must be"),
        ({"top_j": True}, "top_j must be an integer"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings_: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        RouterConfig(**settings_)


@pytest.mark.parametrize(
    ("settings_", "complaint"),
    [
        ({"rule": "cache-prior", "top_j": 3}, "top_j is 3, but only top_k = 2 experts are chosen"),
        ({"rule": "max-rank", "max_rank": 1}, "max_rank must be an integer from top_k = 2 to num_experts = 8, not 1"),
        ({"rule": "max-rank", "max_rank": 9}, "max_rank must be an integer from top_k = 2 to num_experts = 8, not 9"),
        ({"n_group": 3, "topk_group": 1}, "n_group is 3, which does not divide num_experts = 8"),
        ({"n_group": 8, "topk_group": 1}, "top_k is 2, but topk_group = 1 groups of 1 experts hold only 1"),
        (
            {"n_group": 8, "topk_group": 2, "group_score": "top2-sum"},
            "group_score is 'top2-sum', but n_group = 8 leaves one expert in a group",
        ),
    ],
)
def test_settings_that_do_not_fit_the_layer_are_refused(settings_: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        small_config(router=RouterConfig(**settings_))


def test_a_correction_bias_is_for_choosing_only() -> None:
    row = np.array([2, 1, 0, -1, -1, -1, -1, -1], np.float32)
    with routed(RouterConfig(scoring="sigmoid"), 8, 2, set()) as (_, router):
        assert router.route(row).experts.tolist() == [0, 1]
        bias = np.zeros(8, np.float32)
        bias[[3, 1]] = 1.0, -1.0
        router.correction_bias = bias
        bias[:] = 9
        decision = router.route(row)
        assert decision.experts.tolist() == [3, 0]
        sigmoids = 1 / (1 + np.exp(-row[[3, 0]].astype(np.float64)))
        assert decision.weights == pytest.approx(sigmoids / sigmoids.sum(), rel=1e-6)
        assert router.correction_bias.tolist() == [0, -1, 0, 1, 0, 0, 0, 0]
        experts, weights = np.zeros(2, np.int32), np.zeros(2, np.float32)
        router.route_into(row, experts, weights)
        assert experts.tolist() == [3, 0]


@pytest.mark.parametrize(
    ("bias", "complaint"),
    [
        (np.zeros(7, np.float32), r"correction_bias must be float32 \[8\], not float32 \[7\]"),
        (np.zeros(8), r"correction_bias must be float32 \[8\], not float64 \[8\]"),
        ([0.0] * 8, r"correction_bias must be float32 \[8\], not a list"),
        (np.full(8, np.nan, np.float32), "correction_bias must be finite"),
    ],
)
def test_a_correction_bias_of_another_kind_is_refused(bias: Any, complaint: str) -> None:
    with routed(RouterConfig(scoring="sigmoid"), 8, 2, set()) as (_, router):
        with pytest.raises(ValueError, match=complaint):
            router.correction_bias = bias
        assert not router.correction_bias.any()


def test_without_sigmoid_scoring_there_is_no_correction_bias(make_runtime: Callable[..., Runtime]) -> None:
    with pytest.raises(ValueError, match="belongs to scoring='sigmoid', not 'softmax'"):
        make_runtime().router(0).correction_bias = np.zeros(8, np.float32)


@pytest.mark.parametrize("word", [0, 1, -1, -2, (1 << 63) - 1, -(1 << 63)])
def test_a_bitmaps_last_bit_is_set_and_cleared_like_any(word: int) -> None:
    kept = np.array([word], np.int64)
    put_word(kept.ctypes.data, word_at(kept.ctypes.data) | (1 << 63))
    assert kept[0] == (word | -(1 << 63))
    put_word(kept.ctypes.data, word_at(kept.ctypes.data) & ~(1 << 63))
    assert kept[0] == (word & (1 << 63) - 1)
