"""The absent experts of a layer that a predictor likes best, and how soon any expert is expected to be used."""

from __future__ import annotations

from typing import Final

from numba import types

from shmroute.pager.eviction import table as t
from shmroute.pager.eviction.next_token import lift_of
from shmroute.pager.eviction.next_use import rank_by_odds, tokens_until_use
from shmroute.pager.eviction.worth import last_use
from shmroute.pager.prefetch.affinity import score_by_affinity
from shmroute.pager.prefetch.previous_token import score_by_previous_token
from shmroute.pager.prefetch.transitions import score_by_transitions
from shmroute.shared.atomic import WORD, f64_array, i64_array, load
from shmroute.shared.kernel import kernel
from shmroute.shared.metrics import Predictor
from shmroute.shared.words import ABSENT, expert_state

AFFINITY: Final = int(Predictor.AFFINITY)
PREVIOUS_TOKEN: Final = int(Predictor.PREVIOUS_TOKEN)


@kernel(
    types.int64(
        types.int64, types.int64, types.int64, types.int64, types.int64, types.int64, types.int64, types.int64
    )
)  # fmt: skip
def find_candidates(
    table: int, successors: int, row_bytes: int, predictor: int, layer: int, scores_at: int, keys_at: int, count: int
) -> int:
    """The `count` absent experts of a layer that a predictor scores highest; how many there are.

    Parameters
    ----------
    table : int
        Of the eviction policy (`shmroute.pager.eviction.table`).
    successors, row_bytes : int
        The table of successors: address, and bytes of a layer.
    predictor : int
        One of `names.BY_PAGER`.
    scores_at : int
        Scratch, float64 [E].
    keys_at : int
        int64 [count], written: keys, best first, the lower first where scores are equal.
    """
    words = i64_array(table, t.TABLE_WORDS)
    experts = words[t.NUM_EXPERTS]
    if predictor == AFFINITY:
        score_by_affinity(table, layer, scores_at)
    elif predictor == PREVIOUS_TOKEN:
        score_by_previous_token(table, layer, scores_at)
    else:
        score_by_transitions(table, successors, row_bytes, layer, scores_at)
    scores, best = f64_array(scores_at, experts), i64_array(keys_at, count)
    found = 0
    row = words[t.EXPERTS] + layer * words[t.ROW_BYTES]
    for expert in range(experts):
        score = scores[expert]
        if score <= 0 or expert_state(load(row + expert * WORD)) != ABSENT:
            continue
        if found == count and score <= scores[best[count - 1] - layer * experts]:
            continue
        found = min(found + 1, count)
        rank = found - 1
        while rank > 0 and scores[best[rank - 1] - layer * experts] < score:
            best[rank] = best[rank - 1]
            rank -= 1
        best[rank] = layer * experts + expert
    return found


@kernel(types.float64(types.int64, types.int64))
def layers_until_use(table: int, key: int) -> float:
    """Layers that a worker passes, on average, until one uses an expert: see `shmroute.pager.eviction.next_use`.

    By what the pager has seen of the expert, whatever the eviction policy is.
    """
    words = i64_array(table, t.TABLE_WORDS)
    layers, size = words[t.NUM_LAYERS], words[t.NUM_LAYERS] * words[t.NUM_EXPERTS]
    numbers = f64_array(words[t.NUMBERS], 4)
    rank = rank_by_odds(
        f64_array(words[t.FAST], size)[key], f64_array(words[t.SLOW], size)[key], last_use(table, key),
        lift_of(table, key), words[t.WORKERS], numbers[t.PRIOR], numbers[t.LAST_TOKEN], numbers[t.TOKEN_BEFORE],
    )  # fmt: skip
    ahead = i64_array(words[t.AHEAD], layers)[key // words[t.NUM_EXPERTS]]
    return float(ahead + tokens_until_use(rank, numbers[t.PRIOR]) * layers / words[t.WORKERS])
