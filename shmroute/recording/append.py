"""The kernels that append records: no lock, no system call, no allocation.

A process's recorder is a block of private words, whose address the plans of its routers hold; 0 there means that
nothing is recorded, and costs a branch. Behind it is a file, mapped chunk by chunk (`shmroute.recording.grow`).

| word | meaning | written by |
|---|---|---|
| header's NEXT | records reserved | any thread, by CAS: the linearization point of a reservation |
| READY | records that there is room for, mapped | the growing thread only; never falls |
| chunk table | address of chunk c, at c modulo the table's length | the growing thread, before READY covers the chunk |
| a record's words | see `records` | who reserved it, COMMIT last |

A chunk is unmapped once all its records are committed, so nobody writes there any more. Death windows: after the
reservation, records stay unfinished, which the reader counts; before it, nothing has happened.

Progress: lock-free; obstructed only by reservations of other threads of the same process.
"""

from __future__ import annotations

from typing import Final

from numba import types

from shmroute.recording import records as r
from shmroute.recording.system import thread_id
from shmroute.shared.atomic import WORD, cas, f32_array, fetch_add, i32_array, i64_array, load, store
from shmroute.shared.kernel import inner, kernel
from shmroute.shared.metrics import LaneCounter

# Words of a recorder.
HEADER: Final = 0  # address of the file's header
READY: Final = 1
RECORD_BYTES: Final = 2
NUM_EXPERTS: Final = 3
TOP_K: Final = 4
WITH_LOGITS: Final = 5
COUNTERS: Final = 6  # address of the lane's
# Of the growing thread alone (`shmroute.recording.grow`), but for ENDED.
DESCRIPTOR: Final = 7
HEADER_BYTES: Final = 8
OLDEST: Final = 9  # the first chunk that is still mapped
FOLLOWING: Final = 10  # the chunk that comes next
RESERVED_BEFORE: Final = 11  # records reserved at the last look
ENDED: Final = 12  # 1: stop growing
CHUNK_TABLE: Final = 13

CHUNK_BITS: Final = 14
CHUNK_RECORDS: Final = 1 << CHUNK_BITS
TABLE_CHUNKS: Final = 64
RECORDER_WORDS: Final = CHUNK_TABLE + TABLE_CHUNKS

COUNT_BITS: Final = 24  # more than a table of chunks has records


@inner
def reserve(recorder: int, count: int) -> int:
    """Reserve up to `count` records in a row: the number of the first, above how many; the rest is dropped."""
    words = i64_array(recorder, CHUNK_TABLE)
    next_at = words[HEADER] + r.HEADER_NEXT * WORD
    while True:
        first = load(next_at)
        granted = max(0, min(count, load(recorder + READY * WORD) - first))
        if granted == 0 or cas(next_at, first, first + granted):  # linearization point
            break
    if granted < count:
        fetch_add(words[HEADER] + r.HEADER_DROPPED * WORD, count - granted)
        fetch_add(words[COUNTERS] + LaneCounter.UNRECORDED * WORD, count - granted)
    return (first << COUNT_BITS) | granted


@inner
def begin_record(
    recorder: int, number: int, kind: int, layer: int, rows: int, moment: int, detail: int, spread: int
) -> int:
    """Write the words that all records have, but for the last, COMMIT; where the record is."""
    words = i64_array(recorder, CHUNK_TABLE)
    chunk = load(recorder + (CHUNK_TABLE + ((number >> CHUNK_BITS) & (TABLE_CHUNKS - 1))) * WORD)
    at: int = chunk + (number & (CHUNK_RECORDS - 1)) * words[RECORD_BYTES]
    record = i64_array(at, r.FIXED_WORDS)
    record[r.PLACE] = kind | (layer << r.LAYER_SHIFT)
    record[r.ROWS] = rows
    record[r.THREAD] = thread_id()
    record[r.DROPPED] = load(words[HEADER] + r.HEADER_DROPPED * WORD)
    record[r.MOMENT] = moment
    record[r.DETAIL] = detail
    record[r.SPREAD] = spread
    return at


@inner
def append_route(
    recorder: int, layer: int, start: int, strength: int, spread: int, snapshot_at: int, logits_at: int,
    experts_at: int, weights_at: int, tokens: int,
) -> None:  # fmt: skip
    """Record a routing call, after its choice and its ticks.

    Parameters
    ----------
    recorder, layer : int
    start : int
        The layer's clock at the first token.
    strength, spread : int
        The bonus word and the spread word by which it chose.
    snapshot_at, logits_at, experts_at, weights_at : int
        Addresses of int64 [⌈E/64⌉], float32 [tokens, E], int32 [tokens, k] and float32 [tokens, k].
    """
    words = i64_array(recorder, CHUNK_TABLE)
    num_experts, k, with_logits = words[NUM_EXPERTS], words[TOP_K], words[WITH_LOGITS] == 1
    snapshot_words = (num_experts + 63) >> 6
    snapshot = i64_array(snapshot_at, snapshot_words)
    reserved = reserve(recorder, tokens)
    first, granted = reserved >> COUNT_BITS, reserved & ((1 << COUNT_BITS) - 1)
    for row in range(granted):
        at = begin_record(
            recorder, first + row, r.ROUTE, layer, row | (tokens << r.ROWS_SHIFT), start + row, strength, spread
        )  # fmt: skip
        copied = i64_array(at + r.FIXED_WORDS * WORD, snapshot_words)
        for i in range(snapshot_words):
            copied[i] = snapshot[i]
        ids_at = at + (r.FIXED_WORDS + snapshot_words) * WORD
        ids, weights = i32_array(ids_at, k), f32_array(ids_at + 4 * k, k)
        chosen, weighed = i32_array(experts_at + row * k * 4, k), f32_array(weights_at + row * k * 4, k)
        for rank in range(k):
            ids[rank] = chosen[rank]
            weights[rank] = weighed[rank]
        if with_logits:
            seen = f32_array(logits_at + row * num_experts * 4, num_experts)
            kept = f32_array(ids_at + 8 * k, num_experts)
            for expert in range(num_experts):
                kept[expert] = seen[expert]
        store(at + r.COMMIT * WORD, first + row + 1)
    if granted > 0:
        fetch_add(words[COUNTERS] + LaneCounter.RECORDED * WORD, granted)


@kernel(types.void(types.int64, types.int64, types.int64, types.int64))
def append_wait(recorder: int, layer: int, expert: int, ns: int) -> None:
    """Record that a lease of an expert waited."""
    reserved = reserve(recorder, 1)
    if reserved & 1 == 0:
        return
    number = reserved >> COUNT_BITS
    at = begin_record(recorder, number, r.WAIT, layer, 0, ns, expert, 0)
    store(at + r.COMMIT * WORD, number + 1)
