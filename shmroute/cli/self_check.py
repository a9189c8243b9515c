"""What `shmroute doctor` checks of this installation: the kernels, their cache on disk, and the atomic operations."""

from __future__ import annotations

import contextlib
import re
import shutil
import threading
from pathlib import Path

import numba
import numpy as np

from shmroute.cli.checks import OK, PROBLEM, WARNING, Check
from shmroute.cli.output import human_bytes
from shmroute.shared.atomic import (
    COMPILED,
    WORD,
    cas,
    exchange,
    fetch_add,
    fetch_and,
    fetch_or,
    forget_views,
    load,
    store,
)
from shmroute.shared.kernel import STAMP, cache_directory, kernel_count
from shmroute.shared.layout import CONSTANTS, compiled_constants
from shmroute.shared.metrics import add

ROUNDS = 500_000 if COMPILED else 1_000
"""Additions of each thread. Compiled they take milliseconds, long enough for the threads to meet."""

OPERATIONS = ("store and load", "exchange", "cas that fails", "cas", "fetch_add", "fetch_and", "fetch_or")


def each_operation(cell: int) -> int:
    """Try each operation on a private word: 0, or the number of the first in `OPERATIONS` that was wrong."""
    high = -(1 << 62)
    store(cell, 5)
    if load(cell) != 5:
        return 1
    if exchange(cell, high) != 5 or load(cell) != high:
        return 2
    if cas(cell, 6, 7) or load(cell) != high:
        return 3
    if not cas(cell, high, 9) or load(cell) != 9:
        return 4
    if fetch_add(cell, -10) != 9 or load(cell) != -1:
        return 5
    if fetch_and(cell, ~6) != -1 or load(cell) != ~6:
        return 6
    if fetch_or(cell, 2) != ~6 or load(cell) != ~4:
        return 7
    return 0


def hammer(added: int, swapped: int, rounds: int) -> None:
    """Add 1 to two words, `rounds` times each: to one by `fetch_add`, to the other by `cas`."""
    for _ in range(rounds):
        add(added, 1)
        word = load(swapped)
        while not cas(swapped, word, word + 1):
            word = load(swapped)


def check_kernels() -> Check:
    """Whether the compiled kernels are those of the Python code."""
    if not COMPILED:
        return Check("kernels", WARNING, "interpreted: NUMBA_DISABLE_JIT is set", "unset it; this is for tests only")
    if compiled_constants() != CONSTANTS:
        return Check(
            "kernels",
            PROBLEM,
            "the compiled kernels have other constants than the Python code",
            f"remove their cache: rm -r {cache_directory()}",
        )
    return Check("kernels", OK, f"{kernel_count()} compiled, constants as in the Python code")


def check_atomics() -> Check:
    """Whether the atomic operations do what they should, alone and under contention."""
    # Not kernels: those are cached under a hash of files to which this one does not belong.
    compiled = numba.njit(nogil=True)
    operations, pound = compiled(each_operation), compiled(hammer)
    cells = np.zeros(2, np.int64)
    first, second = cells.ctypes.data, cells.ctypes.data + WORD
    remedy = "reinstall the atomics package (pip install --force-reinstall atomics); this machine must not run shmroute"
    wrong = operations(first)
    if wrong:
        forget_views(first, cells.nbytes)
        return Check("atomics", PROBLEM, f"{OPERATIONS[wrong - 1]} gave a wrong result", remedy)
    cells[:] = 0
    pound(first, second, 0)  # compiled before the threads start, so that they run at the same time
    threads = [threading.Thread(target=pound, args=(first, second, ROUNDS)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    forget_views(first, cells.nbytes)
    counts, expected = cells.tolist(), len(threads) * ROUNDS
    if counts != [expected, expected]:
        lost = f"two threads counted to {counts[0]} by fetch_add and {counts[1]} by cas, not {expected}"
        return Check("atomics", PROBLEM, lost, remedy)
    return Check("atomics", OK, f"all {len(OPERATIONS)} right; two threads counted to {expected} without a loss")


# ------------------------------------------------------------------ cache


def stale_caches() -> list[Path]:
    """Kernel caches of other versions of the sources."""
    return sorted(
        path
        for path in cache_directory().parent.glob("*")
        if path.name != STAMP and re.fullmatch(r"[0-9a-f]{24}", path.name) and path.is_dir() and not path.is_symlink()
    )


def _size(directory: Path) -> int:
    total = 0
    for path in directory.glob("*"):
        with contextlib.suppress(FileNotFoundError):  # others compile and clean up at the same time
            total += path.lstat().st_size
    return total


def check_cache(fix: bool) -> Check:
    """The kernels' cache on disk; `fix` removes those of other versions."""
    here = cache_directory()
    detail = f"{here}, {human_bytes(_size(here))}"
    stale = stale_caches()
    if not stale:
        return Check("kernel cache", OK, detail)
    size = human_bytes(sum(map(_size, stale)))
    if fix:
        for directory in stale:
            shutil.rmtree(directory, ignore_errors=True)  # another doctor may be at it
        if left := stale_caches():
            remedy = f"remove them by hand: {here.parent}"
            return Check(
                "kernel cache", WARNING, f"{detail}; {len(left)} of other versions could not be removed", remedy
            )
        return Check("kernel cache", OK, f"{detail}; removed {len(stale)} of other versions ({size})")
    return Check("kernel cache", WARNING, f"{detail}; {len(stale)} of other versions ({size})", "shmroute doctor --fix")
