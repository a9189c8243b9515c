"""What a plan says of the model's scoring and the cache's rule, in the order of the names in `shmroute.config`."""

from __future__ import annotations

from typing import Final

SOFTMAX: Final = 0
SIGMOID: Final = 1

ABSOLUTE: Final = 0
CACHE_PRIOR: Final = 1
MAX_RANK: Final = 2
CUMULATIVE_THRESHOLD: Final = 3
PROBABILITY: Final = 4

GROUP_MAX: Final = 0
GROUP_TOP2_SUM: Final = 1
