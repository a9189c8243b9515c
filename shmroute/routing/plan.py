"""A routing call's fixed arguments, folded into one block of private memory.

A compiled call costs some tens of nanoseconds for each argument, so everything that stays the same from call to call
(addresses, sizes, flags) and all scratch space is written once into a *plan*, and the kernel gets its address. A plan
serves one call at a time; its first word says whether it is in use, and a closed plan refuses, so that no kernel ever
runs on a segment that is being unmapped.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np

from shmroute.config import GROUP_SCORES, RULES, SCORINGS
from shmroute.routing.quality_budget import BLOCK_WORDS, fill_block
from shmroute.routing.selection import scratch_length
from shmroute.shared.atomic import WORD, forget_views
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
USES: Final = 9
READ: Final = 10  # int64 [E], the affinity words that a batch starts from
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
# For recording; see `shmroute.recording`.
TRACE: Final = 65  # address of the recorder's words; 0: nothing is recorded
START: Final = 66  # written by a call: the layer's clock at its first token
# For publication; see `shmroute.routing.publication`.
SEEN: Final = 67  # int64 [2]: LEFT and SHARED of the layer, for both plans of its router
LATEST: Final = 68  # int64 [1]: address of the plan that routed last in this process, 0 before
MOST_PENDING: Final = 69  # tokens that are put off at most; 0: none ever
PENDING_TOKENS: Final = 70  # put off
PENDING: Final = 71  # int32 [MOST_PENDING, k], their experts
AT_ONCE: Final = 72  # written by a call: whether it publishes its tokens
# What steers, and what learns.
BUDGET: Final = 73  # address of int64 [BLOCK_WORDS], see `shmroute.routing.quality_budget`; 0 without a budget
TRAIL: Final = 74  # the worker's memory, see `shmroute.shared.successors`; 0 if nothing is learnt
SUCCESSORS: Final = 75  # that table, and bytes of a layer
SUCCESSOR_ROW_BYTES: Final = 76
NUM_LAYERS: Final = 77
PLAN_WORDS: Final = 78

# Float64 at PARAMETERS.
BOOST: Final = 0
MAX_SCORE: Final = 1
SCALING: Final = 2
SPREAD_SUM: Final = 3  # of the tokens of a call
PARAMETER_COUNT: Final = 4

# Of `SEEN`.
LEFT: Final = 0  # the clock as this process left it, NEVER before
SHARED: Final = 1  # 1 if somebody else had moved it when this process last did
NEVER: Final = -1

TOKENS_PUT_OFF: Final = 16
"""The `MOST_PENDING` of every plan."""

IDLE: Final = 0
IN_USE: Final = 1
CLOSED: Final = 2


class Turns:
    """What the plans of a process know together: who routed last, and how each layer's clock was left.

    Parameters
    ----------
    num_layers : int
    """

    def __init__(self, num_layers: int) -> None:
        self._latest = np.zeros(1, np.int64)
        self._seen = np.zeros((num_layers, 2), np.int64)
        self._seen[:, LEFT] = NEVER
        self.latest: int = self._latest.ctypes.data

    def seen(self, layer: int) -> int:
        """Address of a layer's `SEEN`."""
        return int(self._seen[layer].ctypes.data)


class Plan:
    """The plan of one layer's router.

    Parameters
    ----------
    segment : Tables
        A segment, or what stands for one.
    layer, lane : int
    powers : int
        Address of the affinity's power table, which outlives the plan.
    turns : Turns
        Of the process.
    trail : int
        Address of the worker's memory of what it chose last, which outlives it too; 0 if successors are not learnt.
    """

    def __init__(self, segment: Tables, layer: int, lane: int, powers: int, turns: Turns, trail: int = 0) -> None:
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
            (EXPERTS, layout.experts),
            (FAILURES, layout.failures),
        ):
            words[word] = base + layout.row(region, layer)
        words[USES] = base + layout.use_row(layer)
        words[RESIDENT] = base + layout.resident + layer * layout.resident_row_bytes
        words[BONUS] = base + layout.bonus + layer * LINE
        words[RING], words[RING_BITS] = base + layout.ring, layout.ring_bits
        words[BELL] = base + HEADER_BELL
        words[CURSOR] = base + layout.lane(lane) + LANE_CURSOR
        words[COUNTERS] = base + layout.lane(lane) + LANE_SHARD
        words[HISTOGRAM] = words[COUNTERS] + LANE_COUNTERS * WORD
        words[POWERS] = powers
        words[TRAIL], words[NUM_LAYERS] = trail, config.num_layers
        words[SUCCESSORS], words[SUCCESSOR_ROW_BYTES] = base + layout.successors, layout.successor_row_bytes

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
            (READ, experts, np.int64),
            (PENDING, TOKENS_PUT_OFF * k, np.int32),
            (QUEUED, experts, np.int64),
        ):
            words[word] = self._block(count, dtype).ctypes.data
        self.queued = self._scratch[-1]
        words[MOST_PENDING] = TOKENS_PUT_OFF
        words[LATEST], words[SEEN] = turns.latest, turns.seen(layer)
        self._turns = turns
        if config.router.quality_budget is not None:
            block = self._block(BLOCK_WORDS, np.int64)
            fill_block(block, int(words[BONUS]), config)
            words[BUDGET] = block.ctypes.data

    def set_correction_bias(self, bias: np.ndarray[Any, Any]) -> None:
        """Choose by another correction bias, float32 [E], from the next call on.

        It goes into a new block, whose address is one word: a call under way goes on with the former one.
        """
        block = self._block(scratch_length(len(bias)), np.float32)
        block[: len(bias)] = bias
        self.words[CORRECTION_BIAS] = block.ctypes.data

    def _block(self, count: int, dtype: Any) -> np.ndarray[Any, Any]:
        """Private memory that begins on a line: vectors in it are on no more lines than they must be."""
        size = count * np.dtype(dtype).itemsize
        raw = np.zeros(size + LINE, np.uint8)
        begin = -raw.ctypes.data % LINE
        block: np.ndarray[Any, Any] = raw[begin : begin + size].view(dtype)
        self._scratch.append(block)
        return block

    def forget(self) -> None:
        """Let go of what interpreted kernels keep of a closed plan."""
        forget_views(self.address, self.words.nbytes)

    def abandon(self) -> None:
        """Refuse all calls from now on, without waiting: for a forked child, where a caller may not exist."""
        self.words[STATUS] = CLOSED
