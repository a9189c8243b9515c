"""Counting the bits of a word, by the processor's own instructions.

Each function has two bodies, as in `shmroute.shared.atomic`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

_I64 = ir.IntType(64)
_TRUE = ir.Constant(ir.IntType(1), 1)


def count_bits(word: int) -> int:
    """How many bits of a word are set."""
    return (int(word) & (1 << 64) - 1).bit_count()


def lowest_bit(word: int) -> int:
    """The position of the lowest bit that is set, of which there must be one."""
    word = int(word)
    return (word & -word).bit_length() - 1


def bit_length(word: int) -> int:
    """The bits that a positive number needs."""
    return int(word).bit_length()


def _compile(function: Callable[[int], int], build: Callable[[Any, Any], Any]) -> None:
    """In compiled code a call to `function` is what `build` emits."""

    @intrinsic
    def emitted(typingctx: Any, word: Any) -> Any:
        def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return build(builder, args[0])

        return types.int64(types.int64), body

    overload(function, jit_options={"forceinline": True})(lambda word: lambda word: emitted(word))


_compile(count_bits, lambda builder, word: builder.ctpop(word))
_compile(lowest_bit, lambda builder, word: builder.cttz(word, _TRUE))
_compile(bit_length, lambda builder, word: builder.sub(ir.Constant(_I64, 64), builder.ctlz(word, _TRUE)))
