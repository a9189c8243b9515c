"""The words of a plan (`shmroute.routing.plan`): what each is, by its place."""

from __future__ import annotations

from typing import Final

# Words of a plan.
STATUS: Final = 0
NUM_EXPERTS: Final = 1
TOP_K: Final = 2
MEMORY_AWARE: Final = 3
RENORMALIZE: Final = 4
TIMED: Final = 5
LAYER: Final = 6
LANE: Final = 7
CLOCK: Final = 8
USES: Final = 9
READ: Final = 10  # int64 [E], the affinity words that a batch starts from
EXPERTS: Final = 11
FAILURES: Final = 12
RESIDENT: Final = 13
BONUS: Final = 14
RING: Final = 15
RING_BITS: Final = 16
BELL: Final = 17
CURSOR: Final = 18
COUNTERS: Final = 19
HISTOGRAM: Final = 20
POWERS: Final = 21
PARAMETERS: Final = 22  # float64 [PARAMETER_COUNT]
SNAPSHOT: Final = 23  # int64 [⌈E/64⌉]
SCORES: Final = 24  # float64, of `scratch_length`
CANDIDATES: Final = 25  # int32 likewise
CHOSEN: Final = 26  # int32 likewise
MAPS: Final = 27  # float64 [E, 2], per expert: b and c of its map
TIMES: Final = 28  # int64 [E + 1], how often the call chose an expert; all 0 between calls
TOUCHED: Final = 29  # int64 [E + 1], the experts that it chose, each once, in order; then rubbish
QUEUED: Final = 30  # int64 [E], requests that the call pushed
CYCLE_SCALE: Final = 31  # see `shmroute.shared.stopwatch`
# Written by a call.
QUEUED_COUNT: Final = 32
BAD_ROW: Final = 33
BAD_FINITE: Final = 34
BELL_WORD: Final = 35
HITS: Final = 36
CHANGED: Final = 37  # choices that the bonus changed
NOT_FINITE_LOGITS: Final = 38
TOUCHED_COUNT: Final = 39
# Objects of Python's, by address; see `shmroute.routing.entry`.
ARRAY_TYPE: Final = 40
FLOAT32: Final = 41
INT32: Final = 42
FALLBACK: Final = 43
FINISH: Final = 44
# The model's scoring and the rule of the cache; see `shmroute.routing.rules` for the codes.
OWN: Final = 45  # int32, of `scratch_length`: the experts that a token would have without the cache
GENERAL: Final = 46  # 0: softmax scores, one group, no scaling, the absolute rule; else where `choose_generally` is
SCORING: Final = 47
RULE: Final = 48
TOP_J: Final = 49
MAX_RANK: Final = 50
N_GROUP: Final = 51
TOPK_GROUP: Final = 52
GROUP_SCORE: Final = 53
CORRECTION_BIAS: Final = 54  # float32 [E]
SPREAD: Final = 55
CHOOSING: Final = 56  # float32 of `scratch_length`: choosing scores
SHARES: Final = 57  # likewise: probabilities, not scaled to any sum
OTHERS: Final = 58  # likewise: choosing scores of what a rule may admit
GROUPS: Final = 59  # likewise, per group
PREFERRED: Final = 60  # int64 [⌈E/64⌉]
FOUND: Final = 61  # int32 of `scratch_length`
# Written by a call.
STRENGTH: Final = 62  # the bonus word by which it chose, 0 if the cache could change nothing
SPREAD_USED: Final = 63  # the spread word by which it chose, 0 unless the rule is cache-prior
LOST_MASS: Final = 64  # probability that changed choices lost, in units of 1 / MASS_ONE
# For recording; see `shmroute.recording`.
TRACE: Final = 65  # address of the recorder's words; 0: nothing is recorded
START: Final = 66  # written by a call: the layer's clock at its first token
# For publication; see `shmroute.routing.publication`.
SEEN: Final = 67  # int64 [2]: LEFT and SHARED of the layer, for both plans of its router
LATEST: Final = 68  # int64 [1]: address of the plan that routed last in this process, 0 before
MOST_PENDING: Final = 69  # tokens that are put off at most; 0: none ever
PENDING_TOKENS: Final = 70  # put off
PENDING: Final = 71  # int32 [MOST_PENDING, k], their experts
AT_ONCE: Final = 72  # written by a call: whether it publishes its tokens
# What steers, and what learns.
BUDGET: Final = 73  # address of int64 [BLOCK_WORDS], see `shmroute.routing.quality_budget`; 0 without a budget
TRAIL: Final = 74  # the worker's memory, see `shmroute.shared.successors`; 0 if nothing is learnt
SUCCESSORS: Final = 75  # that table, and bytes of a layer
SUCCESSOR_ROW_BYTES: Final = 76
NUM_LAYERS: Final = 77
# The tier of a GPU; see `shmroute.routing.rules`.
DEVICE: Final = 78  # address of int64 [⌈E/64⌉], experts in this process's GPU, as they come and go; 0 without one
NEAREST: Final = 79  # likewise, who gets the whole bonus: SNAPSHOT, or what a call found at DEVICE
ON_DEVICE: Final = 80  # written by a call, with a GPU: (token, expert) pairs whose expert was there
# For `shmroute.routing.entry`.
ROUTE: Final = 81  # where `route` is
PLAN_WORDS: Final = 82

# Float64 at PARAMETERS.
BOOST: Final = 0
MAX_SCORE: Final = 1
SCALING: Final = 2
SPREAD_SUM: Final = 3  # of the tokens of a call
HOST_SHARE: Final = 4
PARAMETER_COUNT: Final = 5

# Of `SEEN`.
LEFT: Final = 0  # the clock as this process left it, NEVER before
SHARED: Final = 1  # 1 if somebody else had moved it when this process last did
NEVER: Final = -1

TOKENS_PUT_OFF: Final = 16
"""The `MOST_PENDING` of every plan."""

IDLE: Final = 0
IN_USE: Final = 1
CLOSED: Final = 2
