"""The system calls by which a recording grows, callable from kernels: the thread that grows it needs no GIL.

Two bodies each, as in `shmroute.shared.atomic`: compiled, a call of libc's function; interpreted, the same by ctypes.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final

from llvmlite import ir
from numba import types
from numba.core import cgutils

from shmroute.shared.atomic import forget_views
from shmroute.shared.emitted import emitted_by

FAILED: Final = -1
"""Of `map_shared`: no address space, or not that much memory."""

_READ_WRITE: Final = 1 | 2
_SHARED: Final = 1
_MADV_POPULATE_WRITE: Final = 23  # Linux 5.14; before, the first write to a page costs its writer a fault

_I32, _I64 = ir.IntType(32), ir.IntType(64)
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_int64
_libc.mmap.argtypes = (ctypes.c_int64, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_libc.munmap.argtypes = (ctypes.c_int64, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_int64, ctypes.c_size_t, ctypes.c_int)
_libc.pthread_self.restype = ctypes.c_int64
_libc.posix_fallocate.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64)


def _call(builder: Any, name: str, result: Any, parameters: list[Any], arguments: list[Any]) -> Any:
    """A call of libc's function `name` with int64 arguments, each cut to its parameter's width."""
    function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, parameters), name)
    passed = [
        argument if parameter == _I64 else builder.trunc(argument, parameter)
        for argument, parameter in zip(arguments, parameters, strict=True)
    ]
    return builder.call(function, passed)


def _allocate_blocks(typingctx: Any, descriptor: Any, offset: Any, size: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sext(_call(builder, "posix_fallocate", _I32, [_I32, _I64, _I64], list(args)), _I64)

    return types.int64(types.int64, types.int64, types.int64), body


def _map_shared(typingctx: Any, descriptor: Any, offset: Any, size: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        descriptor, offset, size = args
        anywhere, protection, flags = (ir.Constant(_I64, value) for value in (0, _READ_WRITE, _SHARED))
        arguments = [anywhere, size, protection, flags, descriptor, offset]
        return _call(builder, "mmap", _I64, [_I64, _I64, _I32, _I32, _I32, _I64], arguments)

    return types.int64(types.int64, types.int64, types.int64), body


def _populate(typingctx: Any, address: Any, size: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        arguments = [*args, ir.Constant(_I64, _MADV_POPULATE_WRITE)]
        return builder.sext(_call(builder, "madvise", _I32, [_I64, _I64, _I32], arguments), _I64)

    return types.int64(types.int64, types.int64), body


def _unmap(typingctx: Any, address: Any, size: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sext(_call(builder, "munmap", _I32, [_I64, _I64], list(args)), _I64)

    return types.int64(types.int64, types.int64), body


def _pause(typingctx: Any, microseconds: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sext(_call(builder, "usleep", _I32, [_I32], list(args)), _I64)

    return types.int64(types.int64), body


def _thread_id(typingctx: Any) -> Any:
    def body(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _call(builder, "pthread_self", _I64, [], [])

    return types.int64(), body


@emitted_by(_allocate_blocks)
def allocate_blocks(descriptor: int, offset: int, size: int) -> int:
    """Have the disk promise a file's blocks, so that no write to them can fail; 0, or an errno."""
    return int(_libc.posix_fallocate(descriptor, offset, size))


@emitted_by(_map_shared)
def map_shared(descriptor: int, offset: int, size: int) -> int:
    """Map part of a file for reading and writing; the address, or FAILED."""
    return int(_libc.mmap(0, size, _READ_WRITE, _SHARED, descriptor, offset))


@emitted_by(_populate)
def populate(address: int, size: int) -> int:
    """Have mapped pages ready to be written; not 0 if the system cannot, which only costs time later."""
    return int(_libc.madvise(address, size, _MADV_POPULATE_WRITE))


@emitted_by(_unmap)
def unmap(address: int, size: int) -> int:
    """Undo `map_shared`."""
    forget_views(address, size)
    return int(_libc.munmap(address, size))


@emitted_by(_pause)
def pause(microseconds: int) -> int:
    """Sleep, at most a second."""
    return int(_libc.usleep(microseconds))


@emitted_by(_thread_id)
def thread_id() -> int:
    """This thread's id (``pthread_self``); one that has ended may leave its id to another."""
    return int(_libc.pthread_self())
