"""The words by which the kernels of this package find what they read and write.

A table is int64, private to the pager: addresses of shared regions, of the pager's own arrays, and a few numbers. Keys
are ``layer * num_experts + expert``.
"""

from __future__ import annotations

from typing import Final

# Shared regions; only an eviction writes, to words of experts and the bitmap.
EXPERTS: Final = 0
USES: Final = 1
USE_ROW_BYTES: Final = 2
CLOCK: Final = 3
LANES: Final = 4
LANE_BYTES: Final = 5
MAX_WORKERS: Final = 6
ROW_BYTES: Final = 7
NUM_LAYERS: Final = 8
NUM_EXPERTS: Final = 9
POWERS: Final = 10  # the affinity's power table
POLICY: Final = 11

# Of each slot.
SLOTS: Final = 12
OWNERS: Final = 13  # int64 [slots]: the key in it, -1 for none

# Of each expert, by key.
SEEN_TOTAL: Final = 14  # int64: its activations when last looked at
LAST_USED: Final = 15  # int64: the observation that saw it used, or its load
LOADED_AT: Final = 16  # int64: its layer's tick when it was loaded, NEVER if a former pager did
FAST: Final = 17  # float64: its share of the latest tokens
SLOW: Final = 18  # float64: its share of many tokens

# Of each layer.
SEEN_CLOCK: Final = 19  # int64
AHEAD: Final = 20  # int64: layers until some worker comes to it, 1 … num_layers
CHANGED: Final = 21  # int64: UNCHANGED, PASSED_OVER or OUTDATED
CANDIDATE: Final = 22  # int64: the key that would go first, -1 for none
WORTH: Final = 23  # float64: the candidate's
TIE: Final = 24  # int64: likewise; of equal worth, the lower goes first

# Of each lane.
SEEN_CURSOR: Final = 25  # int64
MOVED_AT: Final = 26  # int64: layer ticks seen in all when its cursor last moved, NEVER before

# Single numbers.
OBSERVATION: Final = 27  # how often something new was seen
TICKS: Final = 28  # layer ticks seen, of all layers together
WORKERS: Final = 29  # that move
NEXT_LAYER: Final = 30  # where the search for changed layers goes on
NUMBERS: Final = 31  # address of float64 [4]: the following
SCORE: Final = 32  # address of float64 [1]: affinity of the victim
VACATED: Final = 33  # slot of what was evicted last

# The bitmap.
RESIDENT: Final = 34
RESIDENT_ROW_BYTES: Final = 35

TABLE_WORDS: Final = 36

# Of the numbers.
BOOST: Final = 0  # affinity of an activation
PRIOR: Final = 1  # probability of a choice, k / E
LAST_TOKEN: Final = 2  # by how much the rank of an expert rises that a worker's last token used
TOKEN_BEFORE: Final = 3  # or the one before it

NEVER: Final = -1

# Of a layer's candidate.
UNCHANGED: Final = 0
PASSED_OVER: Final = 1  # an expert was not considered, for a lease or a waiter
OUTDATED: Final = 2  # tokens were routed since, or an expert was loaded
