"""Parts: functions that kernels call are compiled once, only to be linked into kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from numba import types
from numba.core.typing.templates import builtin_registry

from shmroute.shared.atomic import COMPILED, address_of, i64_array
from shmroute.shared.kernel import _entries, called, compile_kernel, inlined, inner, kernel
from shmroute.shared.parts import CalledPartLibrary, KernelLibrary, PartLibrary, PartType

pytestmark = pytest.mark.skipif(not COMPILED, reason="interpreted kernels have no parts")


@inner
def _deepest(value: int, factor: int) -> int:
    return value * factor + 1


@inlined
def _pasted(value: int) -> int:
    return _deepest(value, 2)


@called
def _apart(at: int, count: int) -> int:
    numbers = i64_array(at, count)
    total = 0
    for i in range(count):
        total += numbers[i] ^ i
    return total


@kernel(types.int64(types.int64[::1], types.int64))
def _whole(numbers: npt.NDArray[np.int64], value: int) -> int:
    at = address_of(numbers)
    return _pasted(value) + _deepest(value, 3) + _apart(at, len(numbers)) + _apart(at, 1)


_ENTRY = _entries.pop() if COMPILED else None  # it is no kernel of the package's


def part_of(function: object) -> PartType:
    """What a call to a function is in compiled code."""
    (part,) = (kind for value, kind in builtin_registry.globals if value is function)
    assert isinstance(part, PartType)
    return part


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> KernelLibrary:
    """The kernel's library, compiled."""
    folder: Path = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHMROUTE_CACHE_DIR", str(folder))
        _entries.append(_ENTRY)
        try:
            compile_kernel(_whole)
        finally:
            del _entries[-1]
    (result,) = _whole.overloads.values()
    assert isinstance(result.library, KernelLibrary)
    return result.library


def test_compiled_and_plain_functions_agree(whole: KernelLibrary) -> None:
    numbers = np.arange(5, 50, 7)
    assert _whole(numbers, 11) == _whole.py_func(numbers, 11)
    assert _deepest(4, 5) == 21  # Python runs it as it is


def test_a_part_is_compiled_once_for_all_its_callers_and_constants(whole: KernelLibrary) -> None:
    for function in (_deepest, _pasted, _apart):
        dispatcher = part_of(function).dispatcher
        assert len(dispatcher.overloads) == 1
        assert sum(dispatcher.stats.cache_misses.values()) == 1


def test_a_part_has_no_machine_code_of_its_own(whole: KernelLibrary) -> None:
    for function, kind in ((_deepest, PartLibrary), (_pasted, PartLibrary), (_apart, CalledPartLibrary)):
        (result,) = part_of(function).dispatcher.overloads.values()
        assert type(result.library) is kind
        with pytest.raises(RuntimeError, match="no compiled object"):
            result.library._get_compiled_object()
    assert len(whole._get_compiled_object()) > 0


def test_parts_are_private_to_the_kernel_and_called_ones_stay_calls(whole: KernelLibrary) -> None:
    defined = [function for function in whole.get_defined_functions() if not function.is_declaration]
    parts = {name: [one for one in defined if name in one.name] for name in ("_deepest", "_pasted", "_apart")}
    assert parts["_deepest"] == parts["_pasted"] == []
    (apart,) = parts["_apart"]
    assert apart.linkage.name == "private"


def test_another_compiled_function_does_not_end_in_a_kernels_copy_of_a_part(tmp_path: Path) -> None:
    # In the kernel's copy arguments are left out, which the other's call passes: in a process that may crash.
    program = tmp_path / "program.py"
    program.write_text("""
import numba
import numpy as np
from numba import types
from shmroute.shared.atomic import i64_array
from shmroute.shared.kernel import called, compile_kernel, kernel

@called
def weighted_sum(at, count, weight):
    numbers = i64_array(at, count)
    total = 0
    for i in range(count):
        total += numbers[i] * weight
    return total

@kernel(types.int64(types.int64))
def in_a_kernel(at):
    return weighted_sum(at, 4, 2) + weighted_sum(at, 3, 2)

compile_kernel(in_a_kernel)

@numba.njit(types.int64(types.int64))
def elsewhere(at):
    return weighted_sum(at, 4, 3) + weighted_sum(at, 3, 3)

numbers = np.arange(4)
print(in_a_kernel(numbers.ctypes.data), elsewhere(numbers.ctypes.data))
""")
    environment = os.environ | {"SHMROUTE_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["18", "27"]
