"""What others learn of a routed token: its tick, the affinity and the activations of its experts; at once, or later.

A worker alone on a layer publishes every call at once. Two that use the same layer at the same time take its lines from
each other with every token: a line that another core has changed costs 40 to 200 ns, a token has half a dozen of them,
and they are most of what routing costs. So a worker that is not alone *puts tokens off*: it keeps their experts to
itself, up to `MOST_PENDING` tokens, and publishes them as one batch, with one step of the clock and one
compare-and-swap for each expert touched. The batch takes its ticks when it is published, so all that
`shmroute.shared.affinity` says of batches holds for it.

*When.* Tokens are put off only if (a) this call follows upon a call of the same plan, with no other layer routed by
this process in between, and (b) somebody else has moved the layer's clock between the last two publications of this
process. Both are known without a look at shared memory: the step of the clock says what the clock was. They are
published when `MOST_PENDING` are together, when a call is at least as long as that, when this process routes on another
layer or reads this one's affinity (`ExpertAffinity`), and at its close. So a worker that goes through the layers of a
model publishes every call at once, and so does one that is alone.

*What others see late.* Of each worker at most ``MOST_PENDING - 1`` tokens, of the one layer that it routed last (a
thread that finds another one's plan in use leaves that to its owner, so with threads: of one layer each). Hits, misses,
tokens, the cursor and requests for what is missing never wait. A worker that dies loses what it put off: hints to
eviction and as many counts of `activations`.

| who | calls | progress |
|---|---|---|
| the call that has the plan | `take_turn`, `publish` | lock-free, as `activate`: it skips another plan that is in use |
| whoever reads or closes | `publish_and_leave` | waits for another thread's call that has the plan |
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from numba import types

from shmroute.routing import plan_words as p
from shmroute.routing.codes import NOT_FINITE
from shmroute.routing.vectors import id_at, put_id, put_score, put_word, score_at, word_at
from shmroute.shared.affinity import (
    NO_CLAMP,
    activate_from,
    advance_clock,
    count_activation,
    crosses_restamp,
    decay_power,
    restamp,
)
from shmroute.shared.atomic import WORD, cas, f64_array, fetch_add, fetch_line, i64_array, load, store
from shmroute.shared.kernel import inlined, inner, kernel
from shmroute.shared.layout import USE_ACTIVATIONS, USE_AFFINITY, USE_BYTES
from shmroute.shared.metrics import LaneCounter

ID: Final = 4


@inlined
def touch(times_at: int, touched_at: int, count: int, expert: int) -> int:
    """Count a choice; how many experts have been chosen by now."""
    times = word_at(times_at + expert * WORD)
    put_word(touched_at + count * WORD, expert)
    put_word(times_at + expert * WORD, times + 1)
    return count + int(times == 0)


@inner
def forget_touched(words: npt.NDArray[np.int64], count: int) -> None:
    """Leave no expert counted."""
    for i in range(count):
        put_word(words[p.TIMES] + word_at(words[p.TOUCHED] + i * WORD) * WORD, 0)


@inlined
def take_chosen(words: npt.NDArray[np.int64], experts_at: int, token: int, touched: int) -> int:
    """Hand out a token's chosen experts and count them; how many experts have been chosen by now."""
    k, chosen_at = words[p.TOP_K], words[p.CHOSEN]
    for rank in range(k):
        expert = id_at(chosen_at + rank * ID)
        put_id(experts_at + (token * k + rank) * ID, expert)
        touched = touch(words[p.TIMES], words[p.TOUCHED], touched, expert)
    return touched


@inner
def refuse(words: npt.NDArray[np.int64], token: int, finite: int, touched: int) -> int:
    """Say which token cannot be routed, and leave no trace of those before it."""
    words[p.BAD_ROW] = token
    words[p.BAD_FINITE] = finite
    forget_touched(words, touched)
    return NOT_FINITE


@inner
def count_touched(words: npt.NDArray[np.int64], experts_at: int, tokens: int) -> None:
    """Count the experts of some tokens anew."""
    touched = 0
    for i in range(tokens * words[p.TOP_K]):
        expert = id_at(experts_at + i * ID)
        if 0 <= expert < words[p.NUM_EXPERTS]:  # see `compose_maps`
            touched = touch(words[p.TIMES], words[p.TOUCHED], touched, expert)
    words[p.TOUCHED_COUNT] = touched


# ------------------------------------------------------------------ a batch


@inner
def compose_maps(words: npt.NDArray[np.int64], experts_at: int, tokens: int) -> None:
    """Compose each touched expert's map over the batch, from the last token back.

    Backwards, all activations of one token share one power of the decay. An activation at a tick with r ticks after it
    adds ``boost d^r`` to the batch's worth b; its clamp lets pass no more than ``max_score d^r`` and what later
    activations add.
    """
    num_experts, k = words[p.NUM_EXPERTS], words[p.TOP_K]
    parameters = f64_array(words[p.PARAMETERS], p.PARAMETER_COUNT)
    boost, max_score = parameters[p.BOOST], parameters[p.MAX_SCORE]
    maps_at, touched_at = words[p.MAPS], words[p.TOUCHED]
    for i in range(words[p.TOUCHED_COUNT]):
        map_at = maps_at + word_at(touched_at + i * WORD) * 2 * WORD
        put_score(map_at, 0.0)
        put_score(map_at + WORD, NO_CLAMP)
    for token in range(tokens - 1, -1, -1):
        power = decay_power(words[p.POWERS], tokens - 1 - token)
        for rank in range(k):
            expert = id_at(experts_at + (token * k + rank) * ID)
            if expert < 0 or expert >= num_experts:
                continue  # the caller's array changed under this call: two threads share it, or it overlaps `weights`
            map_at = maps_at + expert * 2 * WORD
            later = score_at(map_at)
            put_score(map_at + WORD, min(score_at(map_at + WORD), power * max_score + later))
            put_score(map_at, power * boost + later)


@inlined
def fetch_lines(words: npt.NDArray[np.int64], touched: int) -> None:
    """Ask for the lines that `publish_batch` will change."""
    fetch_line(words[p.CLOCK])
    for i in range(touched):
        fetch_line(words[p.USES] + word_at(words[p.TOUCHED] + i * WORD) * USE_BYTES)


@inner
def publish_batch(words: npt.NDArray[np.int64], experts_at: int, tokens: int) -> None:
    """Take ticks for some tokens and apply each touched expert's map, composed over all of them."""
    table, max_score = words[p.POWERS], f64_array(words[p.PARAMETERS], p.PARAMETER_COUNT)[p.MAX_SCORE]
    uses, touched_at, read_at, count = words[p.USES], words[p.TOUCHED], words[p.READ], words[p.TOUCHED_COUNT]
    compose_maps(words, experts_at, tokens)
    for i in range(count):
        put_word(read_at + i * WORD, load(uses + word_at(touched_at + i * WORD) * USE_BYTES + USE_AFFINITY))
    start = advance_clock(words[p.CLOCK], tokens)  # after the words
    end = start + tokens
    words[p.START] = start
    for i in range(count):
        expert = word_at(touched_at + i * WORD)
        use, map_at, times_at = uses + expert * USE_BYTES, words[p.MAPS] + expert * 2 * WORD, words[p.TIMES]
        activate_from(
            word_at(read_at + i * WORD), start, use + USE_AFFINITY, words[p.CLOCK], table, start, end,
            score_at(map_at), score_at(map_at + WORD), max_score,
        )  # fmt: skip
        count_activation(use + USE_ACTIVATIONS, word_at(times_at + expert * WORD))
        put_word(times_at + expert * WORD, 0)
    if crosses_restamp(start, tokens):
        restamp(uses + USE_AFFINITY, words[p.CLOCK], table, words[p.NUM_EXPERTS])
    left = word_at(words[p.SEEN] + p.LEFT * WORD)
    put_word(words[p.SEEN] + p.SHARED * WORD, int(left not in (p.NEVER, start)))
    put_word(words[p.SEEN] + p.LEFT * WORD, end)


# ------------------------------------------------------------------ now or later


@inner
def take_turn(words: npt.NDArray[np.int64], plan: int, tokens: int) -> None:
    """Begin a call: say whether it puts its tokens off, and publish what was put off and has to be before that."""
    former = word_at(words[p.LATEST])
    put_word(words[p.LATEST], plan)
    shared = word_at(words[p.SEEN] + p.SHARED * WORD) == 1
    words[p.AT_ONCE] = int(former != plan or not shared or tokens >= words[p.MOST_PENDING])
    if former not in (plan, 0):
        _publish_if_idle(former)
    pending = words[p.PENDING_TOKENS]
    if pending > 0 and (words[p.AT_ONCE] == 1 or pending + tokens > words[p.MOST_PENDING]):
        _publish_pending(words, 0)


@inner
def publish(words: npt.NDArray[np.int64], experts_at: int, tokens: int) -> None:
    """Publish a call's tokens, whose experts are counted, or put them off, as `take_turn` said."""
    if words[p.AT_ONCE] == 1:
        publish_batch(words, experts_at, tokens)
        return
    forget_touched(words, words[p.TOUCHED_COUNT])
    k = words[p.TOP_K]
    pending_at = words[p.PENDING] + words[p.PENDING_TOKENS] * k * ID
    for i in range(tokens * k):
        put_id(pending_at + i * ID, id_at(experts_at + i * ID))
    words[p.PENDING_TOKENS] += tokens
    if words[p.PENDING_TOKENS] == words[p.MOST_PENDING]:
        _publish_pending(words, tokens)


@inner
def _publish_pending(words: npt.NDArray[np.int64], own: int) -> None:
    """Publish the tokens that were put off, of which the last `own` are the present call's."""
    tokens = words[p.PENDING_TOKENS]
    words[p.PENDING_TOKENS] = 0
    count_touched(words, words[p.PENDING], tokens)
    fetch_lines(words, words[p.TOUCHED_COUNT])
    publish_batch(words, words[p.PENDING], tokens)
    if tokens > own:
        fetch_add(words[p.COUNTERS] + LaneCounter.DEFERRED * WORD, tokens - own)


@inner
def _publish_if_idle(plan: int) -> None:
    """Publish what a plan put off, unless a call has it: then that call, or one after it, sees to it."""
    if word_at(plan + p.PENDING_TOKENS * WORD) > 0 and cas(plan, p.IDLE, p.IN_USE):
        words = i64_array(plan, p.PLAN_WORDS)
        if words[p.PENDING_TOKENS] > 0:
            _publish_pending(words, 0)
        store(plan, p.IDLE)


@kernel(types.void(types.int64, types.int64))
def publish_and_leave(plan: int, state: int) -> None:
    """Wait until a plan is idle, publish what it put off, and leave it IDLE or CLOSED."""
    while not cas(plan, p.IDLE, p.IN_USE):
        if load(plan) == p.CLOSED:
            return
    words = i64_array(plan, p.PLAN_WORDS)
    if words[p.PENDING_TOKENS] > 0:
        _publish_pending(words, 0)
    store(plan, state)
