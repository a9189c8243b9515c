"""Successors: which experts of the next layer follow an expert's choice, learnt by all workers together.

Each expert has `SUCCESSORS` words, each naming an expert of the next layer and the share of its uses that the other
followed, as a moving average (`RATE` per lesson). So a count saturates, decays where the text changes, and once a
share has fallen below what one sighting is worth, a newcomer takes the word.

A worker learns at one step in `LESSON` from a layer to the next, taken at random: of the experts that its token chose
there, given one of those that it chose before, at random too. The row of layer l is about layer l + 1; the last
layer's is about the first, of the next token.

| who | calls | progress |
|---|---|---|
| any worker | `learn` | wait-free: one CAS for each word, and a lesson that loses is dropped |
| anybody | `follow_shares` | wait-free |

Each word stands for itself, so any mixture of lessons is a valid table, whoever dies in the middle of one. Two workers
may give one newcomer two words of an expert: the shares then split, and the lesser goes in time.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
from numba import types

from shmroute.shared.atomic import WORD, cas, f64_array, i32_array, i64_array, load
from shmroute.shared.kernel import inner, kernel
from shmroute.shared.words import (
    FOLLOW_ONE,
    SUCCESSORS,
    follow_expert,
    follow_share,
    pack_follow,
)

RATE: Final = 1 / 16
"""What one lesson weighs in a share."""

FIRST: Final = 1 / 4
"""The share with which a newcomer begins."""

LESSON: Final = 4
"""A worker learns at one step in so many, a power of two."""

# A worker's memory of what it chose last: private int64.
TRAIL_LAYER: Final = 0  # where; -1 for nowhere
TRAIL_COUNT: Final = 1
TRAIL_CHANCE: Final = 2  # of a linear congruential generator
TRAIL_EXPERTS: Final = 3  # TRAIL_COUNT of them
MOST_CHOSEN: Final = 61
"""Experts of one token that are looked at."""
TRAIL_WORDS: Final = TRAIL_EXPERTS + MOST_CHOSEN


def new_trail() -> npt.NDArray[np.int64]:
    """The memory of a worker that has chosen nothing yet, int64 [TRAIL_WORDS]."""
    trail = np.zeros(TRAIL_WORDS, np.int64)
    trail[TRAIL_LAYER] = -1
    return trail


@inner
def lesson_for(words_at: int, followers_at: int, count: int, num_experts: int) -> None:
    """What one expert's words learn from the `count` experts, int32 at `followers_at`, that followed it."""
    followers = i32_array(followers_at, count)
    known = 0  # which followers have a word, by bits
    least, least_share, least_word = -1, 2.0, 0
    for i in range(SUCCESSORS):
        word = load(words_at + i * WORD)
        named = follow_expert(word) - 1
        share = follow_share(word) / FOLLOW_ONE
        followed = 0
        for j in range(count):
            if followers[j] == named and (known >> j) & 1 == 0:
                followed = 1
                known |= 1 << j
        share += (followed - share) * RATE
        if word != 0 and named < num_experts:
            learnt = pack_follow(named + 1, int(share * FOLLOW_ONE))
            if learnt != word and cas(words_at + i * WORD, word, learnt):
                word = learnt
        else:
            share = 0.0
        if share < least_share:
            least, least_share, least_word = i, share, word
    if least_share >= RATE:
        return
    for j in range(count):
        if (known >> j) & 1 == 0 and 0 <= followers[j] < num_experts:
            cas(words_at + least * WORD, least_word, pack_follow(followers[j] + 1, int(FIRST * FOLLOW_ONE)))
            return


@inner
def learn(
    successors: int, row_bytes: int, num_layers: int, num_experts: int, trail_at: int, layer: int, chosen_at: int,
    count: int,
) -> None:  # fmt: skip
    """Follow a worker from layer to layer: learn, if it is time for a lesson, and remember what it chose.

    Threads of a process share its trail without a lock: what they make of each other's is a wrong lesson at worst.

    Parameters
    ----------
    successors, row_bytes : int
        The table: address, and bytes of a layer.
    trail_at : int
        Address of the worker's memory.
    layer : int
    chosen_at, count : int
        int32 [count], the experts of one token.
    """
    trail, chosen = i64_array(trail_at, TRAIL_WORDS), i32_array(chosen_at, count)
    count = min(count, MOST_CHOSEN)
    before = layer - 1 if layer > 0 else num_layers - 1
    if trail[TRAIL_LAYER] == before:
        trail[TRAIL_CHANCE] = (trail[TRAIL_CHANCE] * 1103515245 + 12345) & 0x7FFFFFFF
        if (trail[TRAIL_CHANCE] >> 16) & (LESSON - 1) == 0:
            known = min(max(trail[TRAIL_COUNT], 1), MOST_CHOSEN)
            expert = trail[TRAIL_EXPERTS + (trail[TRAIL_CHANCE] >> 20) % known]
            if 0 <= expert < num_experts:
                words_at = successors + before * row_bytes + expert * SUCCESSORS * WORD
                lesson_for(words_at, chosen_at, count, num_experts)
    for i in range(count):
        trail[TRAIL_EXPERTS + i] = chosen[i]
    trail[TRAIL_COUNT] = count
    trail[TRAIL_LAYER] = layer


@inner
def add_follow_shares(words_at: int, scores_at: int, num_experts: int) -> None:
    """Add to float64 [num_experts], at an address in private memory, how often each follows one expert."""
    scores = f64_array(scores_at, num_experts)
    for i in range(SUCCESSORS):
        word = load(words_at + i * WORD)
        named = follow_expert(word) - 1
        if 0 <= named < num_experts:
            scores[named] += follow_share(word) / FOLLOW_ONE


@kernel(
    types.void(types.int64, types.int64, types.int64, types.int64, types.int64, types.int64, types.int64, types.int64)
)
def learn_choice(
    successors: int, row_bytes: int, num_layers: int, num_experts: int, trail_at: int, layer: int, chosen_at: int,
    count: int,
) -> None:  # fmt: skip
    """`learn`, from Python."""
    learn(successors, row_bytes, num_layers, num_experts, trail_at, layer, chosen_at, count)
