"""Choosing by whatever scoring and rule there is: the long way, next to `route`'s short one for the usual case.

It is a kernel of its own, which `route` calls by its address, in the plan: so the short way is small enough to stay in
the processor's caches, and two processes can compile the two ways at once.
"""

from __future__ import annotations

from numba import types

from shmroute.routing import plan_words as p
from shmroute.routing.publication import fetch_lines, refuse, take_chosen
from shmroute.routing.rules import choose_by_rule, model_weights, take_nearest
from shmroute.routing.selection import ID, count_resident
from shmroute.routing.spread import give_spread, take_spread
from shmroute.shared.atomic import WORD, fetch_add, i64_array
from shmroute.shared.emitted import call_at, emitted_by
from shmroute.shared.kernel import kernel
from shmroute.shared.metrics import LaneCounter
from shmroute.shared.words import unpack_bonus


@kernel(types.int64(types.int64, types.int64, types.int64, types.int64, types.int64))
def choose_generally(plan: int, logits_at: int, experts_at: int, weights_at: int, tokens: int) -> int:
    """Experts and weights of every token, for `route`, which has taken the snapshot; NOT_FINITE or 0."""
    words = i64_array(plan, p.PLAN_WORDS)
    num_experts, k, strength = words[p.NUM_EXPERTS], words[p.TOP_K], unpack_bonus(words[p.STRENGTH])
    spread = take_spread(words)
    words[p.CHANGED] = words[p.NOT_FINITE_LOGITS] = 0
    if words[p.DEVICE] != 0:
        take_nearest(words)
    hits = near = touched = 0
    for token in range(tokens):
        choosable = choose_by_rule(words, logits_at + token * num_experts * 4, strength, spread)
        if choosable < k:
            return refuse(words, token, choosable, touched)
        hits += count_resident(words[p.SNAPSHOT], words[p.CHOSEN], k)
        near += count_resident(words[p.NEAREST], words[p.CHOSEN], k)
        touched = take_chosen(words, experts_at, token, touched)
    if words[p.AT_ONCE] == 1:
        fetch_lines(words, touched)  # they come while the weights are computed
    for token in range(tokens):
        model_weights(
            words, logits_at + token * num_experts * 4, experts_at + token * k * ID, weights_at + token * k * 4
        )  # fmt: skip
    words[p.HITS], words[p.TOUCHED_COUNT] = hits, touched
    if words[p.DEVICE] != 0:
        words[p.ON_DEVICE] = near
        fetch_add(words[p.COUNTERS] + LaneCounter.DEVICE_HITS * WORD, near)
    give_spread(words, tokens)
    return 0


@emitted_by(call_at)
def choose_generally_at(address: int, plan: int, logits: int, experts: int, weights: int, tokens: int) -> int:
    """`choose_generally`, by the address that `c_function` gives; interpreted, the function itself."""
    return choose_generally(plan, logits, experts, weights, tokens)
