"""Growing a recording ahead of its writers, in a thread that needs neither lock nor GIL.

It looks a few hundred times a second how far the writers are, has the disk promise blocks for some chunks more, maps
them, and unmaps those that are full. A writer in a tight loop of Python keeps the GIL for 5 ms at a time, and growing
takes several system calls: with the GIL in between it would come too late.

Chunks are unmapped in order, each once all its records are committed. A thread that is stopped in the middle of a
record so keeps its chunk, and all that follow; when the table of chunks is full, records are dropped until it goes on.
"""

from __future__ import annotations

import errno
from typing import Final

from numba import types

from shmroute.recording import append as a
from shmroute.recording import records as r
from shmroute.recording.system import FAILED, allocate_blocks, map_shared, pause, populate, unmap
from shmroute.shared.atomic import WORD, i64_array, load, store
from shmroute.shared.kernel import inner, kernel

CHUNKS_AHEAD: Final = 4
"""Chunks that are ready before they are needed, at least: 65,536 records. Twice what was used since the last look, if
that is more."""

LOOK_EVERY_US: Final = 5_000

NO_MEMORY: Final = errno.ENOMEM


@inner
def offer_chunk(recorder: int, chunk: int, address: int) -> None:
    """Let writers use the chunk that comes next, mapped at an address."""
    store(recorder + (a.CHUNK_TABLE + (chunk & (a.TABLE_CHUNKS - 1))) * WORD, address)
    store(recorder + a.READY * WORD, (chunk + 1) << a.CHUNK_BITS)  # linearization point


@inner
def is_committed(chunk: int, first: int, record_bytes: int) -> bool:
    """Whether all records of a chunk are committed, whose first is number `first`."""
    i = 0
    while i < a.CHUNK_RECORDS and load(chunk + i * record_bytes + r.COMMIT * WORD) == first + i + 1:
        i += 1
    return i == a.CHUNK_RECORDS


@kernel(types.int64(types.int64))
def grow(recorder: int) -> int:
    """Let full chunks go, and have enough that are ready; 0, or the errno that says why there are no more.

    Only one thread at a time may call this.
    """
    words = i64_array(recorder, a.RECORDER_WORDS)
    chunk_bytes = words[a.RECORD_BYTES] << a.CHUNK_BITS
    reserved = load(words[a.HEADER] + r.HEADER_NEXT * WORD)
    current = reserved >> a.CHUNK_BITS
    while words[a.OLDEST] < current:
        oldest = words[a.OLDEST]
        address = words[a.CHUNK_TABLE + (oldest & (a.TABLE_CHUNKS - 1))]
        if not is_committed(address, oldest << a.CHUNK_BITS, words[a.RECORD_BYTES]):
            break
        words[a.OLDEST] = oldest + 1  # first: should the process fork now, its child must not unmap what is gone
        unmap(address, chunk_bytes)
    used = (reserved - words[a.RESERVED_BEFORE]) >> a.CHUNK_BITS
    words[a.RESERVED_BEFORE] = reserved
    wanted = min(current + max(CHUNKS_AHEAD, 2 * used) + 1, words[a.OLDEST] + a.TABLE_CHUNKS)
    while words[a.FOLLOWING] < wanted:
        offset = words[a.HEADER_BYTES] + words[a.FOLLOWING] * chunk_bytes
        code = allocate_blocks(words[a.DESCRIPTOR], offset, chunk_bytes)
        if code != 0:
            return code
        address = map_shared(words[a.DESCRIPTOR], offset, chunk_bytes)
        if address == FAILED:
            return NO_MEMORY
        populate(address, chunk_bytes)
        offer_chunk(recorder, words[a.FOLLOWING], address)
        words[a.FOLLOWING] += 1
    return 0


@kernel(types.int64(types.int64))
def keep_growing(recorder: int) -> int:
    """`grow` again and again, until ENDED is set, or it fails: 0, or its errno."""
    while load(recorder + a.ENDED * WORD) == 0:
        code = grow(recorder)
        if code != 0:
            return code
        pause(LOOK_EVERY_US)
    return 0
