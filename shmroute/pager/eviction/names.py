"""The names of the eviction policies, as `PagerConfig` and the command line take them."""

from __future__ import annotations

from typing import Final

LRU: Final = 0
LFU: Final = 1
LFRU: Final = 2
DECAYED_FREQUENCY: Final = 3
LEAST_STALE: Final = 4
AFFINITY: Final = 5
NEXT_USE: Final = 6

POLICIES: Final[dict[str, int]] = {
    "lru": LRU,
    "lfu": LFU,
    "lfru": LFRU,
    "decayed-frequency": DECAYED_FREQUENCY,
    "least-stale": LEAST_STALE,
    "affinity": AFFINITY,
    "expected-next-use": NEXT_USE,
}
DEFAULT_POLICY: Final = "expected-next-use"
