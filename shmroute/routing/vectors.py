"""Sixteen numbers at a time: the arithmetic of choosing and weighing experts, without a branch for each logit.

Choosing by comparing logits one by one costs a mispredicted branch every few of them, which is most of its time. Here
a kernel handles sixteen as one value: `Logits` (float32) or `Scores` (float64, since rounded to float32 a logit plus a
bonus may tie with another). Comparisons give a bit for each element, and bits are counted.

Each function has two bodies, as in `shmroute.shared.atomic`: interpreted, NumPy on an array of sixteen; compiled, what
`shmroute.routing.vector_code` emits. Both give the same bits: no operation is contracted, and sums are taken in one
order.
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from shmroute.routing import vector_code as code
from shmroute.routing.vector_code import EXP_LOGITS, EXP_SCORES, LOG2_E
from shmroute.shared.atomic import f32_array, f64_array, i32_array, i64_array, signed
from shmroute.shared.bits import count_bits
from shmroute.shared.emitted import emitted_by
from shmroute.shared.kernel import inlined

WIDTH: Final = code.WIDTH

Logits = npt.NDArray[np.float32]
"""Interpreted: float32 [WIDTH]. Compiled: one LLVM vector."""
Scores = npt.NDArray[np.float64]
"""Likewise, float64."""


@emitted_by(code.load_logits)
def load_logits(address: int, count: int) -> Logits:
    """The first `count` float32 at an address; -inf in place of one that is not finite, and of those beyond."""
    values = np.full(WIDTH, -math.inf, np.float32)
    count = min(int(count), WIDTH)
    values[:count] = f32_array(address, count)
    values[~np.isfinite(values)] = -math.inf
    return values


@emitted_by(code.logits_of)
def logits_of(logits: int, num_experts: int, ids: int, count: int) -> Scores:
    """The logits of the first `count` experts of an int32 array at `ids`; -inf for an impossible id, and beyond."""
    values = np.full(WIDTH, -math.inf)
    experts = i32_array(ids, min(int(count), WIDTH))
    known = np.flatnonzero((experts >= 0) & (experts < num_experts))
    values[known] = f32_array(logits, num_experts)[experts[known]]
    return values


@emitted_by(code.load_scores)
def load_scores(address: int) -> Scores:
    """Sixteen float64 at an address."""
    return f64_array(address, WIDTH).copy()


@emitted_by(code.store_logits)
def store_logits(values: Logits, address: int) -> None:
    """Write all elements to float32 [WIDTH] at an address."""
    f32_array(address, WIDTH)[:] = values


@emitted_by(code.store_scores)
def store_scores(values: Scores, address: int) -> None:
    """Write all elements to float64 [WIDTH] at an address."""
    f64_array(address, WIDTH)[:] = values


@emitted_by(code.store_weights)
def store_weights(values: Scores, address: int, count: int) -> None:
    """Write the first `count` elements as float32 to an address."""
    count = min(int(count), WIDTH)
    f32_array(address, count)[:] = values[:count]


@emitted_by(code.same)
def same(value: float) -> Scores:
    """`value`, sixteen times."""
    return np.full(WIDTH, value)


@emitted_by(code.logit_at)
def logit_at(address: int) -> float:
    """The float32 at an address."""
    return float(f32_array(address, 1)[0])


@emitted_by(code.id_at)
def id_at(address: int) -> int:
    """The int32 at an address."""
    return int(i32_array(address, 1)[0])


@emitted_by(code.score_at)
def score_at(address: int) -> float:
    """The float64 at an address."""
    return float(f64_array(address, 1)[0])


@emitted_by(code.word_at)
def word_at(address: int) -> int:
    """The int64 at an address of this process's own memory; shared words are read by `load`."""
    return int(i64_array(address, 1)[0])


@emitted_by(code.put_id)
def put_id(address: int, value: int) -> None:
    """Write an int32."""
    i32_array(address, 1)[0] = value


@emitted_by(code.put_word)
def put_word(address: int, value: int) -> None:
    """Write an int64 of this process's own, modulo 2^64: bit 63 may have been set or cleared."""
    i64_array(address, 1)[0] = signed(value)


@emitted_by(code.put_score)
def put_score(address: int, value: float) -> None:
    """Write a float64."""
    f64_array(address, 1)[0] = value


@emitted_by(code.raised)
def raised(values: Any, bits: int, amount: float) -> Any:
    """`amount`, rounded as the elements are, added to those of the first sixteen bits that are set."""
    chosen = (int(bits) >> np.arange(WIDTH)) & 1 == 1
    return np.where(chosen, values + values.dtype.type(amount), values)


@emitted_by(code.widened)
def widened(values: Logits) -> Scores:
    """The same in float64."""
    return values.astype(np.float64)


@emitted_by(code.narrowed)
def narrowed(values: Scores) -> Logits:
    """The nearest float32."""
    return values.astype(np.float32)


@emitted_by(code.larger)
def larger(one: Any, other: Any) -> Any:
    """The larger of each two elements."""
    return np.where(one > other, one, other)


@emitted_by(code.smaller)
def smaller(one: Any, other: Any) -> Any:
    """The smaller of each two elements."""
    return np.where(one < other, one, other)


@emitted_by(code.replaced)
def replaced(values: Any, bits: int, amount: float) -> Any:
    """`amount` in place of the elements whose bit, of the first sixteen, is set."""
    chosen = (int(bits) >> np.arange(WIDTH)) & 1 == 1
    return np.where(chosen, values.dtype.type(amount), values)


@emitted_by(code.plus)
def plus(one: Any, other: Any) -> Any:
    """Sums of each two elements."""
    return one + other


@emitted_by(code.divided)
def divided(values: Scores, divisor: float) -> Scores:
    """All elements divided by one number."""
    return values / divisor


def _exponential_of(x: Any) -> Any:
    e = EXP_LOGITS if x.dtype == np.float32 else EXP_SCORES
    real = e.float_type
    x = np.maximum(x, real(e.smallest))
    shifted = x * real(LOG2_E) + real(e.rounding)
    n = shifted - real(e.rounding)
    r = x - n * real(e.ln2_high) - n * real(e.ln2_low)
    result = np.full(WIDTH, e.taylor[0], real)
    for coefficient in e.taylor[1:]:
        result = result * r + real(coefficient)
    return (result.view(e.int_type) + (shifted.view(e.int_type) << e.mantissa)).view(real)


@emitted_by(code.exp_under)
def exp_under(values: Any, peak: float) -> Any:
    """``exp(value - peak)`` of each element, for values that are at most `peak`; to 1e-9 of it, for logits to 3e-7."""
    return _exponential_of(values - values.dtype.type(peak))


@emitted_by(code.logistic)
def logistic(values: Any) -> Any:
    """``1 / (1 + exp(-value))`` of each element, to 1e-9 of it, for logits to 3e-7; but -inf stays as it is."""
    one = values.dtype.type(1)
    less = _exponential_of(np.where(values < 0, values, values.dtype.type(0) - values))
    return np.where(values == -math.inf, values, np.where(values < 0, less, one) / (one + less))


@emitted_by(code.at_least)
def at_least(values: Logits, bound: float) -> int:
    """Bits of the elements that are at least `bound`, which is a float32's value."""
    return int(np.packbits(values >= np.float32(bound), bitorder="little").view(np.uint16)[0])


@emitted_by(code.before)
def before(values: Any, value: float, index: int) -> int:
    """Bits of the elements that go before one: the larger ones, and equal ones of a lower index."""
    first = (values > value) | ((values == value) & (np.arange(WIDTH) < index))
    return int(np.packbits(first, bitorder="little").view(np.uint16)[0])


@inlined
def count_before(values: Any, value: float, index: int) -> int:
    """How many elements go before one."""
    return count_bits(before(values, value, index))


@emitted_by(code.kth_largest)
def kth_largest(values: Logits, k: int) -> float:
    """The k-th largest element, counted with repetitions; 1 <= k <= WIDTH."""
    return float(np.sort(values)[WIDTH - k])


@emitted_by(code.largest)
def largest(values: Scores) -> float:
    """The largest element."""
    return float(values.max())


@emitted_by(code.least)
def least(values: Scores) -> float:
    """The least element."""
    return float(values.min())


@emitted_by(code.total)
def total(values: Scores) -> float:
    """The sum of all elements, halves onto halves."""
    while len(values) > 1:
        half = len(values) // 2
        values = values[:half] + values[half:]
    return float(values[0])
