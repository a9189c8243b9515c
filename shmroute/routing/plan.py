"""A routing call's fixed arguments, folded into one block of private memory.

A compiled call costs some tens of nanoseconds for each argument, so everything that stays the same from call to call
(addresses, sizes, flags) and all scratch space is written once into a *plan*, and the kernel gets its address. A plan
serves one call at a time; its first word says whether it is in use, and a closed plan refuses, so that no kernel ever
runs on a segment that is being unmapped.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from shmroute.config import GROUP_SCORES, RULES, SCORINGS
from shmroute.routing import plan_words as p
from shmroute.routing.general import choose_generally
from shmroute.routing.quality_budget import BLOCK_WORDS, fill_block
from shmroute.routing.selection import scratch_length
from shmroute.shared.atomic import COMPILED, WORD, forget_views
from shmroute.shared.kernel import c_function
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


class Turns:
    """What the plans of a process know together: who routed last, and how each layer's clock was left.

    Parameters
    ----------
    num_layers : int
    """

    def __init__(self, num_layers: int) -> None:
        self._latest = np.zeros(1, np.int64)
        self._seen = np.zeros((num_layers, 2), np.int64)
        self._seen[:, p.LEFT] = p.NEVER
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
        words = self._block(p.PLAN_WORDS, np.int64)
        self.words = words
        self.address: int = words.ctypes.data

        words[p.NUM_EXPERTS], words[p.TOP_K] = experts, k
        words[p.MEMORY_AWARE] = config.router.memory_aware
        words[p.RENORMALIZE] = config.router.renormalize
        words[p.TIMED] = config.router.metrics
        words[p.SCORING] = SCORINGS.index(config.router.scoring)
        words[p.RULE] = RULES.index(config.router.rule)
        words[p.TOP_J], words[p.MAX_RANK] = config.router.top_j, config.router.max_rank
        words[p.N_GROUP], words[p.TOPK_GROUP] = config.router.n_group, config.router.topk_group
        words[p.GROUP_SCORE] = GROUP_SCORES.index(config.router.group_score)
        self._plain = config.router.is_plain
        words[p.GENERAL] = 0 if self._plain else _general_way()
        words[p.SPREAD] = base + layout.bonus + layer * LINE + BONUS_SPREAD
        words[p.CYCLE_SCALE] = cycle_scale() if config.router.metrics else 0
        words[p.LAYER], words[p.LANE] = layer, lane
        words[p.CLOCK] = base + layout.clock + layer * LINE
        for word, region in (
            (p.EXPERTS, layout.experts),
            (p.FAILURES, layout.failures),
        ):
            words[word] = base + layout.row(region, layer)
        words[p.USES] = base + layout.use_row(layer)
        words[p.RESIDENT] = base + layout.resident + layer * layout.resident_row_bytes
        words[p.BONUS] = base + layout.bonus + layer * LINE
        words[p.RING], words[p.RING_BITS] = base + layout.ring, layout.ring_bits
        words[p.BELL] = base + HEADER_BELL
        words[p.CURSOR] = base + layout.lane(lane) + LANE_CURSOR
        words[p.COUNTERS] = base + layout.lane(lane) + LANE_SHARD
        words[p.HISTOGRAM] = words[p.COUNTERS] + LANE_COUNTERS * WORD
        words[p.POWERS] = powers
        words[p.TRAIL], words[p.NUM_LAYERS] = trail, config.num_layers
        words[p.SUCCESSORS], words[p.SUCCESSOR_ROW_BYTES] = base + layout.successors, layout.successor_row_bytes

        parameters = self._block(p.PARAMETER_COUNT, np.float64)
        parameters[p.BOOST], parameters[p.MAX_SCORE] = config.affinity.activation_boost, config.affinity.max_score
        parameters[p.SCALING] = config.router.routed_scaling_factor
        parameters[p.HOST_SHARE] = config.router.host_share
        words[p.PARAMETERS] = parameters.ctypes.data
        for word, count, dtype in (
            (p.SNAPSHOT, -(-experts // 64), np.int64),
            (p.SCORES, scratch_length(experts), np.float64),
            (p.CANDIDATES, scratch_length(experts), np.int32),
            (p.CHOSEN, scratch_length(experts), np.int32),
            (p.OWN, scratch_length(experts), np.int32),
            (p.FOUND, scratch_length(experts), np.int32),
            (p.CORRECTION_BIAS, scratch_length(experts), np.float32),
            (p.CHOOSING, scratch_length(experts), np.float32),
            (p.SHARES, scratch_length(experts), np.float32),
            (p.OTHERS, scratch_length(experts), np.float32),
            (p.GROUPS, scratch_length(experts), np.float32),
            (p.PREFERRED, -(-experts // 64), np.int64),
            (p.MAPS, 2 * experts, np.float64),
            (p.TIMES, experts + 1, np.int64),
            (p.TOUCHED, experts + 1, np.int64),
            (p.READ, experts, np.int64),
            (p.PENDING, p.TOKENS_PUT_OFF * k, np.int32),
            (p.QUEUED, experts, np.int64),
        ):
            words[word] = self._block(count, dtype).ctypes.data
        self.queued = self._scratch[-1]
        words[p.NEAREST] = words[p.SNAPSHOT]
        words[p.MOST_PENDING] = p.TOKENS_PUT_OFF
        words[p.LATEST], words[p.SEEN] = turns.latest, turns.seen(layer)
        self._turns = turns
        if config.router.quality_budget is not None and layer >= config.router.spared_layers:
            block = self._block(BLOCK_WORDS, np.int64)
            fill_block(block, int(words[p.BONUS]), config)
            words[p.BUDGET] = block.ctypes.data

    def set_correction_bias(self, bias: np.ndarray[Any, Any]) -> None:
        """Choose by another correction bias, float32 [E], from the next call on.

        It goes into a new block, whose address is one word: a call under way goes on with the former one.
        """
        block = self._block(scratch_length(len(bias)), np.float32)
        block[: len(bias)] = bias
        self.words[p.CORRECTION_BIAS] = block.ctypes.data

    def set_device(self, bitmap: np.ndarray[Any, Any] | None) -> None:
        """Know a nearer tier than host memory, int64 [⌈E/64⌉] that the owner changes at will, from the next call on.

        A call under way may find it half made known: then it gives residents the share of host memory, once.
        """
        words = self.words
        if bitmap is None:
            words[p.DEVICE] = 0
            words[p.NEAREST] = words[p.SNAPSHOT]
            words[p.GENERAL] = 0 if self._plain else _general_way()
            return
        self._scratch.append(bitmap)
        words[p.NEAREST] = self._block(len(bitmap), np.int64).ctypes.data
        words[p.GENERAL] = _general_way()
        words[p.DEVICE] = bitmap.ctypes.data

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
        self.words[p.STATUS] = p.CLOSED


def _general_way() -> int:
    """A plan's GENERAL, if it cannot do without."""
    return c_function(choose_generally) if COMPILED else 1
