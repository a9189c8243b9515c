"""Broken rules of recordings."""

from __future__ import annotations

from ..mutation import Mutant

RECORDING = (
    Mutant(
        "committed before it is written",
        "COMMIT is stored last",
        "recording.append:begin_record",
        (
            (
                "    record = i64_array(at, r.FIXED_WORDS)\n",
                "    record = i64_array(at, r.FIXED_WORDS)\n    store(at + r.COMMIT * WORD, number + 1)\n",
            ),
        ),
        ("recording",),
    ),
    Mutant(
        "records reserved by a store",
        "records are reserved by CAS",
        "recording.append:reserve",
        (
            (
                "cas(next_at, first, first + granted)",
                "store(next_at, first + granted) is None",
            ),
        ),
        ("recording",),
    ),
    Mutant(
        "room before its chunk",
        "a chunk's address is stored before READY covers it",
        "recording.grow:offer_chunk",
        (
            ("    store(recorder + (a.CHUNK_TABLE + (chunk & (a.TABLE_CHUNKS - 1))) * WORD, address)\n", ""),
            (
                "    store(recorder + a.READY * WORD, (chunk + 1) << a.CHUNK_BITS)  # linearization point\n",
                "    store(recorder + a.READY * WORD, (chunk + 1) << a.CHUNK_BITS)\n"
                "    store(recorder + (a.CHUNK_TABLE + (chunk & (a.TABLE_CHUNKS - 1))) * WORD, address)\n",
            ),
        ),
        ("recording",),
    ),
    Mutant(
        "dropped without a word",
        "what finds no room is counted",
        "recording.append:reserve",
        (("        fetch_add(words[HEADER] + r.HEADER_DROPPED * WORD, count - granted)\n", ""),),
        ("recording",),
    ),
)
