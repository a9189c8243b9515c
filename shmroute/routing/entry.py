"""`MemoryAwareRouter.route_into` as CPython calls it: a C function, made by the compiler that makes the kernels.

A call through Numba's dispatcher costs some 130 ns before the kernel runs (it finds the types of the arguments, unpacks
each array, and lets go of the GIL), and a Python method around it some 90 more: together more than routing one token
among few experts. Here the interpreter calls compiled code directly, which looks at the three arrays itself.

Nothing is taken on trust: an argument that is not exactly an ndarray of the right dtype, rank, shape, order and
alignment goes to the method `fallback`, which says what is wrong with it, and so does every call whose code is an
error. What is read of an ndarray are the first fields of its C struct, which are NumPy's public ABI; `fields_are_known`
compares them with a live array before the first use, and without them there is only the method.

One token is routed with the GIL held, since that is shorter than letting go of it; a batch without.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import sysconfig
from collections.abc import Callable
from typing import Any, Final

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from shmroute.routing import plan_words as p
from shmroute.routing.codes import BAD_ARRAY, RING_BELL
from shmroute.routing.plan import Plan
from shmroute.routing.route import route, route_at
from shmroute.routing.vectors import id_at, word_at
from shmroute.shared.atomic import COMPILED, WORD
from shmroute.shared.kernel import c_function, inlined, kernel

# Offsets in an ndarray's struct (PyArrayObject_fields, numpy/ndarraytypes.h).
OBJECT_TYPE: Final = 8
ARRAY_DATA: Final = 16
ARRAY_RANK: Final = 24  # int
ARRAY_SHAPE: Final = 32
ARRAY_DTYPE: Final = 56
ARRAY_FLAGS: Final = 64  # int

READABLE: Final = 0x0001 | 0x0100  # C-contiguous, aligned
WRITABLE: Final = READABLE | 0x0400

METH_FASTCALL: Final = 0x0080
METH_KEYWORDS: Final = 0x0002


def fields_are_known() -> bool:
    """Whether an ndarray's fields are where this file reads them."""
    if sys.implementation.name != "cpython" or sysconfig.get_config_var("Py_GIL_DISABLED"):
        return False
    probe = np.zeros((2, 3), np.float32)
    where = id(probe)

    def word(address: int) -> int:
        return ctypes.c_int64.from_address(address).value

    def half(address: int) -> int:
        return ctypes.c_int32.from_address(address).value

    return (
        np.ndarray.__basicsize__ >= ARRAY_FLAGS + 4
        and word(where + OBJECT_TYPE) == id(np.ndarray)
        and word(where + ARRAY_DATA) == probe.ctypes.data
        and half(where + ARRAY_RANK) == 2
        and [word(word(where + ARRAY_SHAPE) + i * WORD) for i in range(2)] == [2, 3]
        and word(where + ARRAY_DTYPE) == id(np.dtype(np.float32))
        and half(where + ARRAY_FLAGS) == probe.flags.num
    )


def _c_api(name: str, parameters: int) -> Callable[..., int]:
    """The intrinsic that calls a function of CPython's on words."""
    word = ir.IntType(64)

    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(word, [word] * len(args)), name)
        return builder.call(function, args)

    typed = types.int64(*[types.int64] * parameters), body
    shapes: dict[int, Callable[..., Any]] = {
        0: lambda typingctx: typed,
        1: lambda typingctx, one: typed,
        2: lambda typingctx, one, two: typed,
        4: lambda typingctx, one, two, three, four: typed,
    }
    return intrinsic(shapes[parameters])  # type: ignore[no-any-return]


_box = _c_api("PyLong_FromLongLong", 1)
_call_with = _c_api("PyObject_CallOneArg", 2)
_call_likewise = _c_api("PyObject_Vectorcall", 4)
_release_object = _c_api("Py_DecRef", 1)
_release_gil = _c_api("PyEval_SaveThread", 0)
_retake_gil = _c_api("PyEval_RestoreThread", 1)


@inlined
def _is_array(array: int, array_type: int, dtype: int, flags: int) -> bool:
    return (
        word_at(array + OBJECT_TYPE) == array_type
        and word_at(array + ARRAY_DTYPE) == dtype
        and (id_at(array + ARRAY_FLAGS) & flags) == flags
    )


@inlined
def _has_shape(array: int, rank: int, tokens: int, width: int) -> bool:
    if id_at(array + ARRAY_RANK) != rank:
        return False
    shape = word_at(array + ARRAY_SHAPE)
    if rank == 1:
        return word_at(shape) == width
    return word_at(shape) == tokens and word_at(shape + WORD) == width


@inlined
def _tokens_in(plan: int, logits: int, experts: int, weights: int) -> int:
    """How many tokens three arrays are for, or -1 if they are not what a kernel takes as it is."""
    array_type = word_at(plan + p.ARRAY_TYPE * WORD)
    floats, ints = word_at(plan + p.FLOAT32 * WORD), word_at(plan + p.INT32 * WORD)
    if not (
        _is_array(logits, array_type, floats, READABLE)
        and _is_array(experts, array_type, ints, WRITABLE)
        and _is_array(weights, array_type, floats, WRITABLE)
    ):
        return -1
    rank = id_at(logits + ARRAY_RANK)
    if not 1 <= rank <= 2:
        return -1
    tokens = 1 if rank == 1 else word_at(word_at(logits + ARRAY_SHAPE))
    k = word_at(plan + p.TOP_K * WORD)
    if (
        _has_shape(logits, rank, tokens, word_at(plan + p.NUM_EXPERTS * WORD))
        and _has_shape(experts, rank, tokens, k)
        and _has_shape(weights, rank, tokens, k)
    ):
        return tokens
    return -1


@inlined
def _route_arrays(plan: int, logits: int, experts: int, weights: int) -> int:
    """`route` on three arrays, if they are what it takes."""
    tokens = _tokens_in(plan, logits, experts, weights)
    if tokens < 0:
        return BAD_ARRAY
    logits_at, experts_at, weights_at = (
        word_at(logits + ARRAY_DATA), word_at(experts + ARRAY_DATA), word_at(weights + ARRAY_DATA),
    )  # fmt: skip
    function = word_at(plan + p.ROUTE * WORD)
    if tokens == 1:
        return route_at(function, plan, logits_at, experts_at, weights_at, tokens)
    thread = _release_gil()
    code = route_at(function, plan, logits_at, experts_at, weights_at, tokens)
    _retake_gil(thread)
    return code


@kernel(types.int64(types.int64, types.int64, types.int64, types.int64))
def call_route_into(words: int, arguments: int, count: int, names: int) -> int:
    """The C function: `words` is the plan's words, an ndarray object; the rest is as METH_FASTCALL | METH_KEYWORDS."""
    plan = word_at(words + ARRAY_DATA)
    code = BAD_ARRAY
    if count == 3 and names == 0:
        code = _route_arrays(
            plan, word_at(arguments), word_at(arguments + WORD), word_at(arguments + 2 * WORD)
        )  # fmt: skip
    if code < 0:
        return _call_likewise(word_at(plan + p.FALLBACK * WORD), arguments, count, names)
    result = _box(code)
    if code < RING_BELL or result == 0:
        return result
    finished = _call_with(word_at(plan + p.FINISH * WORD), result)
    _release_object(result)
    return finished


class _MethodDefinition(ctypes.Structure):
    """CPython's PyMethodDef."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    )


class _Words(np.ndarray[Any, Any]):
    """A plan's words that keep alive whatever a call needs: the C function owns them, and may outlive the router."""

    needs: tuple[object, ...]


@functools.cache
def _definition() -> _MethodDefinition:
    """One for all routers; it must live as long as any function made from it, so for ever."""
    flags = METH_FASTCALL | METH_KEYWORDS
    return _MethodDefinition(b"route_into", c_function(call_route_into), flags, b"See MemoryAwareRouter.route_into.")


def bind(plan: Plan, fallback: Callable[..., int], finish: Callable[[int], int]) -> Callable[..., int] | None:
    """A C function that routes by a plan; None if only the method can.

    Parameters
    ----------
    plan : Plan
    fallback : callable
        Called with the same arguments when these, or the plan's state, need a closer look.
    finish : callable
        Called with a code that asks for the pager to be woken; returns what the call shall.
    """
    if not COMPILED or not fields_are_known():
        return None
    words = plan.words.view(_Words)
    words.needs = (plan, fallback, finish)
    plan.words[p.ARRAY_TYPE] = id(np.ndarray)
    plan.words[p.FLOAT32], plan.words[p.INT32] = id(np.dtype(np.float32)), id(np.dtype(np.int32))
    plan.words[p.FALLBACK], plan.words[p.FINISH] = id(fallback), id(finish)
    plan.words[p.ROUTE] = c_function(route)
    make = ctypes.pythonapi.PyCFunction_NewEx
    make.argtypes, make.restype = (ctypes.c_void_p, ctypes.py_object, ctypes.c_void_p), ctypes.py_object
    function: Callable[..., int] = make(ctypes.addressof(_definition()), words, None)
    return function
