"""What a routing call returns, and a plan's scoring and rule in the order of the names in `shmroute.config`."""

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

# A call returns the (token, expert) pairs that missed, with RING_BELL set if the pager must be woken; or one of these.
RING_BELL: Final = 1 << 40
BAD_ARRAY: Final = -1  # of another shape than the plan's, or not aligned
NOT_FINITE: Final = -2
BUSY: Final = -3
REFUSED: Final = -4
