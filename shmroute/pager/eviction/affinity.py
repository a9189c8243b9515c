"""The policy by affinity, which the router shares (`shmroute.shared.affinity`)."""

from __future__ import annotations

from shmroute.pager.eviction.table import NEVER
from shmroute.shared.affinity import age_of, decay_power, score_of
from shmroute.shared.kernel import inner
from shmroute.shared.words import LOW32


@inner
def current_affinity(word: int, clock: int, loaded_at: int, boost: float, powers: int) -> float:
    """An expert's present score; `clock` was loaded after `word`.

    A load counts as an activation here, so that a prefetched expert is not the first to go before it could be used.
    """
    score = score_of(word) * decay_power(powers, age_of(word, clock))
    if loaded_at != NEVER:
        score = max(score, boost * decay_power(powers, (clock - loaded_at) & LOW32))
    return score
