"""A recording: threads of a worker that append, one that grows the file, and a reader; the worker may die at any step.

The file's last room but two records is in one chunk, more comes with the next. Checked: a record that is committed is
whole, whenever it is read; none is written over another; whatever was not recorded is counted; and only what the dead
had reserved stays unfinished.
"""

from __future__ import annotations

import ctypes
from functools import partial
from typing import ClassVar

import numpy as np
from runtimes import Memory as Block

from shmroute.recording import append as a
from shmroute.recording import records as r
from shmroute.recording.append import append_route, append_wait
from shmroute.recording.grow import offer_chunk
from shmroute.shared.atomic import WORD, load
from shmroute.shared.metrics import LANE_COUNTERS, LaneCounter

from ..simulation import Simulation, require
from ..world import World

EXPERTS, TOP_K = 4, 2
LAYOUT = r.RecordLayout(EXPERTS, TOP_K, True)
FIRST = a.CHUNK_RECORDS - 2
LOGITS = np.arange(2 * EXPERTS, dtype=np.float32)
EXPERT_IDS = np.arange(2 * TOP_K, dtype=np.int32)
WEIGHTS = np.arange(2 * TOP_K, dtype=np.float32) / 8
SNAPSHOT = np.array([0b1010], np.int64)


class Recording(World):
    """Each writer appends a call of two tokens in a layer of its own; the first also a wait."""

    title = "two threads that record, one that grows the file, and a reader"
    writers: ClassVar[int] = 2
    lock_free = True

    def populate(self, simulation: Simulation) -> None:
        size = LAYOUT.record_bytes
        self._blocks = [Block(a.RECORDER_WORDS * WORD), Block(r.PAGE), Block(LANE_COUNTERS * WORD), *(
            Block(3 * size) for _ in range(3)
        )]  # fmt: skip
        recorder, header, counters, chunk, following, stale = (block.address for block in self._blocks)
        self._recorder, self._header, self._counters = recorder, header, counters
        self._at = [chunk, chunk + size, *(following + i * size for i in range(3))]
        words = np.frombuffer((ctypes.c_int64 * a.RECORDER_WORDS).from_address(recorder), np.int64)
        words[a.HEADER], words[a.RECORD_BYTES], words[a.WITH_LOGITS] = header, size, 1
        words[a.NUM_EXPERTS], words[a.TOP_K], words[a.COUNTERS] = EXPERTS, TOP_K, counters
        words[a.CHUNK_TABLE], words[a.CHUNK_TABLE + 1] = chunk - FIRST * size, stale
        words[a.READY] = a.CHUNK_RECORDS
        ctypes.c_int64.from_address(header + r.HEADER_NEXT * WORD).value = FIRST
        worker = simulation.process("worker", *(partial(self._write, number) for number in range(self.writers)))
        simulation.thread(worker, partial(offer_chunk, recorder, 1, following), "grows")
        simulation.process("reader", self._read, mortal=False)

    def _write(self, number: int) -> None:
        append_route(
            self._recorder, number, 100 * number, 7, 9, SNAPSHOT.ctypes.data, LOGITS.ctypes.data,
            EXPERT_IDS.ctypes.data, WEIGHTS.ctypes.data, 2,
        )  # fmt: skip
        if number == 0:
            append_wait(self._recorder, 3, 1, 55)

    def _read(self) -> None:
        for _ in range(2):
            self._committed()

    def _committed(self) -> list[tuple[int, int, int]]:
        """Kind, layer and row of what is committed, all of it whole."""
        found = []
        for number, at in enumerate(self._at, FIRST):
            if load(at + r.COMMIT * WORD) != number + 1:
                continue
            record = np.frombuffer(
                (ctypes.c_byte * LAYOUT.record_bytes).from_address(at), LAYOUT.dtype
            )[0]  # fmt: skip
            kind, layer = int(record["place"]) & r.KIND_MASK, int(record["place"]) >> r.LAYER_SHIFT
            row = int(record["rows"]) & ((1 << r.ROWS_SHIFT) - 1)
            if kind == r.WAIT:
                whole = (layer, int(record["moment"]), int(record["detail"])) == (3, 55, 1)
            else:
                whole = (
                    kind == r.ROUTE
                    and int(record["rows"]) >> r.ROWS_SHIFT == 2
                    and (int(record["moment"]), int(record["detail"]), int(record["spread"]))
                    == (100 * layer + row, 7, 9)
                    and record["snapshot"].tolist() == SNAPSHOT.tolist()
                    and record["ids"].tolist() == EXPERT_IDS[TOP_K * row : TOP_K * (row + 1)].tolist()
                    and record["weights"].tolist() == WEIGHTS[TOP_K * row : TOP_K * (row + 1)].tolist()
                    and record["logits"].tolist() == LOGITS[EXPERTS * row : EXPERTS * (row + 1)].tolist()
                )
            require(whole, f"record {number} is committed and not whole: {record}")
            found.append((kind, layer, row))
        return found

    def check(self, simulation: Simulation) -> None:
        found = self._committed()
        require(len(set(found)) == len(found), f"something was recorded twice: {found}")
        reserved = load(self._header + r.HEADER_NEXT * WORD) - FIRST
        dropped = load(self._header + r.HEADER_DROPPED * WORD)
        require(len(found) <= reserved <= len(self._at), f"{len(found)} records, {reserved} reserved")
        require(
            load(self._counters + LaneCounter.UNRECORDED * WORD) <= dropped,
            "the lane counts more than the file dropped",
        )
        if simulation.deaths_left == self.deaths:
            asked = 2 * self.writers + 1
            require(len(found) == reserved, f"{reserved} records were reserved, {len(found)} written: {found}")
            require(reserved + dropped == asked, f"of {asked} records {reserved} were reserved, {dropped} dropped")
            counted = load(self._counters + LaneCounter.RECORDED * WORD)
            routed = sum(kind == r.ROUTE for kind, _, _ in found)
            require(counted == routed, f"{routed} tokens were recorded, {counted} counted")
