"""The routing kernel: one call for a token or a batch does everything that routing does.

In two passes. The first only reads shared memory: it takes one residency snapshot for the whole call (INV-6), chooses
and weighs the experts of every token, and refuses the whole batch if a token cannot be routed. The second records:
clock, affinity (one CAS per expert touched), activations, metrics, and requests for what is missing.

The bonus is for choosing only. A constant added to every resident expert cannot change a choice whose experts are all
resident, so the second selection runs only for tokens that miss; it also tells which choices the bonus changed.

Lock-free throughout. Linearization points are those of the words it changes; the call as a whole is not atomic: a
worker that dies in it leaves some of its batch recorded.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from numba import types

from shmroute.routing import plan as p
from shmroute.routing.scoring import softmax_weights
from shmroute.routing.selection import is_resident, select_top_k
from shmroute.shared.affinity import (
    NO_CLAMP,
    activate,
    advance_clock,
    count_activation,
    crosses_restamp,
    decay_power,
    restamp,
)
from shmroute.shared.atomic import (
    WORD,
    cas,
    f32_array,
    f64_array,
    fetch_add,
    i32_array,
    i64_array,
    load,
    monotonic_ns,
    store,
)
from shmroute.shared.bell import heard
from shmroute.shared.experts import QUEUE
from shmroute.shared.kernel import inner, kernel
from shmroute.shared.metrics import LaneCounter, record_duration
from shmroute.shared.requests import submit
from shmroute.shared.words import NORMAL, PAGE_IN, pack_request, unpack_bonus

# A call returns the (token, expert) pairs that missed, with RING_BELL set if the pager must be woken; or one of these.
RING_BELL: Final = 1 << 40
BAD_ARRAY: Final = -1  # of another shape than the plan's, or not aligned
NOT_FINITE: Final = -2
BUSY: Final = -3
REFUSED: Final = -4


@inner
def _choose(words: npt.NDArray[np.int64], logits_at: int, experts_at: int, weights_at: int, tokens: int) -> int:
    """First pass: experts, weights and totals of every token; NOT_FINITE or 0."""
    num_experts, k = words[p.NUM_EXPERTS], words[p.TOP_K]
    logits = f32_array(logits_at, tokens * num_experts)
    experts = i32_array(experts_at, tokens * k)
    weights = f32_array(weights_at, tokens * k)
    snapshot_words = (num_experts + 63) >> 6
    snapshot = i64_array(words[p.SNAPSHOT], snapshot_words)
    scores = f64_array(words[p.SCORES], k)
    ids = i64_array(words[p.IDS], k)
    plain = i64_array(words[p.PLAIN_IDS], k)
    for i in range(snapshot_words):
        snapshot[i] = load(words[p.RESIDENT] + i * WORD)
    bonus = 0.0
    if words[p.MEMORY_AWARE] == 1:
        bonus = unpack_bonus(load(words[p.BONUS]))

    hits = changed = nonfinite = 0
    for token in range(tokens):
        first = token * num_experts
        finite = select_top_k(logits, first, num_experts, 0.0, snapshot, scores, ids, k)
        if finite < k:
            words[p.BAD_ROW] = token
            words[p.BAD_FINITE] = finite
            return NOT_FINITE
        nonfinite += num_experts - finite
        if bonus != 0.0:
            missing = 0
            for rank in range(k):
                plain[rank] = ids[rank]
                if not is_resident(snapshot, ids[rank]):
                    missing += 1
            if missing > 0:
                select_top_k(logits, first, num_experts, bonus, snapshot, scores, ids, k)
                for rank in range(k):
                    same = 0
                    for other in range(k):
                        if plain[other] == ids[rank]:
                            same = 1
                    changed += 1 - same
        softmax_weights(logits, first, num_experts, ids, k, words[p.RENORMALIZE] == 1, weights, token * k)
        for rank in range(k):
            experts[token * k + rank] = ids[rank]
            if is_resident(snapshot, ids[rank]):
                hits += 1
    totals = i64_array(words[p.TOTALS], 3)
    totals[0], totals[1], totals[2] = hits, changed, nonfinite
    return 0


@inner
def _record_affinity(words: npt.NDArray[np.int64], experts_at: int, tokens: int) -> int:
    """Compose each touched expert's map over the batch and apply it; how many were touched."""
    num_experts, k = words[p.NUM_EXPERTS], words[p.TOP_K]
    table = words[p.POWERS]
    experts = i32_array(experts_at, tokens * k)
    parameters = f64_array(words[p.PARAMETERS], 2)
    boost, max_score = parameters[0], parameters[1]
    last = i64_array(words[p.LAST], num_experts)
    map_b = f64_array(words[p.MAP_B], num_experts)
    map_c = f64_array(words[p.MAP_C], num_experts)
    times = i64_array(words[p.TIMES], num_experts)
    touched = i64_array(words[p.TOUCHED], num_experts)
    for expert in range(num_experts):
        last[expert] = -1
    count = 0
    for pair in range(tokens * k):
        expert = int(experts[pair])
        if expert < 0 or expert >= num_experts:
            continue  # the caller's array changed under this call: two threads share it, or it overlaps `weights`
        tick = pair // k + 1
        if last[expert] < 0:
            last[expert], map_b[expert], map_c[expert], times[expert] = 0, 0.0, NO_CLAMP, 0
            touched[count] = expert
            count += 1
        power = decay_power(table, tick - last[expert])
        map_b[expert] = power * map_b[expert] + boost
        map_c[expert] = min(max_score, power * map_c[expert] + boost)
        last[expert] = tick
        times[expert] += 1

    start = advance_clock(words[p.CLOCK], tokens)
    end = start + tokens
    for i in range(count):
        expert = touched[i]
        power = decay_power(table, tokens - last[expert])
        activate(
            words[p.AFFINITY] + expert * WORD, words[p.CLOCK], table, start, end,
            power * map_b[expert], power * map_c[expert], max_score,
        )  # fmt: skip
        count_activation(words[p.ACTIVATIONS] + expert * WORD, times[expert])
    if crosses_restamp(start, tokens):
        restamp(words[p.AFFINITY], words[p.CLOCK], table, num_experts)
    return count


@inner
def _request_missing(words: npt.NDArray[np.int64], touched_count: int) -> int:
    """Request every touched expert that was not resident; how many requests this call queued."""
    num_experts = words[p.NUM_EXPERTS]
    snapshot = i64_array(words[p.SNAPSHOT], (num_experts + 63) >> 6)
    touched = i64_array(words[p.TOUCHED], num_experts)
    queued = i64_array(words[p.QUEUED], num_experts)
    count = 0
    for i in range(touched_count):
        expert = touched[i]
        if is_resident(snapshot, expert):
            continue
        offset = expert * WORD
        code = submit(
            words[p.EXPERTS] + offset, words[p.FAILURES] + offset, words[p.RING], words[p.RING_BITS],
            words[p.COUNTERS], words[p.LAYER], expert, NORMAL, words[p.LANE],
        )  # fmt: skip
        if code == QUEUE:
            queued[count] = pack_request(words[p.LAYER], expert, PAGE_IN, NORMAL, words[p.LANE])
            count += 1
    return count


@inner
def route(plan: int, logits_at: int, experts_at: int, weights_at: int, tokens: int) -> int:
    """Route `tokens` tokens by a plan: the pairs that missed, or an error code.

    Parameters
    ----------
    plan : int
        Address of the plan's words.
    logits_at, experts_at, weights_at : int
        Addresses of float32 [tokens, E], int32 [tokens, k] and float32 [tokens, k].
    """
    if not cas(plan, p.IDLE, p.IN_USE):
        return REFUSED if load(plan) == p.CLOSED else BUSY
    words = i64_array(plan, p.PLAN_WORDS)
    timed = words[p.TIMED] == 1
    began = monotonic_ns() if timed else 0
    words[p.QUEUED_COUNT] = 0
    code = 0
    if tokens > 0:
        code = _choose(words, logits_at, experts_at, weights_at, tokens)
        if code == 0:
            totals = i64_array(words[p.TOTALS], 3)
            hits, changed, nonfinite = totals[0], totals[1], totals[2]
            misses = tokens * words[p.TOP_K] - hits
            touched = _record_affinity(words, experts_at, tokens)
            code = misses
            counters = words[p.COUNTERS]
            if misses > 0:
                words[p.QUEUED_COUNT] = _request_missing(words, touched)
                fetch_add(counters + LaneCounter.MISSES * WORD, misses)
                if words[p.QUEUED_COUNT] > 0:
                    words[p.BELL_WORD] = heard(words[p.BELL], 0)
                    if words[p.BELL_WORD] != 0:
                        code = misses | RING_BELL
            store(words[p.CURSOR], words[p.LAYER])
            fetch_add(counters + LaneCounter.CALLS * WORD, 1)
            fetch_add(counters + LaneCounter.TOKENS * WORD, tokens)
            fetch_add(counters + LaneCounter.HITS * WORD, hits)
            if changed > 0:
                fetch_add(counters + LaneCounter.CHANGED * WORD, changed)
            if nonfinite > 0:
                fetch_add(counters + LaneCounter.NONFINITE * WORD, nonfinite)
            if timed:
                record_duration(words[p.HISTOGRAM], monotonic_ns() - began)
    store(plan, p.IDLE)
    return code


@inner
def _route_aligned(plan: int, logits_at: int, experts_at: int, weights_at: int, tokens: int) -> int:
    """`route`, unless an array is not aligned: Numba's types do not tell."""
    if (logits_at | experts_at | weights_at) & 3:
        return BAD_ARRAY
    return route(plan, logits_at, experts_at, weights_at, tokens)


_FLOATS_1D, _INTS_1D = types.float32[::1], types.int32[::1]
_FLOATS_2D, _INTS_2D = types.float32[:, ::1], types.int32[:, ::1]


@kernel(types.int64(types.int64, _FLOATS_1D, _INTS_1D, _FLOATS_1D))
def route_token(
    plan: int, logits: npt.NDArray[np.float32], experts: npt.NDArray[np.int32], weights: npt.NDArray[np.float32]
) -> int:
    """`route` for one token: float32 [E], int32 [k], float32 [k]."""
    words = i64_array(plan, p.PLAN_WORDS)
    k = words[p.TOP_K]
    if logits.shape[0] != words[p.NUM_EXPERTS] or experts.shape[0] != k or weights.shape[0] != k:
        return BAD_ARRAY
    return _route_aligned(plan, logits.ctypes.data, experts.ctypes.data, weights.ctypes.data, 1)


@kernel(types.int64(types.int64, _FLOATS_2D, _INTS_2D, _FLOATS_2D))
def route_batch(
    plan: int, logits: npt.NDArray[np.float32], experts: npt.NDArray[np.int32], weights: npt.NDArray[np.float32]
) -> int:
    """`route` for a batch: float32 [T, E], int32 [T, k], float32 [T, k]."""
    words = i64_array(plan, p.PLAN_WORDS)
    k, tokens = words[p.TOP_K], logits.shape[0]
    if logits.shape[1] != words[p.NUM_EXPERTS] or experts.shape != (tokens, k) or weights.shape != (tokens, k):
        return BAD_ARRAY
    return _route_aligned(plan, logits.ctypes.data, experts.ctypes.data, weights.ctypes.data, tokens)
