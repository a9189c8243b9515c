"""A routing call's fixed arguments, folded into one block of private memory.

A compiled call costs some tens of nanoseconds for each argument, so everything that stays the same from call to call
(addresses, sizes, flags) and all scratch space is written once into a *plan*, and the kernel gets its address. A plan
serves one call at a time; its first word says whether it is in use, and a closed plan refuses, so that no kernel ever
runs on a segment that is being unmapped.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numba import types

from shmroute.config import GROUP_SCORES, RULES, SCORINGS
from shmroute.routing.selection import scratch_length
from shmroute.shared.atomic import WORD, cas, forget_views, load
from shmroute.shared.kernel import kernel
from shmroute.shared.layout import (
    BONUS_SPREAD,
    HEADER_BELL,
    LANE_CURSOR,
    LANE_SHARD,
    LINE,
)
from shmroute.shared.metrics import LANE_COUNTERS
from shmroute.shared.stopwatch import cycle_scale
from shmroute.shared.tables import Tables

# Words of a plan.
STATUS: Final = 0
NUM_EXPERTS: Final = 1
TOP_K: Final = 2
MEMORY_AWARE: Final = 3
RENORMALIZE: Final = 4
TIMED: Final = 5
LAYER: Final = 6
LANE: Final = 7
CLOCK: Final = 8
AFFINITY: Final = 9
ACTIVATIONS: Final = 10
EXPERTS: Final = 11
FAILURES: Final = 12
RESIDENT: Final = 13
BONUS: Final = 14
RING: Final = 15
RING_BITS: Final = 16
BELL: Final = 17
CURSOR: Final = 18
COUNTERS: Final = 19
HISTOGRAM: Final = 20
POWERS: Final = 21
PARAMETERS: Final = 22  # float64 [PARAMETER_COUNT]
SNAPSHOT: Final = 23  # int64 [⌈E/64⌉]
SCORES: Final = 24  # float64, of `scratch_length`
CANDIDATES: Final = 25  # int32 likewise
CHOSEN: Final = 26  # int32 likewise
MAPS: Final = 27  # float64 [E, 2], per expert: b and c of its map
TIMES: Final = 28  # int64 [E + 1], how often the call chose an expert; all 0 between calls
TOUCHED: Final = 29  # int64 [E + 1], the experts that it chose, each once, in order; then rubbish
QUEUED: Final = 30  # int64 [E], requests that the call pushed
CYCLE_SCALE: Final = 31  # see `shmroute.shared.stopwatch`
# Written by a call.
QUEUED_COUNT: Final = 32
BAD_ROW: Final = 33
BAD_FINITE: Final = 34
BELL_WORD: Final = 35
HITS: Final = 36
CHANGED: Final = 37  # choices that the bonus changed
NOT_FINITE_LOGITS: Final = 38
TOUCHED_COUNT: Final = 39
# Objects of Python's, by address; see `shmroute.routing.entry`.
ARRAY_TYPE: Final = 40
FLOAT32: Final = 41
INT32: Final = 42
FALLBACK: Final = 43
FINISH: Final = 44
# The model's scoring and the rule of the cache; see `shmroute.routing.rules` for the codes.
OWN: Final = 45  # int32, of `scratch_length`: the experts that a token would have without the cache
GENERAL: Final = 46  # 0: softmax scores, one group, no scaling, the absolute rule
SCORING: Final = 47
RULE: Final = 48
TOP_J: Final = 49
MAX_RANK: Final = 50
N_GROUP: Final = 51
TOPK_GROUP: Final = 52
GROUP_SCORE: Final = 53
CORRECTION_BIAS: Final = 54  # float32 [E]
SPREAD: Final = 55
CHOOSING: Final = 56  # float32 of `scratch_length`: choosing scores
SHARES: Final = 57  # likewise: probabilities, not scaled to any sum
OTHERS: Final = 58  # likewise: choosing scores of what a rule may admit
GROUPS: Final = 59  # likewise, per group
PREFERRED: Final = 60  # int64 [⌈E/64⌉]
FOUND: Final = 61  # int32 of `scratch_length`
# Written by a call.
STRENGTH: Final = 62  # the bonus word by which it chose, 0 if the cache could change nothing
SPREAD_USED: Final = 63  # the spread word by which it chose, 0 unless the rule is cache-prior
LOST_MASS: Final = 64  # probability that changed choices lost, in units of 1 / MASS_ONE
PLAN_WORDS: Final = 65

# Float64 at PARAMETERS.
BOOST: Final = 0
MAX_SCORE: Final = 1
SCALING: Final = 2
SPREAD_SUM: Final = 3  # of the tokens of a call
PARAMETER_COUNT: Final = 4

IDLE: Final = 0
IN_USE: Final = 1
CLOSED: Final = 2


@kernel(types.void(types.int64))
def close_plan(plan: int) -> None:
    """Wait until a plan is idle and close it."""
    while not cas(plan + STATUS * WORD, IDLE, CLOSED):
        if load(plan + STATUS * WORD) == CLOSED:
            return


class Plan:
    """The plan of one layer's router.

    Parameters
    ----------
    segment : Tables
        A segment, or what stands for one.
    layer, lane : int
    powers : int
        Address of the affinity's power table, which outlives the plan.
    """

    def __init__(self, segment: Tables, layer: int, lane: int, powers: int) -> None:
        config, layout, base = segment.config, segment.layout, segment.address
        experts, k = config.num_experts, config.top_k
        self._scratch: list[np.ndarray[Any, Any]] = []
        words = self._block(PLAN_WORDS, np.int64)
        self.words = words
        self.address: int = words.ctypes.data

        words[NUM_EXPERTS], words[TOP_K] = experts, k
        words[MEMORY_AWARE] = config.router.memory_aware
        words[RENORMALIZE] = config.router.renormalize
        words[TIMED] = config.router.metrics
        words[SCORING] = SCORINGS.index(config.router.scoring)
        words[RULE] = RULES.index(config.router.rule)
        words[TOP_J], words[MAX_RANK] = config.router.top_j, config.router.max_rank
        words[N_GROUP], words[TOPK_GROUP] = config.router.n_group, config.router.topk_group
        words[GROUP_SCORE] = GROUP_SCORES.index(config.router.group_score)
        words[GENERAL] = not config.router.is_plain
        words[SPREAD] = base + layout.bonus + layer * LINE + BONUS_SPREAD
        words[CYCLE_SCALE] = cycle_scale() if config.router.metrics else 0
        words[LAYER], words[LANE] = layer, lane
        words[CLOCK] = base + layout.clock + layer * LINE
        for word, region in (
            (AFFINITY, layout.affinity),
            (ACTIVATIONS, layout.activations),
            (EXPERTS, layout.experts),
            (FAILURES, layout.failures),
        ):
            words[word] = base + layout.row(region, layer)
        words[RESIDENT] = base + layout.resident + layer * layout.resident_row_bytes
        words[BONUS] = base + layout.bonus + layer * LINE
        words[RING], words[RING_BITS] = base + layout.ring, layout.ring_bits
        words[BELL] = base + HEADER_BELL
        words[CURSOR] = base + layout.lane(lane) + LANE_CURSOR
        words[COUNTERS] = base + layout.lane(lane) + LANE_SHARD
        words[HISTOGRAM] = words[COUNTERS] + LANE_COUNTERS * WORD
        words[POWERS] = powers

        parameters = self._block(PARAMETER_COUNT, np.float64)
        parameters[BOOST], parameters[MAX_SCORE] = config.affinity.activation_boost, config.affinity.max_score
        parameters[SCALING] = config.router.routed_scaling_factor
        words[PARAMETERS] = parameters.ctypes.data
        for word, count, dtype in (
            (SNAPSHOT, -(-experts // 64), np.int64),
            (SCORES, scratch_length(experts), np.float64),
            (CANDIDATES, scratch_length(experts), np.int32),
            (CHOSEN, scratch_length(experts), np.int32),
            (OWN, scratch_length(experts), np.int32),
            (FOUND, scratch_length(experts), np.int32),
            (CORRECTION_BIAS, scratch_length(experts), np.float32),
            (CHOOSING, scratch_length(experts), np.float32),
            (SHARES, scratch_length(experts), np.float32),
            (OTHERS, scratch_length(experts), np.float32),
            (GROUPS, scratch_length(experts), np.float32),
            (PREFERRED, -(-experts // 64), np.int64),
            (MAPS, 2 * experts, np.float64),
            (TIMES, experts + 1, np.int64),
            (TOUCHED, experts + 1, np.int64),
            (QUEUED, experts, np.int64),
        ):
            words[word] = self._block(count, dtype).ctypes.data
        self.queued = self._scratch[-1]

    def set_correction_bias(self, bias: np.ndarray[Any, Any]) -> None:
        """Choose by another correction bias, float32 [E], from the next call on.

        It goes into a new block, whose address is one word: a call under way goes on with the former one.
        """
        block = self._block(scratch_length(len(bias)), np.float32)
        block[: len(bias)] = bias
        self.words[CORRECTION_BIAS] = block.ctypes.data

    def _block(self, count: int, dtype: Any) -> np.ndarray[Any, Any]:
        block = np.zeros(count, dtype)
        self._scratch.append(block)
        return block

    def close(self) -> None:
        """Wait for the call under way, if any, and refuse all further ones."""
        close_plan(self.address)
        forget_views(self.address, self.words.nbytes)

    def abandon(self) -> None:
        """Refuse all calls from now on, without waiting: for a forked child, where a caller may not exist."""
        self.words[STATUS] = CLOSED
