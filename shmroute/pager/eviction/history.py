"""What the pager learns about experts and workers, by looking at what they publish anyway.

An observation compares each layer's clock (tokens routed) and its experts' totals (activations) with the last one. For
a layer that took n ticks since, in which an expert was chosen a times, its share of the tokens moves by

    share <- share (1 - r)^n + a (1 - (1 - r)^n) / n

at two rates r, the faster divided by the number of workers, each of which has a text of its own. That is the
exponential moving average of "chosen or not" over tokens: exact for n = 1.

*What is approximated.* For n > 1, that the a choices were spread evenly over the n tokens. A choice that was published
after its clock's tick and after the observation counts one observation late. How long ago an expert was last used is
not approximated: its affinity word carries the tick. The order of uses (`LAST_USED`) is that of observations; what one
observation sees is simultaneous.

*Workers.* Each lane's cursor says which layer its worker routed last; the layers that it has yet to pass until it
comes to another follow. A lane counts as long as its cursor moves: a worker that sits idle says nothing about what
comes next.

Wait-free; the pager's main thread alone calls it.
"""

from __future__ import annotations

from typing import Final

from numba import types

from shmroute.pager.eviction.next_token import (
    NO_TOKEN,
    SEVERAL_TOKENS,
    forget_lane,
    forget_token,
    learn_token,
    new_token_at,
)
from shmroute.pager.eviction.next_use import LAST_TOKEN_GAIN, TOKEN_BEFORE_GAIN, rank_factor
from shmroute.pager.eviction.table import (
    AHEAD,
    CHANGED,
    CLOCK,
    FAST,
    LANE_BYTES,
    LANES,
    LAST_TOKEN,
    LAST_USED,
    LOADED_AT,
    MAX_WORKERS,
    MOVED_AT,
    NEVER,
    NUM_EXPERTS,
    NUM_LAYERS,
    NUMBERS,
    OBSERVATION,
    OUTDATED,
    PASSED_BY,
    PASSES,
    PRIOR,
    SEEN_CLOCK,
    SEEN_CURSOR,
    SEEN_TOTAL,
    SLOW,
    TABLE_WORDS,
    TICKS,
    TOKEN_BEFORE,
    TOP_K,
    USE_ROW_BYTES,
    USES,
    WORKERS,
)
from shmroute.shared.atomic import f64_array, i64_array, load
from shmroute.shared.kernel import inner, kernel
from shmroute.shared.layout import LANE_CURSOR, LANE_IDENTITY, LINE, USE_ACTIVATIONS, USE_BYTES
from shmroute.shared.words import NOBODY, identity_state

FAST_RATE: Final = 0.15
"""Of the average over the latest tokens, some seven of each worker."""

SLOW_RATE: Final = 0.005
"""Of the average over many tokens, some two hundred."""

IDLE_CYCLES: Final = 4
"""A lane counts as idle once the workers have made so many passes through all layers without it, on average."""


@inner
def begin_history(table: int) -> None:
    """Learn what the totals say: at first nothing but the prior, after a takeover what happened so far.

    The prior probability of a choice, k / E, weighs as much as the tokens that an average spans.
    """
    words = i64_array(table, TABLE_WORDS)
    layers, experts = words[NUM_LAYERS], words[NUM_EXPERTS]
    clocks = i64_array(words[SEEN_CLOCK], layers)
    totals = i64_array(words[SEEN_TOTAL], layers * experts)
    fast, slow = f64_array(words[FAST], layers * experts), f64_array(words[SLOW], layers * experts)
    prior = f64_array(words[NUMBERS], 4)[PRIOR]
    for layer in range(layers):
        clocks[layer] = load(words[CLOCK] + layer * LINE)
        tokens = max(clocks[layer], 0)
        for expert in range(experts):
            key = layer * experts + expert
            totals[key] = load(words[USES] + layer * words[USE_ROW_BYTES] + expert * USE_BYTES + USE_ACTIVATIONS)
            share = (max(totals[key], 0) + prior / SLOW_RATE) / (tokens + 1 / SLOW_RATE)
            fast[key] = slow[key] = min(share, 1.0)


@inner
def observe_workers(table: int, ticks: int) -> None:
    """Read the lanes' cursors, after `ticks` layer ticks of all workers together."""
    words = i64_array(table, TABLE_WORDS)
    layers, lanes = words[NUM_LAYERS], words[MAX_WORKERS]
    ahead = i64_array(words[AHEAD], layers)
    passes, passed_by = i64_array(words[PASSES], layers), i64_array(words[PASSED_BY], layers)
    cursors, moved_at = i64_array(words[SEEN_CURSOR], lanes), i64_array(words[MOVED_AT], lanes)
    words[TICKS] += ticks
    for layer in range(layers):
        ahead[layer] = layers
        passes[layer] = 0
    workers, patience = 0, IDLE_CYCLES * layers * max(words[WORKERS], 1)
    for lane in range(lanes):
        address = words[LANES] + lane * words[LANE_BYTES]
        cursor = load(address + LANE_CURSOR)
        if identity_state(load(address + LANE_IDENTITY)) == NOBODY or cursor < 0 or cursor >= layers:
            moved_at[lane] = NEVER
            cursors[lane] = cursor
            forget_lane(table, lane)
            continue
        if cursor != cursors[lane]:
            steps = (cursor - cursors[lane]) % layers if moved_at[lane] != NEVER else 1
            for step in range(steps):
                layer = (cursor - step) % layers
                passes[layer] += 1
                passed_by[layer] = lane
            cursors[lane] = cursor
            moved_at[lane] = words[TICKS]
        if moved_at[lane] == NEVER or words[TICKS] - moved_at[lane] > patience:
            forget_lane(table, lane)
            continue
        workers += 1
        for layer in range(layers):
            distance = layer - cursor
            if distance <= 0:
                distance += layers
            ahead[layer] = min(ahead[layer], distance)
    words[WORKERS] = max(workers, 1)
    numbers = f64_array(words[NUMBERS], 4)
    numbers[LAST_TOKEN] = rank_factor(LAST_TOKEN_GAIN, words[WORKERS])
    numbers[TOKEN_BEFORE] = rank_factor(TOKEN_BEFORE_GAIN, words[WORKERS])


@inner
def observe_tokens(table: int) -> None:
    """Learn from the layers in which one token was routed and one lane passed; forget what cannot be told."""
    words = i64_array(table, TABLE_WORDS)
    layers, lanes = words[NUM_LAYERS], words[MAX_WORKERS]
    passes, passed_by = i64_array(words[PASSES], layers), i64_array(words[PASSED_BY], layers)
    for layer in range(layers):
        new = i64_array(new_token_at(table, layer), 1)
        if new[0] == NO_TOKEN:
            continue
        if passes[layer] != 1:
            for lane in range(lanes):
                forget_token(table, lane, layer)
        elif new[0] == SEVERAL_TOKENS:
            forget_token(table, passed_by[layer], layer)
        else:
            learn_token(table, passed_by[layer], layer)
        new[0] = NO_TOKEN


@inner
def observe_history(table: int) -> None:
    """Take in what was published since the last observation."""
    words = i64_array(table, TABLE_WORDS)
    layers, experts = words[NUM_LAYERS], words[NUM_EXPERTS]
    clocks, changed = i64_array(words[SEEN_CLOCK], layers), i64_array(words[CHANGED], layers)
    totals = i64_array(words[SEEN_TOTAL], layers * experts)
    last_used = i64_array(words[LAST_USED], layers * experts)
    fast, slow = f64_array(words[FAST], layers * experts), f64_array(words[SLOW], layers * experts)
    seen = 0
    for layer in range(layers):
        clock = load(words[CLOCK] + layer * LINE)
        ticks = clock - clocks[layer]
        if ticks == 0:
            continue
        clocks[layer] = clock
        changed[layer] = OUTDATED
        if ticks < 0:
            continue  # a damaged clock
        if seen == 0:
            words[OBSERVATION] += 1
        seen += ticks
        keep_fast, keep_slow = (1 - FAST_RATE / words[WORKERS]) ** ticks, (1 - SLOW_RATE) ** ticks
        gain_fast, gain_slow = (1 - keep_fast) / ticks, (1 - keep_slow) / ticks
        row = words[USES] + layer * words[USE_ROW_BYTES]
        new = i64_array(new_token_at(table, layer), 1 + words[TOP_K])
        found = 0
        for expert in range(experts):
            key = layer * experts + expert
            total = load(row + expert * USE_BYTES + USE_ACTIVATIONS)
            uses = min(max(total - totals[key], 0), ticks)
            totals[key] = total
            fast[key] = fast[key] * keep_fast + uses * gain_fast
            slow[key] = slow[key] * keep_slow + uses * gain_slow
            if uses > 0:
                last_used[key] = words[OBSERVATION]
                if found < words[TOP_K]:
                    found += 1
                    new[found] = expert
        new[0] = found if ticks == 1 else SEVERAL_TOKENS
    if seen > 0:
        observe_workers(table, seen)
        observe_tokens(table)


@inner
def note_load(table: int, key: int) -> None:
    """Note that an expert was loaded, which counts as a use."""
    words = i64_array(table, TABLE_WORDS)
    layers, experts = words[NUM_LAYERS], words[NUM_EXPERTS]
    layer = key // experts
    i64_array(words[LAST_USED], layers * experts)[key] = words[OBSERVATION]
    i64_array(words[LOADED_AT], layers * experts)[key] = load(words[CLOCK] + layer * LINE)
    i64_array(words[CHANGED], layers)[layer] = OUTDATED


@kernel(types.void(types.int64))
def begin(table: int) -> None:
    """`begin_history`, from Python."""
    begin_history(table)


@kernel(types.void(types.int64))
def observe(table: int) -> None:
    """`observe_history`, from Python."""
    observe_history(table)
