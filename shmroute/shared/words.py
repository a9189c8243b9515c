"""What every shared word means, bit by bit, and the only code that packs and unpacks them.

Words are signed 64-bit integers of which only the bits matter (see `shmroute.shared.atomic`); each field is read by
shift and mask, so the sign never shows. A field is a ``*_SHIFT`` and a ``*_BITS``; all constants of this file enter
the layout fingerprint, so two processes that disagree on one of them never share a segment.
"""

from __future__ import annotations

from typing import Final

from shmroute.shared.atomic import signed
from shmroute.shared.kernel import inner

LOW32: Final = (1 << 32) - 1

# Affinity: how much an expert was used of late.
#
#   63            32 31             0
#   +---------------+----------------+
#   | tick          | score, Q0.32   |
#   +---------------+----------------+
#
# `score` was true at `tick`, the layer's clock modulo 2^32; whoever reads it multiplies by decay^(clock - tick).
# 2^32 - 1 stands for 1.
SCORE_BITS: Final = 32
SCORE_ONE: Final = (1 << SCORE_BITS) - 1
TICK_SHIFT: Final = 32
RESTAMP_BITS: Final = 28  # whoever moves a clock over a multiple of 2^28 restamps the layer

# Expert: where an expert is, and who reads it.
#
#   63  61 60    58 57      56 55         32 31                0
#   +-----+--------+----------+-------------+------------------+
#   | 0   | state  | priority | slot        | lease mask       |
#   +-----+--------+----------+-------------+------------------+
#
#   state      priority      slot           lease mask
#   ABSENT     0             0              0
#   REQUESTED  of the load   0              0
#   LOADING    0             being filled   0
#   RESIDENT   0             holds it       bit w: the worker of lane w reads it
#   FAILED     0             0              0
MASK_BITS: Final = 32
SLOT_SHIFT: Final = 32
SLOT_BITS: Final = 24
PRIORITY_SHIFT: Final = 56
PRIORITY_BITS: Final = 2
STATE_SHIFT: Final = 58
STATE_BITS: Final = 3

ABSENT: Final = 0
REQUESTED: Final = 1
LOADING: Final = 2
RESIDENT: Final = 3
FAILED: Final = 4

PREFETCH: Final = 1
NORMAL: Final = 2
URGENT: Final = 3

# Ring entry: a request, and the lap of the ring in which it was written.
#
#   63      32 31 30    25 24        23  22         21     12 11       0
#   +---------+--+--------+------------+-----------+---------+---------+
#   | cycle   |0 | lane   | priority   | direction | layer   | expert  |
#   +---------+--+--------+------------+-----------+---------+---------+
CYCLE_SHIFT: Final = 32
EXPERT_BITS: Final = 12
LAYER_SHIFT: Final = 12
LAYER_BITS: Final = 10
DIRECTION_SHIFT: Final = 22
REQUEST_PRIORITY_SHIFT: Final = 23
LANE_SHIFT: Final = 25
LANE_BITS: Final = 6
REQUEST_BITS: Final = 31

PAGE_IN: Final = 0
PAGE_OUT: Final = 1
NO_LANE: Final = (1 << LANE_BITS) - 1

# Bell: whether somebody sleeps, and in which sleep.
#
#   63                 3  2       1     0
#   +--------------------+--------+------+
#   | epoch              | HUNGRY | state|   state is two bits: 1..0
#   +--------------------+--------+------+
BELL_STATE_BITS: Final = 2
AWAKE: Final = 0
ARMED: Final = 1
RUNG: Final = 2
HUNGRY: Final = 4
EPOCH_SHIFT: Final = 3

# Identity: a process, for as long as the host is up.
#
#   63   62 61        50 49            22 21          0
#   +------+------------+----------------+-------------+
#   | state| generation | start time     | pid         |
#   +------+------------+----------------+-------------+
#
# The start time is that of /proc/PID/stat (clock ticks since boot) modulo 2^28. State is 0 when nobody is named.
PID_BITS: Final = 22
START_SHIFT: Final = 22
START_BITS: Final = 28
GENERATION_SHIFT: Final = 50
GENERATION_BITS: Final = 12
IDENTITY_SHIFT: Final = 62
NOBODY: Final = 0
LIVE: Final = 1
DESTROYING: Final = 2

# Bonus: what a resident expert's logit is raised by, value x 2^32.
BONUS_ONE: Final = 1 << 32

# Spread: a layer's running mean of the largest minus the least choosing score of a token.
#
#   63  62           44 43                  0
#   +--+---------------+---------------------+
#   |0 | tokens        | mean x 2^20         |
#   +--+---------------+---------------------+
#
# `tokens` counts up to SPREAD_COUNT_MAX; from there on the mean forgets, each token counting for 1 / SPREAD_COUNT_MAX.
SPREAD_ONE_BITS: Final = 20
SPREAD_COUNT_SHIFT: Final = 44
SPREAD_COUNT_MAX: Final = 1 << 16
SPREAD_MAX: Final = 1 << 20

# Wait word: the one expert that a worker waits for; 0 for none.   layer:10 . expert:12, plus 1
# Failure: why an expert could not be loaded, and when it may be tried again.
#
#   63          56 55     44 43                      0
#   +-------------+---------+------------------------+
#   | kind        | errno   | not before, ms         |   CLOCK_MONOTONIC
#   +-------------+---------+------------------------+
FAILURE_KIND_SHIFT: Final = 56
FAILURE_ERRNO_SHIFT: Final = 44
FAILURE_ERRNO_BITS: Final = 12
FAILURE_OS_ERROR: Final = 1
FAILURE_CHECKPOINT: Final = 2
FAILURE_CHANGED: Final = 3
FAILURE_CHECKSUM: Final = 4
FAILURE_SOURCE: Final = 5

MAX_LAYERS: Final = 1 << LAYER_BITS
MAX_EXPERTS: Final = 1 << EXPERT_BITS
MAX_LANES: Final = MASK_BITS
MAX_SLOTS: Final = 1 << SLOT_BITS


@inner
def low32(word: int) -> int:
    """The low half of a word, as 0 … 2^32 − 1."""
    return word & LOW32


@inner
def high32(word: int) -> int:
    """The high half of a word, as 0 … 2^32 − 1."""
    return (word >> 32) & LOW32


@inner
def pack_affinity(tick: int, score: int) -> int:
    """An affinity word; `tick` is taken modulo 2^32."""
    return signed((tick << TICK_SHIFT) | score)


@inner
def pack_expert(state: int, priority: int, slot: int, mask: int) -> int:
    """An expert word."""
    return (state << STATE_SHIFT) | (priority << PRIORITY_SHIFT) | (slot << SLOT_SHIFT) | mask


@inner
def expert_state(word: int) -> int:
    """ABSENT, REQUESTED, LOADING, RESIDENT or FAILED."""
    return (word >> STATE_SHIFT) & ((1 << STATE_BITS) - 1)


@inner
def expert_priority(word: int) -> int:
    """PREFETCH, NORMAL or URGENT of a REQUESTED word."""
    return (word >> PRIORITY_SHIFT) & ((1 << PRIORITY_BITS) - 1)


@inner
def expert_slot(word: int) -> int:
    """The slot of a LOADING or RESIDENT word."""
    return (word >> SLOT_SHIFT) & ((1 << SLOT_BITS) - 1)


@inner
def expert_mask(word: int) -> int:
    """The lease mask of a word: one bit for each lane that reads it."""
    return word & LOW32


@inner
def pack_request(layer: int, expert: int, direction: int, priority: int, lane: int) -> int:
    """A request as the ring carries it."""
    return (
        (lane << LANE_SHIFT)
        | (priority << REQUEST_PRIORITY_SHIFT)
        | (direction << DIRECTION_SHIFT)
        | (layer << LAYER_SHIFT)
        | expert
    )


@inner
def request_expert(request: int) -> int:
    """The expert of a request."""
    return request & ((1 << EXPERT_BITS) - 1)


@inner
def request_layer(request: int) -> int:
    """The layer of a request."""
    return (request >> LAYER_SHIFT) & ((1 << LAYER_BITS) - 1)


@inner
def request_direction(request: int) -> int:
    """PAGE_IN or PAGE_OUT."""
    return (request >> DIRECTION_SHIFT) & 1


@inner
def request_priority(request: int) -> int:
    """The priority with which a request was pushed."""
    return (request >> REQUEST_PRIORITY_SHIFT) & ((1 << PRIORITY_BITS) - 1)


@inner
def request_lane(request: int) -> int:
    """The lane that asked, or NO_LANE."""
    return (request >> LANE_SHIFT) & ((1 << LANE_BITS) - 1)


@inner
def pack_wait(layer: int, expert: int) -> int:
    """A wait word that names an expert; never 0."""
    return ((layer << LAYER_SHIFT) | expert) + 1


@inner
def pack_bell(epoch: int, state: int) -> int:
    """A bell word; `state` may carry HUNGRY."""
    return signed((epoch << EPOCH_SHIFT) | state)


@inner
def bell_epoch(word: int) -> int:
    """The sleep to which a bell word belongs."""
    return (word >> EPOCH_SHIFT) & ((1 << 61) - 1)


@inner
def bell_state(word: int) -> int:
    """AWAKE, ARMED or RUNG."""
    return word & ((1 << BELL_STATE_BITS) - 1)


@inner
def pack_bonus(value: float) -> int:
    """The nearest bonus word."""
    return int(value * BONUS_ONE + 0.5)


@inner
def unpack_bonus(word: int) -> float:
    """The bonus of a word; rounded to nine decimals it is what was packed, if that had no more."""
    return word / BONUS_ONE


@inner
def pack_spread(count: int, mean: float) -> int:
    """A spread word of a mean from 0 to SPREAD_MAX."""
    nearest = int(mean * (1 << SPREAD_ONE_BITS) + 0.5)
    return (count << SPREAD_COUNT_SHIFT) | nearest


@inner
def spread_count(word: int) -> int:
    """How many tokens a spread word's mean is of, up to SPREAD_COUNT_MAX."""
    return word >> SPREAD_COUNT_SHIFT


@inner
def spread_mean(word: int) -> float:
    """The mean of a spread word; 0 before the first token."""
    return (word & ((1 << SPREAD_COUNT_SHIFT) - 1)) / (1 << SPREAD_ONE_BITS)


@inner
def pack_identity(state: int, generation: int, start: int, pid: int) -> int:
    """An identity word; `generation` and `start` are taken modulo their widths."""
    return signed(
        (state << IDENTITY_SHIFT)
        | ((generation & ((1 << GENERATION_BITS) - 1)) << GENERATION_SHIFT)
        | ((start & ((1 << START_BITS) - 1)) << START_SHIFT)
        | pid
    )


@inner
def identity_state(word: int) -> int:
    """NOBODY, LIVE or DESTROYING."""
    return (word >> IDENTITY_SHIFT) & 3


@inner
def identity_generation(word: int) -> int:
    """How many owners the word had before this one, modulo 2^12."""
    return (word >> GENERATION_SHIFT) & ((1 << GENERATION_BITS) - 1)


@inner
def identity_start(word: int) -> int:
    """Start time of the process, modulo 2^28."""
    return (word >> START_SHIFT) & ((1 << START_BITS) - 1)


@inner
def identity_pid(word: int) -> int:
    """Process id."""
    return word & ((1 << PID_BITS) - 1)


@inner
def pack_failure(kind: int, error: int, not_before_ms: int) -> int:
    """A failure word."""
    return (kind << FAILURE_KIND_SHIFT) | (error << FAILURE_ERRNO_SHIFT) | not_before_ms


@inner
def failure_kind(word: int) -> int:
    """One of the FAILURE_* kinds."""
    return (word >> FAILURE_KIND_SHIFT) & 0xFF


@inner
def failure_errno(word: int) -> int:
    """The errno of a FAILURE_OS_ERROR."""
    return (word >> FAILURE_ERRNO_SHIFT) & ((1 << FAILURE_ERRNO_BITS) - 1)


@inner
def failure_not_before_ms(word: int) -> int:
    """When the load may be tried again: CLOCK_MONOTONIC in milliseconds."""
    return word & ((1 << FAILURE_ERRNO_SHIFT) - 1)
