"""Compiling kernels in two processes at once: the first start of a version takes half as long on two cores.

The work is a list. This process takes it from the front, the one beside it from the back, and each keeps what it
compiles on disk and leaves out what it finds there. So they meet wherever their speeds have it, at the cost of no more
than one kernel that both compile, and if the other process fails or is killed, this one compiles all.

Kernels that share much of what they call are neighbours, since each process compiles a shared function for itself; at
both ends are those that take longest, and in the middle, where the two meet, are short ones.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

FRONT: Final = ("shmroute.routing.route", "shmroute.routing.publication", "shmroute.routing.entry")
"""Modules with the kernels that route: they share nearly everything."""
BACK: Final = ("shmroute.pager.", "shmroute.pager.prefetch.", "shmroute.pager.eviction.", "shmroute.routing.general")
"""Of the rest, those that take longest, by how the names of their modules begin: the longer the further back."""


def in_order(kernels: Iterable[Any]) -> list[Any]:
    """Entry points in the order in which one process compiles them, and the other one backwards."""

    def place(kernel: Any) -> int:
        module = kernel.py_func.__module__
        if module in FRONT:
            return FRONT.index(module) - len(FRONT)
        return max((1 + i for i, begin in enumerate(BACK) if module.startswith(begin)), default=0)

    return sorted(kernels, key=place)


@contextmanager
def compiling_elsewhere(kernels: Sequence[Any]) -> Iterator[subprocess.Popen[bytes] | None]:
    """Have entry points compiled by another process too, from the last one on; it ends with the block at the latest.

    Gives None if there are fewer than two, or no second core for it.
    """
    if len(kernels) < 2 or len(os.sched_getaffinity(0)) < 2 or not sys.executable:
        yield None
        return
    names = [f"{kernel.py_func.__module__}:{kernel.py_func.__name__}" for kernel in reversed(kernels)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    command = [sys.executable, "-m", __name__, *names]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def main(names: Sequence[str]) -> None:
    """Compile entry points, each ``module:function``, and keep them on disk, but for those that are there by then."""
    from shmroute.shared.kernel import collection_paused, compile_unless_cached  # noqa: PLC0415 - it imports this file

    with collection_paused():
        for name in names:
            module, _, function = name.partition(":")
            compile_unless_cached(getattr(importlib.import_module(module), function))


if __name__ == "__main__":
    main(sys.argv[1:])
