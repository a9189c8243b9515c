"""The one decorator by which a plain function becomes a kernel, and the cache of its machine code.

A *kernel* touches shared words through `shmroute.shared.atomic` and nothing else: it holds no Python objects,
allocates nothing and raises nothing, it returns codes. Compiled, it runs without the GIL; interpreted
(``NUMBA_DISABLE_JIT=1``), it is the same function as plain Python.

`kernel` marks an entry point that Python calls: it has one explicit signature, is compiled by `load_kernels`, and is
kept on disk. `inner`, `inlined` and `called` mark functions that kernels call (`shmroute.shared.parts`); called from
Python each runs as the plain function it is.

Numba's own cache asks only whether the *file of the kernel* changed, so a constant edited in another file would go
on living in stale machine code, next to processes with the new one. Here the cache directory is named by a hash of
every source file from which kernels are made and of the versions of everything that compiles them.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import platform
import signal
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import numba
from numba.core.caching import CompileResultCacheImpl, FunctionCache, _CacheLocator

from shmroute.errors import KernelCacheError
from shmroute.shared.atomic import COMPILED
from shmroute.shared.compilation import compiling_elsewhere, in_order
from shmroute.shared.parts import KernelCompiler, Placing, compile_as_part

PACKAGE = Path(__file__).resolve().parent.parent
KERNEL_PACKAGES = ("shared", "routing", "pager", "recording", "replay", "evaluation")
"""The sub-packages whose files, at any depth, hold kernels, or constants that kernels compile in."""

F = TypeVar("F", bound=Callable[..., Any])


def source_stamp() -> str:
    """Hex digest of all kernel sources and of what compiles them."""
    digest = hashlib.sha256()
    for package in KERNEL_PACKAGES:
        for path in sorted((PACKAGE / package).rglob("*.py")):
            digest.update(path.relative_to(PACKAGE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    for name in ("numba", "llvmlite", "atomics", "numpy"):
        digest.update(f"{name}={version(name)};".encode())
    digest.update(platform.python_version().encode())
    return digest.hexdigest()[:24]


STAMP = source_stamp()


def cache_directory() -> Path:
    """Where this version's machine code is kept: under ``SHMROUTE_CACHE_DIR`` or the user's cache directory."""
    root = os.environ.get("SHMROUTE_CACHE_DIR") or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "shmroute"
    )
    return Path(root) / "kernels" / STAMP


class _StampedLocator(_CacheLocator):  # type: ignore[misc]
    """Tells Numba's cache where, and that nothing in there is ever stale: the directory's name sees to that."""

    def __init__(self, py_func: Any, py_file: str) -> None:
        self._directory = cache_directory()

    def get_cache_path(self) -> str:
        return str(self._directory)

    def get_source_stamp(self) -> str:
        return STAMP

    def get_disambiguator(self) -> str:
        return ""

    @classmethod
    def from_function(cls, py_func: Any, py_file: str) -> _StampedLocator:
        locator = cls(py_func, py_file)
        if not locator._directory.is_dir():  # one that is there may be read-only, and still serve
            locator.ensure_cache_path()
        return locator


class _StampedCacheImpl(CompileResultCacheImpl):  # type: ignore[misc]
    _locator_classes = (_StampedLocator,)


class _StampedCache(FunctionCache):  # type: ignore[misc]
    _impl_class = _StampedCacheImpl


_entries: list[tuple[Any, Any]] = []
"""Every entry point with its signature, in the order of definition."""


def kernel(signature: Any) -> Callable[[F], F]:
    """Make a function an entry point: one signature, no GIL, machine code kept on disk.

    Parameters
    ----------
    signature : numba signature
        Integers are int64, floats float64, arrays C-contiguous.
    """

    def decorate(function: F) -> F:
        if not COMPILED:
            return function
        # Without Numba's memory management a kernel cannot allocate, and taking an array argument costs no heap cell.
        dispatcher = numba.njit(nogil=True, _nrt=False, pipeline_class=KernelCompiler)(function)
        _entries.append((dispatcher, signature))
        return dispatcher  # type: ignore[no-any-return]

    return decorate


def inner(function: F) -> F:
    """Make a function callable from kernels: compiled into each of them, not kept by itself."""
    return _part(function, Placing.AS_LLVM_LIKES)


def inlined(function: F) -> F:
    """`inner`, and pasted into its callers: for what runs for each token, and with constants for arguments."""
    return _part(function, Placing.PASTED)


def called(function: F) -> F:
    """`inner`, and never pasted: for a loop that wants the vector registers which a caller's values would take."""
    return _part(function, Placing.CALLED)


def _part(function: F, placing: Placing) -> F:
    if COMPILED:
        compile_as_part(function, placing)
    return function


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Have signals that Python handles wait for the end of a block in which something is compiled.

    LLVM calls Python back meanwhile, and what is raised there is dropped: Ctrl-C would be lost and leave half a kernel,
    with which the process ends in an error of Numba's or is aborted.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread
        return
    arrived: list[int] = []
    former = {
        number: signal.signal(number, lambda number, frame: arrived.append(number))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if callable(signal.getsignal(number))
    }
    try:
        yield
    finally:
        for number, action in former.items():
            signal.signal(number, action)
        for late in arrived:
            signal.raise_signal(late)


@contextlib.contextmanager
def collection_paused() -> Iterator[None]:
    """Have garbage collection wait for the end of a block that makes very many objects which stay.

    Going over them again and again took a quarter of the time in which kernels are found on disk.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _cache_errors_named() -> Iterator[None]:
    """Turn what the file system refuses in a block into `KernelCacheError`."""
    try:
        yield
    except OSError as error:
        raise KernelCacheError(
            f"compiled kernels cannot be kept in {cache_directory()} ({error.strerror}): make it a directory that "
            f"this user may write to, or set SHMROUTE_CACHE_DIR to one"
        ) from error


@collection_paused()
def load_kernels(progress: Callable[[int, int, str], None] | None = None) -> int:
    """Make every entry point ready: from disk, or compiled and then kept there.

    Parameters
    ----------
    progress : callable, optional
        Called as ``progress(done, total, name)`` before each kernel that must be compiled, and after the last.

    Returns
    -------
    int
        Kernels that were compiled rather than found.

    Raises
    ------
    KernelCacheError
        If the directory for compiled kernels cannot be used.
    """
    waiting = [dispatcher for dispatcher, _ in _entries if not dispatcher.signatures]
    with _cache_errors_named():
        for dispatcher in waiting:
            dispatcher._cache = _StampedCache(dispatcher.py_func)
    missing = in_order([dispatcher for dispatcher in waiting if not _is_cached(dispatcher)])
    done = len(_entries) - len(missing)
    with compiling_elsewhere(missing):
        for dispatcher in missing:
            if progress is not None:
                progress(done, len(_entries), dispatcher.py_func.__name__)
            done += 1
            compile_kernel(dispatcher)  # unless it has come to be on disk by now
    for dispatcher in waiting:
        if dispatcher not in missing:
            compile_kernel(dispatcher)
    if progress is not None and missing:
        progress(len(_entries), len(_entries), "")
    return len(missing)


def compile_kernel(dispatcher: Any) -> None:
    """Make one entry point ready, from disk if it is there.

    Raises
    ------
    KernelCacheError
        If the directory for compiled kernels cannot be used.
    """
    (signature,) = [signature for one, signature in _entries if one is dispatcher]
    with _cache_errors_named(), signals_held():
        dispatcher._cache = _StampedCache(dispatcher.py_func)
        dispatcher.compile(signature)
    # From here an argument of another type is an error at once, never a silent compilation of seconds.
    dispatcher.disable_compile()


def compile_unless_cached(dispatcher: Any) -> None:
    """Have one entry point's machine code on disk.

    Raises
    ------
    KernelCacheError
        If the directory for compiled kernels cannot be used.
    """
    with _cache_errors_named():
        dispatcher._cache = _StampedCache(dispatcher.py_func)
    if not _is_cached(dispatcher):
        compile_kernel(dispatcher)


def c_function(dispatcher: Any) -> int:
    """Address of an entry point as a C function of its signature; `load_kernels` must have run."""
    (overload,) = dispatcher.overloads.values()
    return int(overload.library.get_pointer_to_function(overload.fndesc.llvm_cfunc_wrapper_name))


def _is_cached(dispatcher: Any) -> bool:
    return Path(dispatcher._cache._cache_file._index_path).exists()


def kernel_count() -> int:
    """How many entry points there are; 0 when kernels are interpreted."""
    return len(_entries)
