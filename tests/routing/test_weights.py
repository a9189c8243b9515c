"""Weights are the softmax of the unmodified logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from runtimes import Residency

from shmroute.config import RouterConfig
from shmroute.runtime import Runtime


def softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Plain, of the finite logits, in float64."""
    wide = np.where(np.isfinite(logits), logits, -np.inf).astype(np.float64)
    shares = np.exp(wide - wide.max(axis=-1, keepdims=True))
    return shares / shares.sum(axis=-1, keepdims=True)


def expected(logits: npt.NDArray[np.float32], experts: npt.NDArray[np.int32], renormalize: bool) -> npt.NDArray[Any]:
    """The chosen experts' shares, scaled to sum to 1 or not."""
    if renormalize:
        return softmax(np.take_along_axis(logits, experts, axis=-1))
    return np.take_along_axis(softmax(logits), experts, axis=-1)


@pytest.mark.parametrize("k", [1, 2, 3, 16, 17, 40])
@pytest.mark.parametrize("renormalize", [True, False])
def test_any_number_of_experts_shares_as_a_softmax_does(
    make_runtime: Callable[..., Runtime], renormalize: bool, k: int
) -> None:
    router = make_runtime(num_experts=70, top_k=k, router=RouterConfig(renormalize=renormalize)).router(0)
    logits = (np.random.default_rng(k).normal(size=(50, 70)) * 3).astype(np.float32)
    logits[:25, 7::9] = np.nan
    decision = router.route(logits)
    assert decision.weights == pytest.approx(expected(logits, decision.experts, renormalize), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("scale", [0.0, 1.0, 50.0, 1e4, 3e37])
def test_weights_are_a_plain_softmax(make_runtime: Callable[..., Runtime], renormalize: bool, scale: float) -> None:
    runtime = make_runtime(top_k=3, router=RouterConfig(renormalize=renormalize, cache_bonus=2.0))
    Residency(runtime).load(0, 2, 5)
    logits = (np.random.default_rng(5).normal(size=(40, 8)) * scale).astype(np.float32)
    decision = runtime.router(0).route(logits)
    assert decision.weights == pytest.approx(expected(logits, decision.experts, renormalize), rel=1e-6, abs=1e-7)
    if renormalize:
        assert decision.weights.sum(axis=1) == pytest.approx(1)


@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize("extreme", [1e4, -1e4, 3e38, -3e38])
def test_extreme_logits_do_not_overflow(
    make_runtime: Callable[..., Runtime], renormalize: bool, extreme: float
) -> None:
    router = make_runtime(router=RouterConfig(renormalize=renormalize)).router(0)
    one = np.zeros(8, np.float32)
    one[3] = extreme
    both = np.full(8, extreme, np.float32)
    opposite = np.array([extreme, -extreme] * 4, np.float32)
    for logits in (one, both, opposite):
        decision = router.route(logits)
        assert np.isfinite(decision.weights).all()
        assert decision.weights == pytest.approx(expected(logits, decision.experts, renormalize), abs=1e-7)


@pytest.mark.parametrize("renormalize", [True, False])
def test_logits_that_are_not_finite_have_no_share(make_runtime: Callable[..., Runtime], renormalize: bool) -> None:
    router = make_runtime(router=RouterConfig(renormalize=renormalize)).router(0)
    logits = np.array([np.nan, np.inf, -np.inf, 1.0, 2.0, 0.5, np.nan, 1.5], np.float32)
    decision = router.route(logits)
    assert decision.experts.tolist() == [4, 7]
    assert decision.weights == pytest.approx(expected(logits, decision.experts, renormalize), abs=1e-7)
