"""Counting the bits of a word, by the processor's own instructions.

Each function has two bodies, as in `shmroute.shared.atomic`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from shmroute.shared.emitted import emitted_by

_I64 = ir.IntType(64)
_TRUE = ir.Constant(ir.IntType(1), 1)


def _of_a_word(build: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """An emitter for one word, by what `build` makes of a builder and the word."""

    def emit(typingctx: Any, word: Any) -> Any:
        def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return build(builder, args[0])

        return types.int64(types.int64), body

    return emit


@emitted_by(_of_a_word(lambda builder, word: builder.ctpop(word)))
def count_bits(word: int) -> int:
    """How many bits of a word are set."""
    return (int(word) & (1 << 64) - 1).bit_count()


@emitted_by(_of_a_word(lambda builder, word: builder.cttz(word, _TRUE)))
def lowest_bit(word: int) -> int:
    """The position of the lowest bit that is set, of which there must be one."""
    word = int(word)
    return (word & -word).bit_length() - 1


@emitted_by(_of_a_word(lambda builder, word: builder.sub(ir.Constant(_I64, 64), builder.ctlz(word, _TRUE))))
def bit_length(word: int) -> int:
    """The bits that a positive number needs."""
    return int(word).bit_length()
