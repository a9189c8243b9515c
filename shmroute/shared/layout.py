"""Where everything lies in a segment: every offset, derived by running arithmetic, and nowhere else.

The header's fixed part has the same offsets in all versions, so that any version can say why it refuses a segment.
The rest follows from the sizes in the settings.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Final

from numba import types

from shmroute.shared import metrics, words
from shmroute.shared.atomic import WORD
from shmroute.shared.kernel import kernel

ABI: Final = 1
MAGIC: Final = int.from_bytes(b"SHMROUTE", "little")
LINE: Final = 64
PAGE: Final = 4096

# Header, the fixed part: read before anything else is trusted.
HEADER_MAGIC: Final = 0
HEADER_ABI: Final = 8
HEADER_TOTAL_BYTES: Final = 16
HEADER_FINGERPRINT: Final = 24
HEADER_UUID: Final = 32  # 16 bytes
HEADER_PID_NAMESPACE: Final = 48
HEADER_CONFIG_BYTES: Final = 56
# What changes: one line each.
HEADER_STATE: Final = 1 * LINE  # identity word: LIVE, or DESTROYING and by whom
HEADER_OWNER: Final = 2 * LINE  # identity word of the creator
HEADER_PAGER: Final = 3 * LINE  # identity word of the pager that holds the lock
HEADER_TURNED_DOWN: Final = HEADER_PAGER + WORD  # and what it tells workers: `shmroute.shared.turned_down`
HEADER_STANDBY: Final = 4 * LINE  # identity word of the pager that waits for it
HEADER_BELL: Final = 5 * LINE
HEADER_CONFIG: Final = 6 * LINE  # JSON

# A lane.
LANE_IDENTITY: Final = 0
LANE_CURSOR: Final = 1 * WORD  # the layer that its worker routed last
LANE_WAIT: Final = 1 * LINE
LANE_BELL: Final = 2 * LINE
LANE_SHARD: Final = 3 * LINE
LANE_BASELINE: Final = LANE_SHARD + metrics.LANE_SHARD_WORDS * WORD

# A layer's bonus line: the strength of its rule, how that is steered, and the spread.
BONUS_VALUE: Final = 0
BONUS_ACCOUNT: Final = 1 * WORD
BONUS_CONTROL: Final = 2 * WORD
BONUS_MEASURED: Final = 3 * WORD  # moving average of what a token loses, as a bonus word
BONUS_SPREAD: Final = 4 * WORD
# What is told of an expert's uses: two words side by side, since whoever routes to it changes both.
USE_AFFINITY: Final = 0
USE_ACTIVATIONS: Final = 1 * WORD
USE_BYTES: Final = 2 * WORD

# The ring: two cursors, then the entries.
RING_HEAD: Final = 0
RING_TAIL: Final = 1 * LINE
RING_ENTRIES: Final = 2 * LINE

# A slot header.
SLOT_OWNER: Final = 0  # as a wait word names an expert; 0 for none yet
SLOT_PRECISION: Final = 1 * WORD
SLOT_LENGTH: Final = 2 * WORD
SLOT_HEADER_BYTES: Final = 4 * WORD


def _constants_fingerprint() -> int:
    """A 63-bit hash of every constant that two processes on one segment must share."""
    constants = {
        f"{module.__name__}.{name}": value
        for module, namespace in ((words, vars(words)), (metrics, vars(metrics)))
        for name, value in namespace.items()
        if name.isupper() and isinstance(value, int)
    }
    constants |= {name: value for name, value in globals().items() if name.isupper() and isinstance(value, int)}
    constants |= {repr(counter): counter for counter in (*metrics.LaneCounter, *metrics.PagerCounter)}
    constants |= {repr(word): word for word in (*metrics.Predictor, *metrics.PrefetchOutcome)}
    digest = hashlib.sha256(repr(sorted(constants.items())).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


CONSTANTS: Final = _constants_fingerprint()


@kernel(types.int64())
def compiled_constants() -> int:
    """The `CONSTANTS` with which this process's kernels were compiled; attach compares."""
    return CONSTANTS


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


@dataclass(frozen=True)
class Layout:
    """Offsets in bytes from the start of a segment.

    Parameters
    ----------
    num_layers, num_experts, max_workers, slots, slot_bytes : int
        As in `RuntimeConfig`.
    config_bytes : int
        Length of the settings' JSON.
    """

    num_layers: int
    num_experts: int
    max_workers: int
    slots: int
    slot_bytes: int
    config_bytes: int

    ring_bits: int = field(init=False)
    row_bytes: int = field(init=False)
    use_row_bytes: int = field(init=False)
    resident_row_bytes: int = field(init=False)
    successor_row_bytes: int = field(init=False)
    lane_bytes: int = field(init=False)
    clock: int = field(init=False)
    bonus: int = field(init=False)
    uses: int = field(init=False)
    experts: int = field(init=False)
    checksums: int = field(init=False)
    failures: int = field(init=False)
    resident: int = field(init=False)
    successors: int = field(init=False)
    ring: int = field(init=False)
    lanes: int = field(init=False)
    pager: int = field(init=False)
    control_bytes: int = field(init=False)
    slot_headers: int = field(init=False)
    pool: int = field(init=False)
    total_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        cursor = _round_up(HEADER_CONFIG + self.config_bytes, PAGE)

        def region(name: str, size: int, alignment: int = LINE) -> None:
            nonlocal cursor
            cursor = _round_up(cursor, alignment)
            put(self, name, cursor)
            cursor += size

        # Each layer's rows start on a line, so that layers never share one.
        put(self, "row_bytes", _round_up(self.num_experts * WORD, LINE))
        put(self, "use_row_bytes", _round_up(self.num_experts * USE_BYTES, LINE))
        put(self, "resident_row_bytes", _round_up(-(-self.num_experts // 64) * WORD, LINE))
        put(self, "successor_row_bytes", _round_up(self.num_experts * words.SUCCESSORS * WORD, LINE))
        put(self, "lane_bytes", _round_up(LANE_BASELINE + metrics.LANE_SHARD_WORDS * WORD, LINE))
        # Room for a demand of every expert, up to 8192. Upgrades and hints push too, so it may be full all the same;
        # the sweep then finds what was not pushed.
        put(self, "ring_bits", min(max((self.num_layers * self.num_experts - 1).bit_length(), 4), 13))

        region("clock", self.num_layers * LINE)
        region("bonus", self.num_layers * LINE)
        region("uses", self.num_layers * self.use_row_bytes)
        for name in ("experts", "checksums", "failures"):
            region(name, self.num_layers * self.row_bytes)
        region("resident", self.num_layers * self.resident_row_bytes)
        region("successors", self.num_layers * self.successor_row_bytes)
        region("ring", RING_ENTRIES + (WORD << self.ring_bits))
        region("lanes", self.max_workers * self.lane_bytes)
        region("pager", metrics.PAGER_SHARD_WORDS * WORD)
        put(self, "control_bytes", cursor)
        region("slot_headers", self.slots * SLOT_HEADER_BYTES)
        region("pool", self.slots * self.slot_bytes, PAGE)
        put(self, "total_bytes", _round_up(cursor, PAGE))

    @property
    def fingerprint(self) -> int:
        """A 63-bit hash of all offsets and of all constants that give them meaning."""
        digest = hashlib.sha256(f"{CONSTANTS}:{self!r}".encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1

    def lane(self, lane: int) -> int:
        """Offset of a lane."""
        return self.lanes + lane * self.lane_bytes

    def row(self, region: int, layer: int) -> int:
        """Offset of a layer's row in a region of L × E words."""
        return region + layer * self.row_bytes

    def use_row(self, layer: int) -> int:
        """Offset of a layer's uses."""
        return self.uses + layer * self.use_row_bytes

    def affinity(self, layer: int, expert: int) -> int:
        """Offset of an expert's affinity word."""
        return self.use_row(layer) + expert * USE_BYTES + USE_AFFINITY

    def activations(self, layer: int, expert: int) -> int:
        """Offset of an expert's total of activations."""
        return self.use_row(layer) + expert * USE_BYTES + USE_ACTIVATIONS

    def slot(self, slot: int) -> int:
        """Offset of a slot's bytes."""
        return self.pool + slot * self.slot_bytes
