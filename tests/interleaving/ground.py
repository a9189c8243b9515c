"""The real segments that simulated processes stand on: made once for each geometry, put back to their first state
before each run.
"""

from __future__ import annotations

import atexit
import ctypes
import uuid
from dataclasses import dataclass

from shmroute.config import RuntimeConfig
from shmroute.shared.atomic import WORD
from shmroute.shared.removal import unlink_segment
from shmroute.shared.segment import Segment, create_segment


@dataclass(frozen=True)
class Ground:
    """A segment, and what it held at first."""

    segment: Segment
    first: bytes

    def reset(self) -> None:
        """Put every byte back to what it was at first."""
        ctypes.memmove(self.segment.address, self.first, len(self.first))


_grounds: dict[str, Ground] = {}


def ground(config: RuntimeConfig) -> Segment:
    """A segment of these settings in its first state."""
    key = config.to_json()
    found = _grounds.get(key)
    if found is None:
        segment = create_segment(f"interleaving-{uuid.uuid4().hex[:12]}", config)
        first = ctypes.string_at(segment.address, segment.layout.total_bytes)
        unlink_segment(segment)  # nobody attaches by name; the mapping is what the runs use
        found = _grounds[key] = Ground(segment, first)
    found.reset()
    return found.segment


def words(segment: Segment, offset: int, count: int) -> list[int]:
    """Words of a segment, read outside a run."""
    return [segment.read(offset + i * WORD) for i in range(count)]


@atexit.register
def _close() -> None:
    for kept in _grounds.values():
        kept.segment.close()
    _grounds.clear()
