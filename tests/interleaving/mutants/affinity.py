"""Broken rules of affinity."""

from __future__ import annotations

from ..mutation import Mutant

AFFINITY = (
    Mutant(
        "late batches decay twice",
        "a late batch does not decay the score for the ticks that the word has already",
        "shared.affinity:activate_from",
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
        "shared.affinity:activate_from",
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
        "routing.publication:compose_maps",
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
        "shared.affinity:activate_from",
        (
            (
                "        word = load(word_address)\n        clock = load(clock_address)  # after the word\n",
                "        clock = load(clock_address)\n        word = load(word_address)\n",
            ),
        ),
        ("affinity", "affinity-wrapped"),
    ),
    Mutant(
        "words read late",
        "a batch loads its words before it takes its ticks: the clock is then later than they are",
        "routing.publication:publish_batch",
        (
            (
                "    compose_maps(words, experts_at, tokens)\n",
                "    compose_maps(words, experts_at, tokens)\n    start = advance_clock(words[p.CLOCK], tokens)\n",
            ),
            (
                "    start = advance_clock(words[p.CLOCK], tokens)  # after the words\n",
                "",
            ),
        ),
        ("affinity", "affinity-put-off"),
    ),
    Mutant(
        "published twice",
        "what was put off is published once",
        "routing.publication:_publish_pending",
        (("    words[p.PENDING_TOKENS] = 0\n", ""),),
        ("affinity-put-off",),
    ),
    Mutant(
        "put off too long",
        "what was put off is published when as much is together as may be",
        "routing.publication:publish",
        (("    if words[p.PENDING_TOKENS] == words[p.MOST_PENDING]:", "    if False:"),),
        ("affinity-put-off",),
    ),
    Mutant(
        "put off for ever",
        "what was put off is published before its plan is closed",
        "routing.publication:publish_and_leave",
        (("    if words[p.PENDING_TOKENS] > 0:\n        _publish_pending(words, 0)\n", ""),),
        ("affinity-put-off",),
    ),
    Mutant(
        "one tick for all that was put off",
        "tokens that are published together take a tick each",
        "routing.publication:publish_batch",
        (("advance_clock(words[p.CLOCK], tokens)", "advance_clock(words[p.CLOCK], 1)"),),
        ("affinity-put-off",),
    ),
    Mutant(
        "no restamp",
        "whoever moves a clock over a multiple of 2^28 restamps the layer",
        "routing.publication:publish_batch",
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
        "shared.affinity:activate_from",
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
