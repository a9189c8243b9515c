"""Operations on sixteen numbers: compiled and interpreted they give the same bits."""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numba import types

from shmroute.routing import vectors as v

ANY = arrays(np.float32, 16, elements=st.floats(width=32))
NEGATIVE = arrays(np.float64, 16, elements=st.floats(-800, 0))


def reduced(logits: int, count: int, bits: int, amount: float, k: int, out: int) -> tuple[int, int, float, float]:
    """Everything that chooses, on the first `count` of some logits."""
    values = v.load_logits(logits, count)
    higher = v.raised(v.widened(values), bits, amount)
    v.store_scores(higher, out)
    bound = v.kth_largest(v.larger(values, v.narrowed(higher)), k)
    before = v.count_before(values, v.logit_at(logits), 0) + 100 * v.count_before(higher, v.score_at(out + 56), 7)
    return v.at_least(values, bound), before, bound, v.largest(higher)


def weighed(values: int, peak: float, count: int, out: int, weights: int) -> float:
    """Everything that weighs."""
    shares = v.exp_under(v.load_scores(values), peak)
    sums = v.plus(shares, v.same(0.5))
    v.store_scores(shares, out)
    v.store_weights(v.divided(shares, v.total(sums)), weights, count)
    return v.total(sums)


_RESULT = types.Tuple([types.int64, types.int64, types.float64, types.float64])
compiled_reduced = numba.njit(
    _RESULT(types.int64, types.int64, types.int64, types.float64, types.int64, types.int64), _nrt=False
)(reduced)
compiled_weighed = numba.njit(
    types.float64(types.int64, types.float64, types.int64, types.int64, types.int64), _nrt=False
)(weighed)


@given(ANY, st.integers(1, 40), st.integers(0, 2**16 - 1), st.sampled_from([0.0, 0.15, 1e6]), st.integers(1, 16))
def test_choosing_is_the_same_interpreted(
    logits: npt.NDArray[np.float32], count: int, bits: int, amount: float, k: int
) -> None:
    outs = np.zeros((2, 16))
    results = [
        call(logits.ctypes.data, count, bits, amount, k, out.ctypes.data)
        for call, out in zip((reduced, compiled_reduced), outs, strict=True)
    ]
    assert results[0] == results[1]
    assert outs[0].tobytes() == outs[1].tobytes()


@given(NEGATIVE, st.integers(1, 40))
def test_weighing_is_the_same_interpreted(values: npt.NDArray[np.float64], count: int) -> None:
    outs, weights = np.zeros((2, 16)), np.zeros((2, 16), np.float32)
    sums = [
        call(values.ctypes.data, 0.0, count, out.ctypes.data, weight.ctypes.data)
        for call, out, weight in zip((weighed, compiled_weighed), outs, weights, strict=True)
    ]
    assert sums[0] == sums[1]
    assert outs[0].tobytes() == outs[1].tobytes()
    assert weights[0].tobytes() == weights[1].tobytes()
    assert not weights[0, min(count, 16) :].any()
    assert outs[0] == pytest.approx(np.exp(np.maximum(values, -700)), rel=1e-9, abs=1e-300)


def altered(logits: int, scores: int, bits: int, out: int) -> tuple[int, float, float]:
    """What rules and sigmoid scores are made of."""
    values, wide = v.load_logits(logits, 16), v.load_scores(scores)
    v.store_scores(v.widened(v.logistic(values)), out)
    v.store_scores(v.logistic(wide), out + 128)
    v.store_scores(v.widened(v.plus(v.replaced(values, bits, 0.1), v.raised(values, ~bits, 0.1))), out + 256)
    v.store_scores(v.smaller(wide, v.replaced(wide, bits, -1.5)), out + 384)
    return v.before(values, v.logit_at(logits + 12), 3), v.least(wide), v.largest(v.widened(values))


compiled_altered = numba.njit(types.Tuple([types.int64, types.float64, types.float64])(*[types.int64] * 4), _nrt=False)(
    altered
)


@given(
    arrays(np.float32, 16, elements=st.floats(-(2.0**126), 2.0**126, width=32) | st.sampled_from([np.nan, np.inf])),
    arrays(np.float64, 16, elements=st.floats(-800, 800)),
    st.integers(0, 2**16 - 1),
)
def test_what_rules_are_made_of_is_the_same_interpreted(
    logits: npt.NDArray[np.float32], scores: npt.NDArray[np.float64], bits: int
) -> None:
    outs = np.zeros((2, 4, 16))
    results = [
        call(logits.ctypes.data, scores.ctypes.data, bits, out.ctypes.data)
        for call, out in zip((altered, compiled_altered), outs, strict=True)
    ]
    assert results[0] == results[1]
    assert outs[0].tobytes() == outs[1].tobytes()
    finite = np.isfinite(logits)
    clipped = np.clip(np.where(finite, logits, 0).astype(np.float64), -87, 87)
    assert outs[0, 0][finite] == pytest.approx(1 / (1 + np.exp(-clipped[finite])), rel=4e-7, abs=1e-37)
    assert (outs[0, 0][~finite] == -np.inf).all()
    assert outs[0, 1] == pytest.approx(1 / (1 + np.exp(-np.clip(scores, -700, 700))), rel=1e-9, abs=1e-300)


def gathered(logits: int, num_experts: int, ids: int, count: int, out: int) -> None:
    """The logits of some experts."""
    v.store_scores(v.logits_of(logits, num_experts, ids, count), out)


compiled_gathered = numba.njit(types.void(*[types.int64] * 5), _nrt=False)(gathered)


@given(
    arrays(np.float32, 20, elements=st.floats(width=32, allow_nan=False)),
    arrays(np.int32, 16, elements=st.integers(0, 19) | st.sampled_from([-1, 20, 2**31 - 1, -(2**31)])),
    st.integers(1, 40),
)
def test_only_possible_experts_logits_are_read(
    logits: npt.NDArray[np.float32], ids: npt.NDArray[np.int32], count: int
) -> None:
    expected = [
        float(logits[expert]) if rank < count and 0 <= expert < 20 else -np.inf for rank, expert in enumerate(ids)
    ]
    for call in (gathered, compiled_gathered):
        out = np.zeros(16)
        call(logits.ctypes.data, 20, ids.ctypes.data, count, out.ctypes.data)
        assert out.tolist() == expected


def exponentials(logits: int, peak: float, out: int) -> None:
    """Those of float32."""
    v.store_scores(v.widened(v.exp_under(v.load_logits(logits, 16), peak)), out)


compiled_exponentials = numba.njit(types.void(types.int64, types.float64, types.int64), _nrt=False)(exponentials)


@given(arrays(np.float32, 16, elements=st.floats(-100, 0, width=32)))
def test_exponentials_of_logits_are_the_same_interpreted(logits: npt.NDArray[np.float32]) -> None:
    outs = np.zeros((2, 16))
    for call, out in zip((exponentials, compiled_exponentials), outs, strict=True):
        call(logits.ctypes.data, 0.0, out.ctypes.data)
    assert outs[0].tobytes() == outs[1].tobytes()
    assert outs[0] == pytest.approx(np.exp(logits.astype(np.float64)), rel=4e-7, abs=1e-37)


def test_nothing_beyond_the_count_is_read() -> None:
    logits = np.arange(16, dtype=np.float32)
    values = v.load_logits(logits.ctypes.data, 3)
    assert values.tolist() == [0, 1, 2] + [-np.inf] * 13
