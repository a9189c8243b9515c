"""Sixteen numbers at a time: the arithmetic of choosing and weighing experts, without a branch for each logit.

Choosing by comparing logits one by one costs a mispredicted branch every few of them, which is most of its time. Here
a kernel handles sixteen as one value: `Logits` (float32) or `Scores` (float64, since rounded to float32 a logit plus a
bonus may tie with another). Comparisons give a bit for each element, and bits are counted.

Each function has two bodies, as in `shmroute.shared.atomic`: compiled, a few LLVM vector instructions, which become
whatever the host has (two AVX-512 registers, four of AVX2, …); interpreted, NumPy on an array of sixteen. Both give the
same bits: no operation is contracted, and sums are taken in one order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import intrinsic, overload, register_model

from shmroute.shared.atomic import f32_array, f64_array, i32_array, i64_array, signed
from shmroute.shared.bits import count_bits
from shmroute.shared.kernel import inlined

WIDTH: Final = 16

Logits = npt.NDArray[np.float32]
"""Interpreted: float32 [WIDTH]. Compiled: one LLVM vector."""
Scores = npt.NDArray[np.float64]
"""Likewise, float64."""


class _VectorType(types.Type):  # type: ignore[misc]
    """The type of sixteen elements in compiled code."""

    def __init__(self, name: str, element: Any) -> None:
        super().__init__(name)
        self.vector = ir.VectorType(element, WIDTH)


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, kind.vector)


_LOGITS, _SCORES = _VectorType("Logits", ir.FloatType()), _VectorType("Scores", ir.DoubleType())
_BITS = ir.VectorType(ir.IntType(1), WIDTH)
_I32 = ir.VectorType(ir.IntType(32), WIDTH)
_I64 = ir.VectorType(ir.IntType(64), WIDTH)
_F32, _F64 = _LOGITS.vector, _SCORES.vector
_LANES = ir.Constant(_I64, list(range(WIDTH)))


def _broadcast(builder: Any, scalar: Any) -> Any:
    """A vector with `scalar` in every element."""
    vector = ir.VectorType(scalar.type, WIDTH)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(ir.IntType(32), 0))
    order = ir.Constant(ir.VectorType(ir.IntType(32), WIDTH), [0] * WIDTH)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), order)


def _element(builder: Any, vector: Any, index: int) -> Any:
    return builder.extract_element(vector, ir.Constant(ir.IntType(32), index))


def _as_element_of(builder: Any, value: Any, vector: Any) -> Any:
    """A float64 as an element of a vector."""
    return builder.fptrunc(value, ir.FloatType()) if vector.type == _F32 else value


def _to_bits(builder: Any, comparison: Any) -> Any:
    """int64 with bit i set where element i of a comparison is true."""
    return builder.zext(builder.bitcast(comparison, ir.IntType(WIDTH)), ir.IntType(64))


def _from_bits(builder: Any, word: Any) -> Any:
    return builder.bitcast(builder.trunc(word, ir.IntType(WIDTH)), _BITS)


def _call(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


def _address(builder: Any, address: Any, kind: Any) -> Any:
    return builder.inttoptr(address, kind.as_pointer())


def _first(builder: Any, count: Any) -> Any:
    """A comparison that is true in the first `count` elements."""
    return builder.icmp_signed("<", _LANES, _broadcast(builder, count))


# ------------------------------------------------------------------ in and out of memory


@intrinsic
def _load_logits(typingctx: Any, address: Any, count: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _address(builder, args[0], _F32)
        infinite = ir.Constant(_F32, [-math.inf] * WIDTH)
        operands = [pointer, ir.Constant(ir.IntType(32), 4), _first(builder, args[1]), infinite]
        values = _call(builder, "llvm.masked.load.v16f32.p0", _F32, operands)
        size = _call(builder, "llvm.fabs.v16f32", _F32, [values])
        finite = builder.fcmp_ordered("<", size, ir.Constant(_F32, [math.inf] * WIDTH))
        return builder.select(finite, values, infinite)

    return _LOGITS(types.int64, types.int64), body


@intrinsic
def _logits_of(typingctx: Any, logits: Any, num_experts: Any, ids: Any, count: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        logits, num_experts, ids, count = args
        four = ir.Constant(ir.IntType(32), 4)
        nobody = ir.Constant(_I32, [-1] * WIDTH)
        operands = [_address(builder, ids, _I32), four, _first(builder, count), nobody]
        experts = builder.zext(_call(builder, "llvm.masked.load.v16i32.p0", _I32, operands), _I64)
        known = builder.icmp_unsigned("<", experts, _broadcast(builder, num_experts))
        offsets = builder.shl(experts, ir.Constant(_I64, [2] * WIDTH))
        pointers = builder.inttoptr(
            builder.add(offsets, _broadcast(builder, logits)), ir.VectorType(ir.FloatType().as_pointer(), WIDTH)
        )
        operands = [pointers, four, known, ir.Constant(_F32, [-math.inf] * WIDTH)]
        return builder.fpext(_call(builder, "llvm.masked.gather.v16f32.v16p0", _F32, operands), _F64)

    return _SCORES(types.int64, types.int64, types.int64, types.int64), body


@intrinsic
def _load_scores(typingctx: Any, address: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        loaded = builder.load(_address(builder, args[0], _F64))
        loaded.align = 8
        return loaded

    return _SCORES(types.int64), body


@intrinsic
def _store_scores(typingctx: Any, values: Any, address: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[0], _address(builder, args[1], _F64), align=8)
        return context.get_dummy_value()

    return types.void(_SCORES, types.int64), body


@intrinsic
def _store_logits(typingctx: Any, values: Any, address: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[0], _address(builder, args[1], _F32), align=4)
        return context.get_dummy_value()

    return types.void(_LOGITS, types.int64), body


@intrinsic
def _store_weights(typingctx: Any, values: Any, address: Any, count: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rounded, pointer = builder.fptrunc(args[0], _F32), _address(builder, args[1], _F32)
        operands = [rounded, pointer, ir.Constant(ir.IntType(32), 4), _first(builder, args[2])]
        _call(builder, "llvm.masked.store.v16f32.p0", ir.VoidType(), operands)
        return context.get_dummy_value()

    return types.void(_SCORES, types.int64, types.int64), body


@intrinsic
def _same(typingctx: Any, value: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _broadcast(builder, args[0])

    return _SCORES(types.float64), body


def _peek(kind: Any, element: Any, widen: Any) -> Any:
    """The intrinsic that reads one number of a kind from an address."""

    @intrinsic
    def peek(typingctx: Any, address: Any) -> Any:
        def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return widen(builder, builder.load(_address(builder, args[0], element)))

        return kind(types.int64), body

    return peek


_logit_at = _peek(types.float64, ir.FloatType(), lambda builder, value: builder.fpext(value, ir.DoubleType()))
_score_at = _peek(types.float64, ir.DoubleType(), lambda builder, value: value)
_word_at = _peek(types.int64, ir.IntType(64), lambda builder, value: value)
_id_at = _peek(types.int64, ir.IntType(32), lambda builder, value: builder.sext(value, ir.IntType(64)))


def _poke(kind: Any, element: Any, narrow: Any) -> Any:
    """The intrinsic that writes one number of a kind to an address."""

    @intrinsic
    def poke(typingctx: Any, address: Any, value: Any) -> Any:
        def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.store(narrow(builder, args[1]), _address(builder, args[0], element))
            return context.get_dummy_value()

        return types.void(types.int64, kind), body

    return poke


_put_score = _poke(types.float64, ir.DoubleType(), lambda builder, value: value)
_put_word = _poke(types.int64, ir.IntType(64), lambda builder, value: value)
_put_id = _poke(types.int64, ir.IntType(32), lambda builder, value: builder.trunc(value, ir.IntType(32)))


# ------------------------------------------------------------------ element by element


@intrinsic
def _raised(typingctx: Any, values: Any, bits: Any, amount: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, bits, amount = args
        higher = builder.fadd(values, _broadcast(builder, _as_element_of(builder, amount, values)))
        return builder.select(_from_bits(builder, bits), higher, values)

    return values(values, types.int64, types.float64), body


def _larger_of(builder: Any, one: Any, other: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", one, other), one, other)


@intrinsic
def _larger(typingctx: Any, one: Any, other: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _larger_of(builder, *args)

    return one(one, one), body


@intrinsic
def _smaller(typingctx: Any, one: Any, other: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[0], args[1])

    return one(one, one), body


@intrinsic
def _replaced(typingctx: Any, values: Any, bits: Any, amount: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, bits, amount = args
        others = _broadcast(builder, _as_element_of(builder, amount, values))
        return builder.select(_from_bits(builder, bits), others, values)

    return values(values, types.int64, types.float64), body


@intrinsic
def _widened(typingctx: Any, values: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(args[0], _F64)

    return _SCORES(_LOGITS), body


@intrinsic
def _narrowed(typingctx: Any, values: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fptrunc(args[0], _F32)

    return _LOGITS(_SCORES), body


@intrinsic
def _plus(typingctx: Any, one: Any, other: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fadd(args[0], args[1])

    return one(one, one), body


@intrinsic
def _divided(typingctx: Any, values: Any, divisor: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fdiv(args[0], _broadcast(builder, args[1]))

    return _SCORES(_SCORES, types.float64), body


# exp(x) = 2^n exp(r), with n the integer nearest to x / ln 2 and so |r| <= ln 2 / 2, where the Taylor polynomial of
# degree 8 (6 for float32) is off by less than 1e-9 (2e-7) of exp(r). Adding and subtracting 1.5 * 2^52 (2^23) rounds to
# an integer, whose low bits then stand in the sum's own. ln 2 comes in two parts, the first of so few bits that n times
# it is exact.
@dataclass(frozen=True)
class _Exponential:
    """Constants of `exp_under` for one type of element."""

    float_type: type[np.floating[Any]]
    int_type: type[np.signedinteger[Any]]
    ln2_high: float
    ln2_low: float
    smallest: float  # whose exp is nothing beside 1, and still a normal number
    degree: int
    mantissa: int  # its bits

    @property
    def rounding(self) -> float:
        return 1.5 * 2.0**self.mantissa

    @property
    def taylor(self) -> list[float]:
        return [float(self.float_type(1 / math.factorial(i))) for i in range(self.degree, -1, -1)]


_LOG2_E = 1.4426950408889634
_EXP_SCORES = _Exponential(np.float64, np.int64, 0.693147180369123816490, 1.90821492927058770002e-10, -700.0, 8, 52)
_EXP_LOGITS = _Exponential(np.float32, np.int32, 0.693359375, -2.12194440e-4, -87.0, 6, 23)


def _constant(vector: Any, value: float) -> Any:
    return ir.Constant(vector.type, [float(np.float32(value)) if vector.type == _F32 else value] * WIDTH)


def _exponential(builder: Any, x: Any) -> Any:
    """The exponentials of a vector without elements above 0."""
    e, integers = (_EXP_LOGITS, _I32) if x.type == _F32 else (_EXP_SCORES, _I64)
    constant = partial(_constant, x)
    x = builder.select(builder.fcmp_ordered(">", x, constant(e.smallest)), x, constant(e.smallest))
    shifted = builder.fadd(builder.fmul(x, constant(_LOG2_E)), constant(e.rounding))
    n = builder.fsub(shifted, constant(e.rounding))
    r = builder.fsub(x, builder.fmul(n, constant(e.ln2_high)))
    r = builder.fsub(r, builder.fmul(n, constant(e.ln2_low)))
    result = constant(e.taylor[0])
    for coefficient in e.taylor[1:]:
        result = builder.fadd(builder.fmul(result, r), constant(coefficient))
    exponent = builder.shl(builder.bitcast(shifted, integers), ir.Constant(integers, [e.mantissa] * WIDTH))
    return builder.bitcast(builder.add(builder.bitcast(result, integers), exponent), x.type)


@intrinsic
def _exp_under(typingctx: Any, values: Any, peak: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, peak = args
        peaks = _broadcast(builder, _as_element_of(builder, peak, values))
        return _exponential(builder, builder.fsub(values, peaks))

    return values(values, types.float64), body


@intrinsic
def _logistic(typingctx: Any, values: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (x,) = args
        zero, one, infinite = (_constant(x, value) for value in (0.0, 1.0, -math.inf))
        negative = builder.fcmp_ordered("<", x, zero)
        less = _exponential(builder, builder.select(negative, x, builder.fsub(zero, x)))
        share = builder.fdiv(builder.select(negative, less, one), builder.fadd(one, less))
        return builder.select(builder.fcmp_ordered("==", x, infinite), infinite, share)

    return values(values), body


# ------------------------------------------------------------------ from sixteen to one


@intrinsic
def _at_least(typingctx: Any, values: Any, bound: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bound = _broadcast(builder, _as_element_of(builder, args[1], args[0]))
        return _to_bits(builder, builder.fcmp_ordered(">=", args[0], bound))

    return types.int64(_LOGITS, types.float64), body


@intrinsic
def _before(typingctx: Any, values: Any, value: Any, index: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, value, index = args
        bound = _broadcast(builder, _as_element_of(builder, value, values))
        larger = _to_bits(builder, builder.fcmp_ordered(">", values, bound))
        not_smaller = _to_bits(builder, builder.fcmp_ordered(">=", values, bound))
        one = ir.Constant(index.type, 1)
        earlier = builder.sub(builder.shl(one, index), one)
        return builder.or_(larger, builder.and_(not_smaller, earlier))

    return types.int64(values, types.float64, types.int64), body


@intrinsic
def _kth_largest(typingctx: Any, values: Any, k: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, k = args
        largest = ir.Constant(ir.FloatType(), -math.inf)
        for index in range(WIDTH):
            value = _element(builder, values, index)
            not_smaller = _to_bits(builder, builder.fcmp_ordered(">=", values, _broadcast(builder, value)))
            enough = builder.icmp_signed(">=", builder.ctpop(not_smaller), k)
            larger = builder.fcmp_ordered(">", value, largest)
            largest = builder.select(builder.and_(enough, larger), value, largest)
        return builder.fpext(largest, ir.DoubleType())

    return types.float64(_LOGITS, types.int64), body


def _folded(builder: Any, values: Any, combine: Any) -> Any:
    """One element made of all: halves combined with halves."""
    width = WIDTH
    while width > 1:
        width //= 2
        undefined = ir.Constant(values.type, ir.Undefined)
        low, high = (
            ir.Constant(ir.VectorType(ir.IntType(32), width), list(range(first, first + width))) for first in (0, width)
        )
        values = combine(
            builder.shuffle_vector(values, undefined, low), builder.shuffle_vector(values, undefined, high)
        )
    return _element(builder, values, 0)


@intrinsic
def _total(typingctx: Any, values: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _folded(builder, args[0], builder.fadd)

    return types.float64(_SCORES), body


@intrinsic
def _largest(typingctx: Any, values: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _folded(builder, args[0], partial(_larger_of, builder))

    return types.float64(_SCORES), body


@intrinsic
def _least(typingctx: Any, values: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def combine(one: Any, other: Any) -> Any:
            return builder.select(builder.fcmp_ordered("<", one, other), one, other)

        return _folded(builder, args[0], combine)

    return types.float64(_SCORES), body


# ------------------------------------------------------------------ interpreted bodies, and what each is


def load_logits(address: int, count: int) -> Logits:
    """The first `count` float32 at an address; -inf in place of one that is not finite, and of those beyond."""
    values = np.full(WIDTH, -math.inf, np.float32)
    count = min(int(count), WIDTH)
    values[:count] = f32_array(address, count)
    values[~np.isfinite(values)] = -math.inf
    return values


def logits_of(logits: int, num_experts: int, ids: int, count: int) -> Scores:
    """The logits of the first `count` experts of an int32 array at `ids`; -inf for an impossible id, and beyond."""
    values = np.full(WIDTH, -math.inf)
    experts = i32_array(ids, min(int(count), WIDTH))
    known = np.flatnonzero((experts >= 0) & (experts < num_experts))
    values[known] = f32_array(logits, num_experts)[experts[known]]
    return values


def load_scores(address: int) -> Scores:
    """Sixteen float64 at an address."""
    return f64_array(address, WIDTH).copy()


def store_logits(values: Logits, address: int) -> None:
    """Write all elements to float32 [WIDTH] at an address."""
    f32_array(address, WIDTH)[:] = values


def store_scores(values: Scores, address: int) -> None:
    """Write all elements to float64 [WIDTH] at an address."""
    f64_array(address, WIDTH)[:] = values


def store_weights(values: Scores, address: int, count: int) -> None:
    """Write the first `count` elements as float32 to an address."""
    count = min(int(count), WIDTH)
    f32_array(address, count)[:] = values[:count]


def same(value: float) -> Scores:
    """`value`, sixteen times."""
    return np.full(WIDTH, value)


def logit_at(address: int) -> float:
    """The float32 at an address."""
    return float(f32_array(address, 1)[0])


def id_at(address: int) -> int:
    """The int32 at an address."""
    return int(i32_array(address, 1)[0])


def score_at(address: int) -> float:
    """The float64 at an address."""
    return float(f64_array(address, 1)[0])


def word_at(address: int) -> int:
    """The int64 at an address of this process's own memory; shared words are read by `load`."""
    return int(i64_array(address, 1)[0])


def put_id(address: int, value: int) -> None:
    """Write an int32."""
    i32_array(address, 1)[0] = value


def put_word(address: int, value: int) -> None:
    """Write an int64 of this process's own, modulo 2^64: bit 63 may have been set or cleared."""
    i64_array(address, 1)[0] = signed(value)


def put_score(address: int, value: float) -> None:
    """Write a float64."""
    f64_array(address, 1)[0] = value


def raised(values: Any, bits: int, amount: float) -> Any:
    """`amount`, rounded as the elements are, added to those of the first sixteen bits that are set."""
    chosen = (int(bits) >> np.arange(WIDTH)) & 1 == 1
    return np.where(chosen, values + values.dtype.type(amount), values)


def widened(values: Logits) -> Scores:
    """The same in float64."""
    return values.astype(np.float64)


def narrowed(values: Scores) -> Logits:
    """The nearest float32."""
    return values.astype(np.float32)


def larger(one: Any, other: Any) -> Any:
    """The larger of each two elements."""
    return np.where(one > other, one, other)


def smaller(one: Any, other: Any) -> Any:
    """The smaller of each two elements."""
    return np.where(one < other, one, other)


def replaced(values: Any, bits: int, amount: float) -> Any:
    """`amount` in place of the elements whose bit, of the first sixteen, is set."""
    chosen = (int(bits) >> np.arange(WIDTH)) & 1 == 1
    return np.where(chosen, values.dtype.type(amount), values)


def plus(one: Any, other: Any) -> Any:
    """Sums of each two elements."""
    return one + other


def divided(values: Scores, divisor: float) -> Scores:
    """All elements divided by one number."""
    return values / divisor


def _exponential_of(x: Any) -> Any:
    e = _EXP_LOGITS if x.dtype == np.float32 else _EXP_SCORES
    real = e.float_type
    x = np.maximum(x, real(e.smallest))
    shifted = x * real(_LOG2_E) + real(e.rounding)
    n = shifted - real(e.rounding)
    r = x - n * real(e.ln2_high) - n * real(e.ln2_low)
    result = np.full(WIDTH, e.taylor[0], real)
    for coefficient in e.taylor[1:]:
        result = result * r + real(coefficient)
    return (result.view(e.int_type) + (shifted.view(e.int_type) << e.mantissa)).view(real)


def exp_under(values: Any, peak: float) -> Any:
    """``exp(value - peak)`` of each element, for values that are at most `peak`; to 1e-9 of it, for logits to 3e-7."""
    return _exponential_of(values - values.dtype.type(peak))


def logistic(values: Any) -> Any:
    """``1 / (1 + exp(-value))`` of each element, to 1e-9 of it, for logits to 3e-7; but -inf stays as it is."""
    one = values.dtype.type(1)
    less = _exponential_of(np.where(values < 0, values, values.dtype.type(0) - values))
    return np.where(values == -math.inf, values, np.where(values < 0, less, one) / (one + less))


def at_least(values: Logits, bound: float) -> int:
    """Bits of the elements that are at least `bound`, which is a float32's value."""
    return int(np.packbits(values >= np.float32(bound), bitorder="little").view(np.uint16)[0])


def before(values: Any, value: float, index: int) -> int:
    """Bits of the elements that go before one: the larger ones, and equal ones of a lower index."""
    first = (values > value) | ((values == value) & (np.arange(WIDTH) < index))
    return int(np.packbits(first, bitorder="little").view(np.uint16)[0])


@inlined
def count_before(values: Any, value: float, index: int) -> int:
    """How many elements go before one."""
    return count_bits(before(values, value, index))


def kth_largest(values: Logits, k: int) -> float:
    """The k-th largest element, counted with repetitions; 1 <= k <= WIDTH."""
    return float(np.sort(values)[WIDTH - k])


def largest(values: Scores) -> float:
    """The largest element."""
    return float(values.max())


def least(values: Scores) -> float:
    """The least element."""
    return float(values.min())


def total(values: Scores) -> float:
    """The sum of all elements, halves onto halves."""
    while len(values) > 1:
        half = len(values) // 2
        values = values[:half] + values[half:]
    return float(values[0])


def _compile(function: Any, body: Any) -> None:
    """In compiled code a call to `function` is `body`, in place: a call would spill every vector."""
    overload(function, jit_options={"forceinline": True})(body)


_compile(load_logits, lambda address, count: lambda address, count: _load_logits(address, count))
_compile(
    logits_of,
    lambda logits, num_experts, ids, count: (
        lambda logits, num_experts, ids, count: _logits_of(logits, num_experts, ids, count)
    ),
)
_compile(load_scores, lambda address: lambda address: _load_scores(address))
_compile(store_logits, lambda values, address: lambda values, address: _store_logits(values, address))
_compile(store_scores, lambda values, address: lambda values, address: _store_scores(values, address))
_compile(
    store_weights, lambda values, address, count: lambda values, address, count: _store_weights(values, address, count)
)
_compile(same, lambda value: lambda value: _same(value))
_compile(logit_at, lambda address: lambda address: _logit_at(address))
_compile(id_at, lambda address: lambda address: _id_at(address))
_compile(score_at, lambda address: lambda address: _score_at(address))
_compile(word_at, lambda address: lambda address: _word_at(address))
_compile(put_id, lambda address, value: lambda address, value: _put_id(address, value))
_compile(put_word, lambda address, value: lambda address, value: _put_word(address, value))
_compile(put_score, lambda address, value: lambda address, value: _put_score(address, value))
_compile(raised, lambda values, bits, amount: lambda values, bits, amount: _raised(values, bits, amount))
_compile(widened, lambda values: lambda values: _widened(values))
_compile(narrowed, lambda values: lambda values: _narrowed(values))
_compile(larger, lambda one, other: lambda one, other: _larger(one, other))
_compile(smaller, lambda one, other: lambda one, other: _smaller(one, other))
_compile(replaced, lambda values, bits, amount: lambda values, bits, amount: _replaced(values, bits, amount))
_compile(logistic, lambda values: lambda values: _logistic(values))
_compile(plus, lambda one, other: lambda one, other: _plus(one, other))
_compile(divided, lambda values, divisor: lambda values, divisor: _divided(values, divisor))
_compile(exp_under, lambda values, peak: lambda values, peak: _exp_under(values, peak))
_compile(at_least, lambda values, bound: lambda values, bound: _at_least(values, bound))
_compile(before, lambda values, value, index: lambda values, value, index: _before(values, value, index))
_compile(kth_largest, lambda values, k: lambda values, k: _kth_largest(values, k))
_compile(largest, lambda values: lambda values: _largest(values))
_compile(least, lambda values: lambda values: _least(values))
_compile(total, lambda values: lambda values: _total(values))
