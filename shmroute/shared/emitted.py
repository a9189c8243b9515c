"""Functions that kernels call and that Numba could not compile: their compiled body is emitted by hand.

Numba's own way is an intrinsic and an `overload` that calls it: one more function to compile for each such function and
set of argument types, which was a tenth of a first start. Here the function itself is typed and lowered as an intrinsic
is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from llvmlite import ir
from numba import types
from numba.core.typing.templates import infer_global, make_intrinsic_template

F = TypeVar("F", bound=Callable[..., Any])


def emitted_by(emitter: Callable[..., Any]) -> Callable[[F], F]:
    """Make a call to a function, in compiled code, what another one emits; from Python it runs as it is.

    Parameters
    ----------
    emitter : callable
        As for `numba.extending.intrinsic`: called with the typing context and the arguments' types, it gives the
        signature, and a function that builds LLVM's instructions.
    """

    def decorate(function: F) -> F:
        template = make_intrinsic_template(function, emitter, function.__name__, prefer_literal=False, kwargs={})
        infer_global(function, types.Function(template))
        return function

    return decorate


def call_at(typingctx: Any, address: Any, one: Any, two: Any, three: Any, four: Any, five: Any) -> Any:
    """The emitter of a call of the C function at an address, from five words to one."""
    word = ir.IntType(64)

    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = builder.inttoptr(args[0], ir.FunctionType(word, [word] * 5).as_pointer())
        return builder.call(function, args[1:])

    return types.int64(*[types.int64] * 6), body
