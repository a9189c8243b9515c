"""What an expert is worth by the pager's policy, among those of its layer and among all."""

from __future__ import annotations

from shmroute.pager.eviction import names
from shmroute.pager.eviction import table as t
from shmroute.pager.eviction.affinity import current_affinity
from shmroute.pager.eviction.frequency import (
    decayed_frequency,
    least_frequently_and_recently_used,
    least_frequently_used,
)
from shmroute.pager.eviction.next_token import lift_of
from shmroute.pager.eviction.next_use import rank_by_odds, tokens_until_use
from shmroute.pager.eviction.recency import least_recently_used, least_stale
from shmroute.shared.affinity import age_of
from shmroute.shared.atomic import f64_array, i64_array, load
from shmroute.shared.kernel import inner
from shmroute.shared.layout import LINE, USE_AFFINITY, USE_BYTES
from shmroute.shared.words import LOW32


@inner
def _latest(table: int, key: int) -> tuple[int, int, int]:
    """An expert's affinity word, its layer's clock, and the tick at which it was loaded."""
    words = i64_array(table, t.TABLE_WORDS)
    experts = words[t.NUM_EXPERTS]
    layer = key // experts
    word = load(words[t.USES] + layer * words[t.USE_ROW_BYTES] + key % experts * USE_BYTES + USE_AFFINITY)
    clock = load(words[t.CLOCK] + layer * LINE)  # after the word, as `age_of` demands
    return word, clock, i64_array(words[t.LOADED_AT], words[t.NUM_LAYERS] * experts)[key]


@inner
def affinity_of(table: int, key: int) -> float:
    """An expert's present affinity."""
    words = i64_array(table, t.TABLE_WORDS)
    word, clock, loaded_at = _latest(table, key)
    return current_affinity(word, clock, loaded_at, f64_array(words[t.NUMBERS], 4)[t.BOOST], words[t.POWERS])


@inner
def last_use(table: int, key: int) -> int:
    """Ticks of its layer since an expert was used or loaded."""
    word, clock, loaded_at = _latest(table, key)
    age = age_of(word, clock)
    if loaded_at != t.NEVER:
        age = min(age, (clock - loaded_at) & LOW32)
    return age


@inner
def worth_of(table: int, key: int) -> float:
    """What an expert is worth among those of its layer, by the pager's policy."""
    words = i64_array(table, t.TABLE_WORDS)
    size = words[t.NUM_LAYERS] * words[t.NUM_EXPERTS]
    policy = words[t.POLICY]
    if policy == names.NEXT_USE:
        numbers = f64_array(words[t.NUMBERS], 4)
        return rank_by_odds(
            f64_array(words[t.FAST], size)[key], f64_array(words[t.SLOW], size)[key], last_use(table, key),
            lift_of(table, key), words[t.WORKERS], numbers[t.PRIOR], numbers[t.LAST_TOKEN], numbers[t.TOKEN_BEFORE],
        )  # fmt: skip
    if policy == names.AFFINITY:
        return affinity_of(table, key)
    if policy == names.LRU:
        return least_recently_used(i64_array(words[t.LAST_USED], size)[key])
    if policy == names.LFU:
        return least_frequently_used(i64_array(words[t.SEEN_TOTAL], size)[key])
    if policy == names.LFRU:
        return least_frequently_and_recently_used(i64_array(words[t.SEEN_TOTAL], size)[key], last_use(table, key))
    if policy == names.LEAST_STALE:
        return least_stale(last_use(table, key), words[t.WORKERS])
    return decayed_frequency(f64_array(words[t.FAST], size)[key])


@inner
def tie_of(table: int, key: int) -> int:
    """Of experts that are worth the same, the one with the lower number goes first: the one used longer ago."""
    words = i64_array(table, t.TABLE_WORDS)
    if words[t.POLICY] == names.AFFINITY:
        return -last_use(table, key)
    return int(i64_array(words[t.LAST_USED], words[t.NUM_LAYERS] * words[t.NUM_EXPERTS])[key])


@inner
def worth_among_all(table: int, worth: float) -> float:
    """The same among those of all layers, apart from how soon a worker comes to the layer.

    For the expected next use it is minus the layers that a worker passes until then: a power is taken for each layer's
    candidate, not for each expert.
    """
    words = i64_array(table, t.TABLE_WORDS)
    if words[t.POLICY] != names.NEXT_USE:
        return worth
    tokens = tokens_until_use(worth, f64_array(words[t.NUMBERS], 4)[t.PRIOR])
    return float(-tokens * words[t.NUM_LAYERS] / words[t.WORKERS])
