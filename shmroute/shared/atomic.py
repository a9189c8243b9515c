"""Atomic operations on 64-bit words in shared memory, by address.

The operations are those of the `atomics` package, whose Python layer costs microseconds a call and whose
functions (the patomic library that it ships) cost about 3 ns when called from compiled code. So each one has
two bodies:

- *compiled*: inside a kernel, a call to the very function that `atomics` itself would call. Its pointer is taken
  from the package once, at import, and registered as a symbol, so that cached machine code finds it again.
- *interpreted*: from Python, and inside kernels when ``NUMBA_DISABLE_JIT=1``, the package's view API, or another
  `Machine` that stands in for it (`interpreted_by`).

All operations are sequentially consistent, and `cas` is strong. Words are **signed** 64-bit integers in both
modes: mixing unsigned and signed ones makes floats in Numba. `shmroute.shared.words` packs and unpacks them.

Addresses are plain integers and must be multiples of 8. Nothing here checks them: callers derive them from
`shmroute.shared.layout`.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import time
from collections.abc import Iterator
from typing import Any, Protocol

import llvmlite.binding
import numba
import numpy as np
import numpy.typing as npt
from atomics import UINT, MemoryOrder, OpType, atomicview
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import lower_builtin, type_callable
from numba.np.arrayobj import make_array, populate_array

from shmroute.shared.emitted import emitted_by

COMPILED = not numba.config.DISABLE_JIT
"""Whether kernels are compiled in this process (not under ``NUMBA_DISABLE_JIT=1``)."""

WORD = 8
_MASK = (1 << 64) - 1
_SIGN = 1 << 63
_SEQ_CST = int(MemoryOrder.SEQ_CST)

_OPERATIONS = {
    "load": OpType.LOAD,
    "store": OpType.STORE,
    "exchange": OpType.EXCHANGE,
    "cas": OpType.CMPXCHG_STRONG,
    "fetch_add": OpType.FETCH_ADD,
    "fetch_and": OpType.FETCH_AND,
    "fetch_or": OpType.FETCH_OR,
}


def _register_symbols() -> None:
    """Give compiled code the addresses of the functions that `atomics` calls for 8-byte words."""
    with atomicview(buffer=bytearray(WORD), atype=UINT) as view:
        for name, operation in _OPERATIONS.items():
            function = view._core.get_op_func(operation)
            pointer = ctypes.cast(function, ctypes.c_void_p).value if function else None
            if not pointer:
                raise ImportError(
                    f"the atomics package offers no lock-free 8-byte {name} on this machine; shmroute needs it"
                )
            llvmlite.binding.add_symbol(f"shmroute_{name}", pointer)


_register_symbols()

# ------------------------------------------------------------------ compiled bodies

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_PTR = ir.IntType(8).as_pointer()


def _spill(builder: Any, value: Any) -> Any:
    """The address of a stack cell that holds `value`."""
    cell = cgutils.alloca_once(builder, _I64)
    builder.store(value, cell)
    return builder.bitcast(cell, _PTR)


def _call(builder: Any, name: str, result: Any, arguments: list[Any]) -> Any:
    function = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(result, [a.type for a in arguments]), f"shmroute_{name}"
    )
    return builder.call(function, arguments)


_ORDER = ir.Constant(_I32, _SEQ_CST)


def _load(typingctx: Any, address: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        cell = cgutils.alloca_once(builder, _I64)
        pointer = builder.inttoptr(args[0], _PTR)
        _call(builder, "load", ir.VoidType(), [pointer, _ORDER, builder.bitcast(cell, _PTR)])
        return builder.load(cell)

    return types.int64(types.int64), body


def _store(typingctx: Any, address: Any, value: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _PTR)
        _call(builder, "store", ir.VoidType(), [pointer, _spill(builder, args[1]), _ORDER])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), body


def _cas(typingctx: Any, address: Any, expected: Any, desired: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = builder.inttoptr(args[0], _PTR)
        operands = [pointer, _spill(builder, args[1]), _spill(builder, args[2]), _ORDER, _ORDER]
        done = _call(builder, "cas", _I32, operands)
        return builder.icmp_signed("!=", done, ir.Constant(_I32, 0))

    return types.boolean(types.int64, types.int64, types.int64), body


def _fetching(name: str) -> Any:
    """The emitter of an operation that takes an operand and returns the word's former value."""

    def fetch(typingctx: Any, address: Any, operand: Any) -> Any:
        def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            cell = cgutils.alloca_once(builder, _I64)
            pointer = builder.inttoptr(args[0], _PTR)
            operands = [pointer, _spill(builder, args[1]), _ORDER, builder.bitcast(cell, _PTR)]
            _call(builder, name, ir.VoidType(), operands)
            return builder.load(cell)

        return types.int64(types.int64, types.int64), body

    return fetch


_exchange = _fetching("exchange")
_fetch_add = _fetching("fetch_add")
_fetch_and = _fetching("fetch_and")
_fetch_or = _fetching("fetch_or")


_FOR_WRITING, _KEPT, _DATA = (ir.Constant(_I32, value) for value in (1, 3, 1))


def _fetch_line(typingctx: Any, address: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_PTR, _I32, _I32, _I32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [builder.inttoptr(args[0], _PTR), _FOR_WRITING, _KEPT, _DATA])
        return context.get_dummy_value()

    return types.void(types.int64), body


def _monotonic_ns(typingctx: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        timespec = ir.LiteralStructType([_I64, _I64])
        cell = cgutils.alloca_once(builder, timespec)
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(_I32, [_I32, timespec.as_pointer()]), "clock_gettime"
        )
        builder.call(function, [ir.Constant(_I32, time.CLOCK_MONOTONIC), cell])
        value = builder.load(cell)
        seconds = builder.mul(builder.extract_value(value, 0), ir.Constant(_I64, 1_000_000_000))
        return builder.add(seconds, builder.extract_value(value, 1))

    return types.int64(), body


def _cycle_count(typingctx: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_I64, [])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.readcyclecounter"), [])

    return types.int64(), body


def _signed(typingctx: Any, value: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[0]

    return types.int64(types.int64), body


def _address_of(typingctx: Any, array: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ptrtoint(make_array(array)(context, builder, args[0]).data, _I64)

    return types.int64(array), body


# ------------------------------------------------------------------ interpreted bodies, and which is which


class Machine(Protocol):
    """What carries out interpreted operations; words go in and come out as signed integers."""

    def load(self, address: int) -> int: ...
    def store(self, address: int, value: int) -> None: ...
    def exchange(self, address: int, value: int) -> int: ...
    def cas(self, address: int, expected: int, desired: int) -> bool: ...
    def fetch_add(self, address: int, value: int) -> int: ...
    def fetch_and(self, address: int, mask: int) -> int: ...
    def fetch_or(self, address: int, mask: int) -> int: ...


_views: dict[int, tuple[Any, Any]] = {}
"""Open `atomics` views by address: opening one costs tens of microseconds."""


def _view(address: int) -> Any:
    address = int(address)  # NumPy's integers come from kernels' arrays
    found = _views.get(address)
    if found is None:
        cell = (ctypes.c_char * WORD).from_address(address)
        context = atomicview(buffer=memoryview(cell).cast("B"), atype=UINT)
        found = _views[address] = (context, context.__enter__())
    return found[1]


def forget_views(start: int, size: int) -> None:
    """Leave the interpreted views of addresses in [start, start + size), before that memory is unmapped."""
    for address in [a for a in _views if start <= a < start + size]:
        context, _ = _views.pop(address)
        context.__exit__(None, None, None)


# A view that is still open when the interpreter ends complains from its destructor.
atexit.register(forget_views, 0, 1 << 64)


@emitted_by(_signed)
def signed(value: int) -> int:
    """`value` modulo 2^64, as the signed integer of the same bits. In compiled code words are that already."""
    value = int(value) & _MASK
    return value - (1 << 64) if value & _SIGN else value


class _Package:
    """The operations of the `atomics` package's own Python layer."""

    def load(self, address: int) -> int:
        return signed(_view(address).load())

    def store(self, address: int, value: int) -> None:
        _view(address).store(int(value) & _MASK)

    def exchange(self, address: int, value: int) -> int:
        return signed(_view(address).exchange(int(value) & _MASK))

    def cas(self, address: int, expected: int, desired: int) -> bool:
        return bool(_view(address).cmpxchg_strong(int(expected) & _MASK, int(desired) & _MASK).success)

    def fetch_add(self, address: int, value: int) -> int:
        return signed(_view(address).fetch_add(int(value) & _MASK))

    def fetch_and(self, address: int, mask: int) -> int:
        return signed(_view(address).bin_fetch_and(int(mask) & _MASK))

    def fetch_or(self, address: int, mask: int) -> int:
        return signed(_view(address).bin_fetch_or(int(mask) & _MASK))


_machine: Machine = _Package()


@contextlib.contextmanager
def interpreted_by(machine: Machine) -> Iterator[None]:
    """Have another machine carry out interpreted operations for the length of a block.

    A scheduler of simulated processes stands in between a kernel and memory this way. Compiled code is not affected.
    """
    global _machine  # noqa: PLW0603 - kernels are plain functions and find their machine here
    former, _machine = _machine, machine
    try:
        yield
    finally:
        _machine = former


@emitted_by(_load)
def load(address: int) -> int:
    """The word at `address`."""
    return _machine.load(address)


@emitted_by(_store)
def store(address: int, value: int) -> None:
    """Set the word at `address`."""
    _machine.store(address, value)


@emitted_by(_exchange)
def exchange(address: int, value: int) -> int:
    """Set the word at `address` and return what it was."""
    return _machine.exchange(address, value)


@emitted_by(_cas)
def cas(address: int, expected: int, desired: int) -> bool:
    """If the word at `address` is `expected`, make it `desired`; whether it was."""
    return _machine.cas(address, expected, desired)


@emitted_by(_fetch_add)
def fetch_add(address: int, value: int) -> int:
    """Add to the word at `address`, modulo 2^64, and return what it was."""
    return _machine.fetch_add(address, value)


@emitted_by(_fetch_and)
def fetch_and(address: int, mask: int) -> int:
    """And the word at `address` with `mask` and return what it was."""
    return _machine.fetch_and(address, mask)


@emitted_by(_fetch_or)
def fetch_or(address: int, mask: int) -> int:
    """Or the word at `address` with `mask` and return what it was."""
    return _machine.fetch_or(address, mask)


@emitted_by(_fetch_line)
def fetch_line(address: int) -> None:
    """Have the processor fetch the line of `address`, to change it soon: a hint, and no operation on the word.

    Locked operations wait for each other's lines one by one; lines that were asked for before come all at once.
    """


@emitted_by(_monotonic_ns)
def monotonic_ns() -> int:
    """CLOCK_MONOTONIC in nanoseconds: one clock for all processes of a host."""
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


@emitted_by(_cycle_count)
def cycle_count() -> int:
    """The processor's time-stamp counter (`shmroute.shared.stopwatch` says when it may be used); compiled only."""
    raise NotImplementedError("only compiled kernels read the time-stamp counter")


def _array(address: int, count: int, ctype: Any, dtype: Any) -> npt.NDArray[Any]:
    return np.frombuffer((ctype * int(count)).from_address(int(address)), dtype)


def i64_array(address: int, count: int) -> npt.NDArray[np.int64]:
    """Plain (not atomic) int64 [count] at `address`; for memory of this process, never for shared words."""
    return _array(address, count, ctypes.c_int64, np.int64)


def i32_array(address: int, count: int) -> npt.NDArray[np.int32]:
    """Plain int32 [count] at `address`."""
    return _array(address, count, ctypes.c_int32, np.int32)


def f64_array(address: int, count: int) -> npt.NDArray[np.float64]:
    """Plain float64 [count] at `address`."""
    return _array(address, count, ctypes.c_double, np.float64)


def f32_array(address: int, count: int) -> npt.NDArray[np.float32]:
    """Plain float32 [count] at `address`."""
    return _array(address, count, ctypes.c_float, np.float32)


@emitted_by(_address_of)
def address_of(array: npt.NDArray[Any]) -> int:
    """Where an array's first element is, signed as all words are: Numba has it unsigned."""
    return int(array.ctypes.data)


def _compile_array(function: Any, element: Any) -> None:
    """Make `function(address, count)` an array over that memory, in compiled code.

    Not by `numba.carray`, which is a function of its own to Numba: kernels are compiled without Numba's memory
    management (`shmroute.shared.kernel`), and there a function may not return an array.
    """
    array_type = types.Array(element, 1, "C")

    @type_callable(function)
    def typed(context: Any) -> Any:
        return lambda address, count: array_type

    @lower_builtin(function, types.Integer, types.Integer)
    def lowered(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address, count = (
            context.cast(builder, value, kind, types.intp) for value, kind in zip(args, signature.args, strict=True)
        )
        array = make_array(array_type)(context, builder)
        item_bytes = context.get_constant(types.intp, element.bitwidth // 8)
        populate_array(
            array, data=builder.inttoptr(address, array.data.type), shape=[count], strides=[item_bytes],
            itemsize=item_bytes, meminfo=None,
        )  # fmt: skip
        return array._getvalue()


_compile_array(i64_array, types.int64)
_compile_array(i32_array, types.int32)
_compile_array(f64_array, types.float64)
_compile_array(f32_array, types.float32)
