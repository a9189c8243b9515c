"""The format of a recording: one file for each attachment of a worker, a header and then records of one size.

The header is whole pages: words, then the runtime's settings as JSON. Words are little-endian int64.

A record is one token in one layer (ROUTE), or one lease that waited for a load (WAIT):

| word | ROUTE | WAIT |
|---|---|---|
| COMMIT | the record's number + 1, stored last | likewise |
| PLACE | kind: 8, layer: 16 (from the lowest bit) | likewise |
| ROWS | row: 32, rows of the call: 32 | 0 |
| THREAD | who called (``pthread_self``) | likewise |
| DROPPED | records of this file that had found no room by then | likewise |
| MOMENT | the layer's clock as this token was routed | ns that it waited |
| DETAIL | the bonus word in force; 0: none, or nothing that it could change | the expert |
| SPREAD | the layer's spread word (`shmroute.routing.spread`); 0 unless the rule is cache-prior | 0 |
| residency, int64 [⌈E/64⌉] | the snapshot that the call consulted | |
| ids, int32 [k]; weights, float32 [k] | the choice, best first | |
| logits, float32 [E] | if the header's flag says so | |

Records are numbered by the header's NEXT word, which a writer advances by CAS: that reserves them. A record counts if
its COMMIT word says its number + 1. That word is stored last, so a record is whole or does not count. A record under
NEXT that does not count is *unfinished*: its writer died, or has not come so far yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from shmroute.config import RuntimeConfig
from shmroute.errors import ConfigError

SUFFIX: Final = ".routes"
MAGIC: Final = int.from_bytes(b"SHMROUTR", "little")
VERSION: Final = 1

# Words of the header.
HEADER_MAGIC: Final = 0  # stored last: a header is whole or does not count
HEADER_VERSION: Final = 1
HEADER_BYTES: Final = 2  # of the whole header: where the records begin
HEADER_RECORD_BYTES: Final = 3
HEADER_CONFIG_BYTES: Final = 4
HEADER_UUID: Final = 5  # two words: which segment, and so which run
HEADER_LANE: Final = 7
HEADER_GENERATION: Final = 8  # of the lane
HEADER_PID: Final = 9
HEADER_NEXT: Final = 10  # records reserved
HEADER_DROPPED: Final = 11  # records that found no room
HEADER_ERRNO: Final = 12  # why the file stopped growing; 0: it did not
HEADER_ENDED: Final = 13  # 1 once the worker has left in order
HEADER_WORDS: Final = 14

# Words of a record.
COMMIT: Final = 0
PLACE: Final = 1
ROWS: Final = 2
THREAD: Final = 3
DROPPED: Final = 4
MOMENT: Final = 5
DETAIL: Final = 6
SPREAD: Final = 7
FIXED_WORDS: Final = 8

LAYER_SHIFT: Final = 8
KIND_MASK: Final = (1 << LAYER_SHIFT) - 1
ROUTE: Final = 1
WAIT: Final = 2

ROWS_SHIFT: Final = 32

WORD: Final = 8
PAGE: Final = 4096


@dataclass(frozen=True)
class RecordLayout:
    """Where things lie in a record, in bytes.

    Parameters
    ----------
    num_experts, top_k : int
    logits : bool
    """

    num_experts: int
    top_k: int
    logits: bool

    @property
    def snapshot_words(self) -> int:
        """Of a residency bitmap."""
        return -(-self.num_experts // 64)

    @property
    def ids(self) -> int:
        """Where the choice is."""
        return (FIXED_WORDS + self.snapshot_words) * WORD

    @property
    def record_bytes(self) -> int:
        """Of a whole record, in whole words."""
        return -(-(self.ids + 8 * self.top_k + 4 * self.num_experts * self.logits) // WORD) * WORD

    @property
    def dtype(self) -> np.dtype[np.void]:
        """A record as NumPy reads it."""
        names = ["commit", "place", "rows", "thread", "dropped", "moment", "detail", "spread"]
        names += ["snapshot", "ids", "weights"]
        formats: list[tuple[str, tuple[int, ...]]] = [("<i8", ())] * FIXED_WORDS
        formats += [("<i8", (self.snapshot_words,)), ("<i4", (self.top_k,)), ("<f4", (self.top_k,))]
        offsets = [i * WORD for i in range(FIXED_WORDS + 1)] + [self.ids, self.ids + 4 * self.top_k]
        if self.logits:
            names.append("logits")
            formats.append(("<f4", (self.num_experts,)))
            offsets.append(self.ids + 8 * self.top_k)
        return np.dtype({"names": names, "formats": formats, "offsets": offsets, "itemsize": self.record_bytes})


def header_bytes(config_bytes: int) -> int:
    """Bytes of a header whose settings have so many, in whole pages."""
    return -(-(HEADER_WORDS * WORD + config_bytes) // PAGE) * PAGE


def layout_of(config: RuntimeConfig) -> RecordLayout:
    """The layout that a runtime's settings ask for.

    Raises
    ------
    ConfigError
        If they name no folder to record to.
    """
    if config.recording is None:
        raise ConfigError("these settings are of a runtime that records nothing")
    return RecordLayout(config.num_experts, config.top_k, config.recording.logits)
