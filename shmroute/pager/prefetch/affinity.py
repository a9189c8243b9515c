"""Predictor: what was used much of late will be used again (`shmroute.shared.affinity`)."""

from __future__ import annotations

from typing import Final

from shmroute.pager.eviction import table as t
from shmroute.shared.affinity import current_score
from shmroute.shared.atomic import f64_array, i64_array
from shmroute.shared.kernel import inner
from shmroute.shared.layout import LINE, USE_AFFINITY, USE_BYTES

LOWEST: Final = 1e-3
"""Affinities under this are noise: nobody used the expert of late."""


@inner
def score_by_affinity(table: int, layer: int, scores_at: int) -> None:
    """Each expert's present affinity, to float64 [E] at `scores_at`; 0 for noise."""
    words = i64_array(table, t.TABLE_WORDS)
    experts = words[t.NUM_EXPERTS]
    scores = f64_array(scores_at, experts)
    row, clock = words[t.USES] + layer * words[t.USE_ROW_BYTES] + USE_AFFINITY, words[t.CLOCK] + layer * LINE
    for expert in range(experts):
        score = current_score(row + expert * USE_BYTES, clock, words[t.POWERS])
        scores[expert] = score if score >= LOWEST else 0.0
