"""Functions that kernels call, compiled as parts: once in a process, and only to be linked into kernels.

By itself Numba makes a library of each function that compiled code calls, optimises it and makes machine code of it,
links it into every caller, and there does the same again, once more for each level of calls. It also compiles a
function anew for each set of compiler options that its callers happen to have. Nobody runs that machine code: Python
runs these functions as they are, and kernels hold copies. That was most of the time of a first start.

Here a function is compiled once for each set of argument types, and stays LLVM's intermediate code. Where all of it
has come together, in a kernel, it is optimised as a whole and becomes machine code. What was linked in is private
there, so that LLVM pastes in what has one caller, and drops what is left unused.

By Numba's own means: a compiler pipeline that brings its library along. Numba's own functions and overloads are
compiled as ever.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import numba
from llvmlite.binding import Linkage
from numba import _dynfunc, types
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import CompilerBase, DefaultPassBuilder
from numba.core.compiler_machinery import LoweringPass, register_pass
from numba.core.typed_passes import IRLegalization, NativeLowering
from numba.core.typing.templates import infer_global
from numba.extending import models, register_model


class Placing(Enum):
    """How a part gets into its callers."""

    AS_LLVM_LIKES = 0
    PASTED = 1
    CALLED = 2


class PartLibrary(JITCodeLibrary):  # type: ignore[misc]
    """A part's intermediate code, neither optimised as a whole nor given to the engine that makes machine code."""

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True


class CalledPartLibrary(PartLibrary):
    """That of a part which is never pasted into its callers."""

    def _optimize_functions(self, module: Any) -> None:
        for function in module.functions:
            if not function.is_declaration:
                function.add_function_attribute("noinline")
        super()._optimize_functions(module)


class KernelLibrary(JITCodeLibrary):  # type: ignore[misc]
    """A kernel's code, to which the parts linked into it are private.

    LLVM changes how such a function is called where that is cheaper, leaves out arguments that it does not use, say. So
    nobody else may call it. With "internal" linkage it would still have a name in the object, and LLVM's loader has one
    table of names for all objects: another function's call to the part of that name would end here.
    """

    def _optimize_final_module(self) -> None:
        for function in self._final_module.functions:
            if not function.is_declaration and function.linkage == Linkage.linkonce_odr:
                function.linkage = Linkage.private
        super()._optimize_final_module()


@register_pass(mutates_CFG=False, analysis_only=False)
class _TakeLibrary(LoweringPass):  # type: ignore[misc]
    """Give lowering a library of the pipeline's class."""

    _name = "shmroute_take_library"

    def __init__(self) -> None:
        super().__init__()

    def run_pass(self, state: Any) -> bool:
        state.library = state.pipeline.library(state.targetctx.codegen(), state.func_id.func_qualname)
        state.library.enable_object_caching()  # before anything is added, as Numba does
        return True


@register_pass(mutates_CFG=False, analysis_only=False)
class _StopShort(LoweringPass):  # type: ignore[misc]
    """Have lowering stop before machine code."""

    _name = "shmroute_stop_short"

    def __init__(self) -> None:
        super().__init__()

    def run_pass(self, state: Any) -> bool:
        state.flags.no_compile = True
        return True


@register_pass(mutates_CFG=False, analysis_only=False)
class _MakeKnown(LoweringPass):  # type: ignore[misc]
    """Let callers find the part: Numba knows compiled functions by an object that Python could call."""

    _name = "shmroute_make_known"

    def __init__(self) -> None:
        super().__init__()

    def run_pass(self, state: Any) -> bool:
        lowered = state["cr"]
        description = lowered.fndesc
        # As Numba makes it of an overload, with no address to call: there is no machine code, nor a wrapper for it.
        entry = _dynfunc.make_function(
            description.lookup_module(), description.qualname.split(".")[-1], "", 0, lowered.env, (state.library,)
        )
        state.targetctx.insert_user_function(entry, description, [state.library])
        state["cr"] = lowered._replace(cfunc=entry)
        return True


class KernelCompiler(CompilerBase):  # type: ignore[misc]
    """The compiler pipeline of kernels: a `pipeline_class` of `numba.jit`."""

    library: type[JITCodeLibrary] = KernelLibrary

    def define_pipelines(self) -> list[Any]:
        passes = DefaultPassBuilder.define_nopython_pipeline(self.state)
        passes.add_pass_after(_TakeLibrary, IRLegalization)
        self._add(passes)
        passes.finalize()
        return [passes]

    def _add(self, passes: Any) -> None:
        """Add what else there is to do."""


class PartCompiler(KernelCompiler):
    """That of parts."""

    library = PartLibrary

    def _add(self, passes: Any) -> None:
        passes.add_pass_after(_StopShort, IRLegalization)
        passes.add_pass_after(_MakeKnown, NativeLowering)


class CalledPartCompiler(PartCompiler):
    """That of parts which are never pasted."""

    library = CalledPartLibrary


class PartType(types.Dispatcher):  # type: ignore[misc]
    """The type of a part in compiled code."""

    def __init__(self, dispatcher: Any) -> None:
        super().__init__(dispatcher)
        self.kept = dispatcher  # which nothing else refers to

    def get_call_type(self, context: Any, args: Any, kws: Any) -> Any:
        """A constant argument has no version of the part for itself."""
        plain = {name: types.unliteral(kind) for name, kind in kws.items()}
        return super().get_call_type(context, [types.unliteral(kind) for kind in args], plain)


# As Numba's own dispatchers have it; functions with memory management ask.
register_model(PartType)(models.OpaqueModel)


def compile_as_part(function: Callable[..., Any], placing: Placing) -> PartType:
    """Make a call to a plain function, in compiled code, a call to its part; Python is not concerned.

    All options are set, so that none is taken from a caller.
    """
    compiler = CalledPartCompiler if placing is Placing.CALLED else PartCompiler
    dispatcher = numba.njit(
        no_cpython_wrapper=True, no_cfunc_wrapper=True, _nrt=False, forceinline=placing is Placing.PASTED,
        pipeline_class=compiler,
    )(function)  # fmt: skip
    part = PartType(dispatcher)
    infer_global(function, part)
    return part
