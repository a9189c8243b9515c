"""Other ways to get an expert's bytes from a checkpoint file into memory.

Each is made for a checkpoint and gives a function that fills `buffer` with one expert. All run in as many threads as
the pager has, and write into the same kind of memory: pages of ``/dev/shm`` that have been touched.

The kernel forgets no page that somebody has mapped. So for a cold page cache, what maps the file maps it anew for each
expert, and lets go of it afterwards.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import xxhash
from safetensors import safe_open

from shmroute.bench.checkpoints import Checkpoint

LoadInto = Callable[[int, memoryview], object]


def plain_reads(checkpoint: Checkpoint, cold: bool, resources: ExitStack) -> LoadInto:
    """``preadv`` straight into the memory, then xxh3: what a load cannot do without."""
    descriptor = os.open(checkpoint.path, os.O_RDONLY)
    resources.callback(os.close, descriptor)

    def load(expert: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            done += os.preadv(descriptor, [buffer[done:]], checkpoint.offset(expert) + done)
        xxhash.xxh3_64_intdigest(buffer)

    return load


def plain_reads_unchecked(checkpoint: Checkpoint, cold: bool, resources: ExitStack) -> LoadInto:
    """``preadv`` alone."""
    descriptor = os.open(checkpoint.path, os.O_RDONLY)
    resources.callback(os.close, descriptor)

    def load(expert: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            done += os.preadv(descriptor, [buffer[done:]], checkpoint.offset(expert) + done)

    return load


def mapped(checkpoint: Checkpoint, cold: bool, resources: ExitStack) -> LoadInto:
    """The file mapped, and copied out of the page cache."""

    def mapping() -> Any:
        with checkpoint.path.open("rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)

    kept = None if cold else mapping()

    def load(expert: int, buffer: memoryview) -> None:
        begin = checkpoint.offset(expert)
        whole = mapping() if kept is None else kept
        np.copyto(np.frombuffer(buffer, np.uint8), whole[begin : begin + checkpoint.expert_bytes])

    return load


def by_safe_open(checkpoint: Checkpoint, cold: bool, resources: ExitStack) -> LoadInto:
    """``safetensors.safe_open``: three arrays of its own, which are private to the process."""
    kept = None if cold else resources.enter_context(safe_open(checkpoint.path, "numpy"))

    def load(expert: int, buffer: memoryview) -> None:
        with ExitStack() as opened:
            file = kept or opened.enter_context(safe_open(checkpoint.path, "numpy"))
            for name in checkpoint.tensor_names(expert):
                file.get_tensor(name)

    return load


def by_fromfile(checkpoint: Checkpoint, cold: bool, resources: ExitStack) -> LoadInto:
    """``numpy.fromfile``: an array of its own, which is private to the process."""

    def load(expert: int, buffer: memoryview) -> None:
        np.fromfile(checkpoint.path, np.uint8, checkpoint.expert_bytes, offset=checkpoint.offset(expert))

    return load


PEERS: dict[str, Callable[[Checkpoint, bool, ExitStack], LoadInto]] = {
    "plain preadv + xxh3": plain_reads,
    "plain preadv, no checksum": plain_reads_unchecked,
    "mmap, copied out of the page cache": mapped,
    "safetensors.safe_open": by_safe_open,
    "numpy.fromfile": by_fromfile,
}
