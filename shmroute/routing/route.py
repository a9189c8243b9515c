"""The routing kernel: one call for a token or a batch does everything that routing does.

In two passes. The first only reads shared memory: it takes one residency snapshot for the whole call (INV-6), chooses
and weighs the experts of every token, and refuses the whole batch if a token cannot be routed. The second records:
requests for what is missing, metrics, and, at once or later (`shmroute.routing.publication`), clock, affinity (one CAS
per expert touched) and activations.

The bonus is for choosing only. Whether it changed a choice is seen without choosing a second time: it did unless the
chosen expert that is last by its logit has exactly the k - 1 other ones before it. Only then the token's own experts
are found, to count how many were replaced.

Lock-free throughout. Linearization points are those of the words it changes; the call as a whole is not atomic: a
worker that dies in it leaves some of its batch recorded.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from numba import types

from shmroute.recording.append import append_route
from shmroute.routing import plan_words as p
from shmroute.routing.codes import BUSY, REFUSED, RING_BELL
from shmroute.routing.general import choose_generally_at
from shmroute.routing.publication import fetch_lines, publish, refuse, take_chosen, take_turn
from shmroute.routing.quality_budget import BY_MASS, observe
from shmroute.routing.scoring import softmax_weights
from shmroute.routing.selection import (
    ID,
    bit_at,
    choose_top_k,
    count_after,
    count_before_by_logit,
    count_resident,
    last_by_logit,
    select_raised,
    select_top_k,
)
from shmroute.routing.shares import lost_by_one, lost_mass
from shmroute.routing.vectors import id_at, word_at
from shmroute.shared.atomic import WORD, address_of, cas, fetch_add, i64_array, load, store
from shmroute.shared.bell import heard
from shmroute.shared.bits import count_bits
from shmroute.shared.emitted import call_at, emitted_by
from shmroute.shared.experts import QUEUE
from shmroute.shared.kernel import inlined, inner, kernel
from shmroute.shared.metrics import LaneCounter, record_duration
from shmroute.shared.requests import submit
from shmroute.shared.stopwatch import nanoseconds, reading
from shmroute.shared.successors import learn
from shmroute.shared.words import BONUS_ONE, NORMAL, PAGE_IN, pack_request, unpack_bonus


@inner
def _take_snapshot(bitmap: int, snapshot_at: int, num_experts: int) -> int:
    """Copy a layer's residency bitmap; how many of its bits are set."""
    resident = 0
    snapshot = i64_array(snapshot_at, (num_experts + 63) >> 6)
    for i in range((num_experts + 63) >> 6):
        word = load(bitmap + i * WORD)
        snapshot[i] = word
        resident += count_bits(word)
    return resident


@inlined
def _count_replaced(words: npt.NDArray[np.int64], row_at: int) -> int:
    """How many of a token's experts, chosen by raised logits, are not among its own.

    Those that are not are the last of the chosen by logit alone. Before the very last one are the k - 1 others, and
    whoever was not chosen in spite of its logit: if that is one expert, one was replaced.
    """
    num_experts, k, chosen_at = words[p.NUM_EXPERTS], words[p.TOP_K], words[p.CHOSEN]
    last = last_by_logit(row_at, chosen_at, k)
    before = count_before_by_logit(row_at, num_experts, last)
    if before == k - 1:
        return 0
    return _account_for_change(words, row_at, last, before)


@inner
def _account_for_change(words: npt.NDArray[np.int64], row_at: int, last: int, before: int) -> int:
    """`_count_replaced` of a token that was changed, `before` experts being before its last one; adds what it lost."""
    k, own_at = words[p.TOP_K], words[p.OWN]
    if before == k:
        words[p.LOST_MASS] += lost_by_one(words, row_at, last)
        return 1
    choose_top_k(row_at, words[p.NUM_EXPERTS], words[p.SCORES], words[p.CANDIDATES], own_at, k)
    words[p.LOST_MASS] += lost_mass(words, row_at)
    return count_after(row_at, words[p.CHOSEN], k, id_at(own_at + (k - 1) * ID))


@inlined
def _choose_plainly(
    words: npt.NDArray[np.int64], bonus: float, logits_at: int, experts_at: int, weights_at: int, tokens: int
) -> int:
    """Every token by softmax and the absolute rule; NOT_FINITE or 0."""
    num_experts, k, renormalize = words[p.NUM_EXPERTS], words[p.TOP_K], words[p.RENORMALIZE] == 1
    snapshot_at, scores_at, chosen_at = words[p.SNAPSHOT], words[p.SCORES], words[p.CHOSEN]
    hits = changed = nonfinite = touched = 0
    for token in range(tokens):
        row_at = logits_at + token * num_experts * 4
        if bonus == 0.0:
            finite = select_top_k(row_at, num_experts, scores_at, words[p.CANDIDATES], chosen_at, k)
        else:
            finite = select_raised(
                row_at, num_experts, bonus, snapshot_at, scores_at, words[p.CANDIDATES], chosen_at, k
            )  # fmt: skip
        if finite < k:
            return refuse(words, token, finite, touched)
        nonfinite += num_experts - finite
        if bonus != 0.0:
            changed += _count_replaced(words, row_at)
        hits += count_resident(snapshot_at, chosen_at, k)
        touched = take_chosen(words, experts_at, token, touched)
    if words[p.AT_ONCE] == 1:
        fetch_lines(words, touched)  # they come while the weights are computed
    # In a pass of its own: the ids are read sixteen at a time, and would wait for the stores of one by one.
    for token in range(tokens):
        row_at, ids_at = logits_at + token * num_experts * 4, experts_at + token * k * ID
        softmax_weights(row_at, num_experts, ids_at, k, renormalize, weights_at + token * k * 4)
    words[p.HITS], words[p.CHANGED], words[p.NOT_FINITE_LOGITS] = hits, changed, nonfinite
    words[p.TOUCHED_COUNT] = touched
    return 0


@inlined
def _tells_apart(words: npt.NDArray[np.int64], resident: int) -> bool:
    """Whether a bonus can change choices: with none or all resident it would raise nobody, or all alike."""
    return bool(0 < resident < words[p.NUM_EXPERTS] or words[p.DEVICE] != 0)


@inner
def _choose(
    words: npt.NDArray[np.int64], plan: int, logits_at: int, experts_at: int, weights_at: int, tokens: int
) -> int:
    """First pass: experts, weights and totals of every token; NOT_FINITE or 0."""
    resident = _take_snapshot(words[p.RESIDENT], words[p.SNAPSHOT], words[p.NUM_EXPERTS])
    words[p.STRENGTH] = words[p.LOST_MASS] = 0
    if words[p.MEMORY_AWARE] == 1 and _tells_apart(words, resident):
        words[p.STRENGTH] = load(words[p.BONUS])
    if words[p.GENERAL] != 0:
        return choose_generally_at(words[p.GENERAL], plan, logits_at, experts_at, weights_at, tokens)
    bonus = unpack_bonus(words[p.STRENGTH])
    if tokens == 1:  # compiled for one token by itself
        return _choose_plainly(words, bonus, logits_at, experts_at, weights_at, 1)
    return _choose_plainly(words, bonus, logits_at, experts_at, weights_at, tokens)


@inner
def _request_missing(words: npt.NDArray[np.int64]) -> int:
    """Request every touched expert that was not resident; how many requests this call queued."""
    num_experts = words[p.NUM_EXPERTS]
    touched = i64_array(words[p.TOUCHED], num_experts)
    queued = i64_array(words[p.QUEUED], num_experts)
    count = 0
    for i in range(words[p.TOUCHED_COUNT]):
        expert = touched[i]
        if bit_at(words[p.SNAPSHOT], expert) == 1:
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
def _spend(words: npt.NDArray[np.int64], tokens: int, misses: int) -> None:
    """Charge the layer's quality budget with what the bonus changed, if it could change anything."""
    resident = 0
    for i in range((words[p.NUM_EXPERTS] + 63) >> 6):
        resident += count_bits(word_at(words[p.SNAPSHOT] + i * WORD))
    if _tells_apart(words, resident):
        spent = words[p.LOST_MASS]
        if word_at(words[p.BUDGET] + BY_MASS * WORD) == 0:
            spent = words[p.CHANGED] * BONUS_ONE // words[p.TOP_K]
        if words[p.DEVICE] != 0:
            misses = tokens * words[p.TOP_K] - words[p.ON_DEVICE]
        observe(words[p.BUDGET], tokens, spent, misses > 0)


@inner
def _record(words: npt.NDArray[np.int64], experts_at: int, tokens: int) -> int:
    """Second pass: what `route` returns."""
    counters, misses = words[p.COUNTERS], tokens * words[p.TOP_K] - words[p.HITS]
    code: int = misses
    if misses > 0:
        words[p.QUEUED_COUNT] = _request_missing(words)
        fetch_add(counters + LaneCounter.MISSES * WORD, misses)
        if words[p.QUEUED_COUNT] > 0:
            words[p.BELL_WORD] = heard(words[p.BELL], 0)
            if words[p.BELL_WORD] != 0:
                code = misses | RING_BELL
    publish(words, experts_at, tokens)
    if words[p.BUDGET] != 0:
        _spend(words, tokens, misses)
    if words[p.TRAIL] != 0:
        last = experts_at + (tokens - 1) * words[p.TOP_K] * ID
        learn(
            words[p.SUCCESSORS], words[p.SUCCESSOR_ROW_BYTES], words[p.NUM_LAYERS], words[p.NUM_EXPERTS],
            words[p.TRAIL], words[p.LAYER], last, words[p.TOP_K],
        )  # fmt: skip
    store(words[p.CURSOR], words[p.LAYER])
    fetch_add(counters + LaneCounter.CALLS * WORD, 1)
    fetch_add(counters + LaneCounter.TOKENS * WORD, tokens)
    fetch_add(counters + LaneCounter.HITS * WORD, words[p.HITS])
    if words[p.CHANGED] > 0:
        fetch_add(counters + LaneCounter.CHANGED * WORD, words[p.CHANGED])
        fetch_add(counters + LaneCounter.LOST_MASS * WORD, words[p.LOST_MASS])
    if words[p.NOT_FINITE_LOGITS] > 0:
        fetch_add(counters + LaneCounter.NONFINITE * WORD, words[p.NOT_FINITE_LOGITS])
    return code


@kernel(types.int64(types.int64, types.int64, types.int64, types.int64, types.int64))
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
    timed, scale = words[p.TIMED] == 1, words[p.CYCLE_SCALE]
    began = reading(scale) if timed else 0
    words[p.QUEUED_COUNT] = 0
    code = 0
    if tokens > 0:
        take_turn(words, plan, tokens)
        code = _choose(words, plan, logits_at, experts_at, weights_at, tokens)
        if code == 0:
            code = _record(words, experts_at, tokens)
            if words[p.TRACE] != 0:
                append_route(
                    words[p.TRACE], words[p.LAYER], words[p.START], words[p.STRENGTH], words[p.SPREAD_USED],
                    words[p.SNAPSHOT], logits_at, experts_at, weights_at, tokens,
                )  # fmt: skip
            if timed:
                record_duration(words[p.HISTOGRAM], nanoseconds(reading(scale) - began, scale))
    store(plan, p.IDLE)
    return code


@emitted_by(call_at)
def route_at(address: int, plan: int, logits_at: int, experts_at: int, weights_at: int, tokens: int) -> int:
    """`route`, by the address that `c_function` gives; interpreted, the function itself."""
    return route(plan, logits_at, experts_at, weights_at, tokens)


def route_rows(
    plan: int, logits: npt.NDArray[np.float32], experts: npt.NDArray[np.int32], weights: npt.NDArray[np.float32]
) -> int:
    """`route` from Python: [E] or [T, E], [k] or [T, k] twice, of which the caller knows that they are fit for it."""
    tokens = 1 if logits.ndim == 1 else len(logits)
    return int(route(plan, address_of(logits), address_of(experts), address_of(weights), tokens))
