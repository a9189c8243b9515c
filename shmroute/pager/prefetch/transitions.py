"""Predictor: what follows, in the next layer, the experts just chosen in this one (`shmroute.shared.successors`).

Just chosen are those of the layer's latest tick: of several workers under way the one that is about to come to the next
layer was there last.
"""

from __future__ import annotations

from typing import Final

from shmroute.pager.eviction import table as t
from shmroute.pager.prefetch.previous_token import is_recent
from shmroute.shared.atomic import WORD, f64_array, i64_array
from shmroute.shared.kernel import inner
from shmroute.shared.layout import LINE, USE_AFFINITY, USE_BYTES
from shmroute.shared.successors import add_follow_shares
from shmroute.shared.words import SUCCESSORS

LOWEST: Final = 0.2
"""Mean shares under this are no prediction."""


@inner
def score_by_transitions(table: int, successors: int, row_bytes: int, layer: int, scores_at: int) -> None:
    """How often each expert followed those used last in the layer before, on average: float64 [E] at `scores_at`.

    `successors` and `row_bytes` are that table's address, and bytes of a layer.
    """
    words = i64_array(table, t.TABLE_WORDS)
    experts, layers = words[t.NUM_EXPERTS], words[t.NUM_LAYERS]
    scores = f64_array(scores_at, experts)
    for expert in range(experts):
        scores[expert] = 0.0
    before = layer - 1 if layer > 0 else layers - 1
    row, clock = words[t.USES] + before * words[t.USE_ROW_BYTES] + USE_AFFINITY, words[t.CLOCK] + before * LINE
    used = 0
    for expert in range(experts):
        if is_recent(row + expert * USE_BYTES, clock, 1):
            used += 1
            add_follow_shares(successors + before * row_bytes + expert * SUCCESSORS * WORD, scores_at, experts)
    for expert in range(experts):
        share = scores[expert] / max(used, 1)
        scores[expert] = share if share >= LOWEST else 0.0
