"""Compiling some kernels in a process beside this one: the first start of a version takes half as long on two cores.

That process keeps what it compiles on disk, where this one finds it. If it fails or is killed, this one compiles all
itself, so nothing depends on it.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Final

ELSEWHERE: Final = ("shmroute.routing.entry", "shmroute.routing.general")
"""Modules whose kernels take about as long as all others together."""


@contextmanager
def compiling_elsewhere(kernels: Sequence[str]) -> Iterator[subprocess.Popen[bytes] | None]:
    """Have kernels, each ``module:function``, compiled by another process, which ends with the block at the latest.

    Gives None if there are none, or no second core for it.
    """
    if not kernels or len(os.sched_getaffinity(0)) < 2 or not sys.executable:
        yield None
        return
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    command = [sys.executable, "-m", __name__, *kernels]
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def main(kernels: Sequence[str]) -> None:
    """Compile kernels and keep them on disk."""
    from shmroute.shared.kernel import compile_kernel  # noqa: PLC0415 - which imports this file

    for kernel in kernels:
        module, _, name = kernel.partition(":")
        compile_kernel(getattr(importlib.import_module(module), name))


if __name__ == "__main__":
    main(sys.argv[1:])
