"""Broken rules of affinity."""

from __future__ import annotations

from ..mutation import Mutant

AFFINITY = (
    Mutant(
        "late batches decay twice",
        "a late batch does not decay the score for the ticks that the word has already",
        "shared.affinity:activate",
        (
            (
                "                score = score + worth * decay_power(table, tick - end)",
                "                score *= decay_power(table, end - start)\n"
                "                score = score + worth * decay_power(table, tick - end)",
            ),
        ),
        ("affinity",),
    ),
    Mutant(
        "late batches counted whole",
        "a late batch's worth decays by the ticks that have passed since its end",
        "shared.affinity:activate",
        (
            (
                "                score = score + worth * decay_power(table, tick - end)",
                "                score = score + worth",
            ),
        ),
        ("affinity",),
    ),
    Mutant(
        "batch composition without clamp",
        "composed maps keep the clamp",
        "routing.route:_compose_maps",
        (
            (
                "            put_score(map_at + WORD, min(score_at(map_at + WORD), power * max_score + later))\n",
                "",
            ),
        ),
        ("affinity-clamped",),
    ),
    Mutant(
        "stale clock",
        "each attempt loads the word first, then the clock",
        "shared.affinity:activate",
        (
            (
                "        word = load(word_address)\n"
                "        clock = load(clock_address)  # after the word: see the file's head\n",
                "        clock = load(clock_address)\n        word = load(word_address)\n",
            ),
        ),
        ("affinity", "affinity-wrapped"),
    ),
    Mutant(
        "no restamp",
        "whoever moves a clock over a multiple of 2^28 restamps the layer",
        "routing.route:_record_affinity",
        (("    if crosses_restamp(start, tokens):", "    if False:"),),
        ("affinity-restamped",),
    ),
    Mutant(
        "restamp rounds up",
        "a restamp rounds down: no score rises",
        "shared.affinity:restamp",
        (
            (
                "            score = int(low32(word) * decay_power(table, age_of(word, clock)))",
                "            score = int(low32(word) * decay_power(table, age_of(word, clock))) + 1",
            ),
        ),
        ("affinity-restamped",),
    ),
    Mutant(
        "lost activations",
        "a score is changed by a CAS from the word that was read",
        "shared.affinity:activate",
        (
            (
                "        if cas(word_address, word, pack_affinity(tick, to_score(score))):  # linearization point",
                "        if cas(word_address, load(word_address), pack_affinity(tick, to_score(score))):",
            ),
        ),
        ("affinity",),
    ),
    Mutant(
        "ticks shared",
        "the clock advances by one fetch_add",
        "shared.affinity:advance_clock",
        (
            (
                "    return fetch_add(clock, ticks)",
                "    start = load(clock)\n    fetch_add(clock, ticks)\n    return start",
            ),
        ),
        ("affinity",),
    ),
)
