"""Predictor: a worker's next token chooses what its last one chose in the same layer.

What each worker chose last nobody keeps, but an expert's affinity word says when it was used last: with W workers under
way, the layer's W latest ticks are about one token of each.
"""

from __future__ import annotations

from shmroute.pager.eviction import table as t
from shmroute.shared.affinity import age_of, score_of
from shmroute.shared.atomic import f64_array, i64_array, load
from shmroute.shared.kernel import inner
from shmroute.shared.layout import LINE, USE_AFFINITY, USE_BYTES


@inner
def is_recent(words_at: int, clock_at: int, workers: int) -> bool:
    """Whether one of the workers' last tokens used an expert, by its affinity word."""
    word = load(words_at)
    age = age_of(word, load(clock_at))  # after the word
    return bool(score_of(word) > 0 and age < workers)


@inner
def score_by_previous_token(table: int, layer: int, scores_at: int) -> None:
    """1 for each expert that a worker's last token used, else 0, to float64 [E] at `scores_at`."""
    words = i64_array(table, t.TABLE_WORDS)
    experts = words[t.NUM_EXPERTS]
    scores = f64_array(scores_at, experts)
    row, clock = words[t.USES] + layer * words[t.USE_ROW_BYTES] + USE_AFFINITY, words[t.CLOCK] + layer * LINE
    for expert in range(experts):
        scores[expert] = 1.0 if is_recent(row + expert * USE_BYTES, clock, words[t.WORKERS]) else 0.0
