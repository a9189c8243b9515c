"""What `shmroute.routing.vectors` is in compiled code: LLVM's instructions on vectors of sixteen.

They become whatever the host has (two AVX-512 registers, four of AVX2, …). Each function here is the emitter, as
`shmroute.shared.emitted` has it, of the function of that name there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.datamodel import models
from numba.extending import register_model

WIDTH: Final = 16


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


def load_logits(typingctx: Any, address: Any, count: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _address(builder, args[0], _F32)
        infinite = ir.Constant(_F32, [-math.inf] * WIDTH)
        operands = [pointer, ir.Constant(ir.IntType(32), 4), _first(builder, args[1]), infinite]
        values = _call(builder, "llvm.masked.load.v16f32.p0", _F32, operands)
        size = _call(builder, "llvm.fabs.v16f32", _F32, [values])
        finite = builder.fcmp_ordered("<", size, ir.Constant(_F32, [math.inf] * WIDTH))
        return builder.select(finite, values, infinite)

    return _LOGITS(types.int64, types.int64), body


def logits_of(typingctx: Any, logits: Any, num_experts: Any, ids: Any, count: Any) -> Any:
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


def load_scores(typingctx: Any, address: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        loaded = builder.load(_address(builder, args[0], _F64))
        loaded.align = 8
        return loaded

    return _SCORES(types.int64), body


def store_scores(typingctx: Any, values: Any, address: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[0], _address(builder, args[1], _F64), align=8)
        return context.get_dummy_value()

    return types.void(_SCORES, types.int64), body


def store_logits(typingctx: Any, values: Any, address: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[0], _address(builder, args[1], _F32), align=4)
        return context.get_dummy_value()

    return types.void(_LOGITS, types.int64), body


def store_weights(typingctx: Any, values: Any, address: Any, count: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        rounded, pointer = builder.fptrunc(args[0], _F32), _address(builder, args[1], _F32)
        operands = [rounded, pointer, ir.Constant(ir.IntType(32), 4), _first(builder, args[2])]
        _call(builder, "llvm.masked.store.v16f32.p0", ir.VoidType(), operands)
        return context.get_dummy_value()

    return types.void(_SCORES, types.int64, types.int64), body


def same(typingctx: Any, value: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _broadcast(builder, args[0])

    return _SCORES(types.float64), body


def _peek(kind: Any, element: Any, widen: Any) -> Any:
    """The intrinsic that reads one number of a kind from an address."""

    def peek(typingctx: Any, address: Any) -> Any:
        def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return widen(builder, builder.load(_address(builder, args[0], element)))

        return kind(types.int64), body

    return peek


logit_at = _peek(types.float64, ir.FloatType(), lambda builder, value: builder.fpext(value, ir.DoubleType()))
score_at = _peek(types.float64, ir.DoubleType(), lambda builder, value: value)
word_at = _peek(types.int64, ir.IntType(64), lambda builder, value: value)
id_at = _peek(types.int64, ir.IntType(32), lambda builder, value: builder.sext(value, ir.IntType(64)))


def _poke(kind: Any, element: Any, narrow: Any) -> Any:
    """The intrinsic that writes one number of a kind to an address."""

    def poke(typingctx: Any, address: Any, value: Any) -> Any:
        def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            builder.store(narrow(builder, args[1]), _address(builder, args[0], element))
            return context.get_dummy_value()

        return types.void(types.int64, kind), body

    return poke


put_score = _poke(types.float64, ir.DoubleType(), lambda builder, value: value)
put_word = _poke(types.int64, ir.IntType(64), lambda builder, value: value)
put_id = _poke(types.int64, ir.IntType(32), lambda builder, value: builder.trunc(value, ir.IntType(32)))


# ------------------------------------------------------------------ element by element


def raised(typingctx: Any, values: Any, bits: Any, amount: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, bits, amount = args
        higher = builder.fadd(values, _broadcast(builder, _as_element_of(builder, amount, values)))
        return builder.select(_from_bits(builder, bits), higher, values)

    return values(values, types.int64, types.float64), body


def _larger_of(builder: Any, one: Any, other: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", one, other), one, other)


def larger(typingctx: Any, one: Any, other: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _larger_of(builder, *args)

    return one(one, one), body


def smaller(typingctx: Any, one: Any, other: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[0], args[1])

    return one(one, one), body


def replaced(typingctx: Any, values: Any, bits: Any, amount: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, bits, amount = args
        others = _broadcast(builder, _as_element_of(builder, amount, values))
        return builder.select(_from_bits(builder, bits), others, values)

    return values(values, types.int64, types.float64), body


def widened(typingctx: Any, values: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(args[0], _F64)

    return _SCORES(_LOGITS), body


def narrowed(typingctx: Any, values: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fptrunc(args[0], _F32)

    return _LOGITS(_SCORES), body


def plus(typingctx: Any, one: Any, other: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fadd(args[0], args[1])

    return one(one, one), body


def divided(typingctx: Any, values: Any, divisor: Any) -> Any:
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


LOG2_E = 1.4426950408889634
EXP_SCORES = _Exponential(np.float64, np.int64, 0.693147180369123816490, 1.90821492927058770002e-10, -700.0, 8, 52)
EXP_LOGITS = _Exponential(np.float32, np.int32, 0.693359375, -2.12194440e-4, -87.0, 6, 23)


def _constant(vector: Any, value: float) -> Any:
    return ir.Constant(vector.type, [float(np.float32(value)) if vector.type == _F32 else value] * WIDTH)


def _exponential(builder: Any, x: Any) -> Any:
    """The exponentials of a vector without elements above 0."""
    e, integers = (EXP_LOGITS, _I32) if x.type == _F32 else (EXP_SCORES, _I64)
    constant = partial(_constant, x)
    x = builder.select(builder.fcmp_ordered(">", x, constant(e.smallest)), x, constant(e.smallest))
    shifted = builder.fadd(builder.fmul(x, constant(LOG2_E)), constant(e.rounding))
    n = builder.fsub(shifted, constant(e.rounding))
    r = builder.fsub(x, builder.fmul(n, constant(e.ln2_high)))
    r = builder.fsub(r, builder.fmul(n, constant(e.ln2_low)))
    result = constant(e.taylor[0])
    for coefficient in e.taylor[1:]:
        result = builder.fadd(builder.fmul(result, r), constant(coefficient))
    exponent = builder.shl(builder.bitcast(shifted, integers), ir.Constant(integers, [e.mantissa] * WIDTH))
    return builder.bitcast(builder.add(builder.bitcast(result, integers), exponent), x.type)


def exp_under(typingctx: Any, values: Any, peak: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, peak = args
        peaks = _broadcast(builder, _as_element_of(builder, peak, values))
        return _exponential(builder, builder.fsub(values, peaks))

    return values(values, types.float64), body


def logistic(typingctx: Any, values: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        (x,) = args
        zero, one, infinite = (_constant(x, value) for value in (0.0, 1.0, -math.inf))
        negative = builder.fcmp_ordered("<", x, zero)
        less = _exponential(builder, builder.select(negative, x, builder.fsub(zero, x)))
        share = builder.fdiv(builder.select(negative, less, one), builder.fadd(one, less))
        return builder.select(builder.fcmp_ordered("==", x, infinite), infinite, share)

    return values(values), body


# ------------------------------------------------------------------ from sixteen to one


def at_least(typingctx: Any, values: Any, bound: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bound = _broadcast(builder, _as_element_of(builder, args[1], args[0]))
        return _to_bits(builder, builder.fcmp_ordered(">=", args[0], bound))

    return types.int64(_LOGITS, types.float64), body


def before(typingctx: Any, values: Any, value: Any, index: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, value, index = args
        bound = _broadcast(builder, _as_element_of(builder, value, values))
        larger = _to_bits(builder, builder.fcmp_ordered(">", values, bound))
        not_smaller = _to_bits(builder, builder.fcmp_ordered(">=", values, bound))
        one = ir.Constant(index.type, 1)
        earlier = builder.sub(builder.shl(one, index), one)
        return builder.or_(larger, builder.and_(not_smaller, earlier))

    return types.int64(values, types.float64, types.int64), body


def kth_largest(typingctx: Any, values: Any, k: Any) -> Any:
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


def total(typingctx: Any, values: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _folded(builder, args[0], builder.fadd)

    return types.float64(_SCORES), body


def largest(typingctx: Any, values: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _folded(builder, args[0], partial(_larger_of, builder))

    return types.float64(_SCORES), body


def least(typingctx: Any, values: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        def combine(one: Any, other: Any) -> Any:
            return builder.select(builder.fcmp_ordered("<", one, other), one, other)

        return _folded(builder, args[0], combine)

    return types.float64(_SCORES), body
