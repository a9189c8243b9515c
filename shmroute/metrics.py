"""One snapshot of everything that is counted on a segment: `RuntimeMetrics`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from shmroute.shared.atomic import WORD
from shmroute.shared.identity import is_dead
from shmroute.shared.lanes import lane_identities
from shmroute.shared.layout import HEADER_PAGER, LANE_BASELINE, LANE_IDENTITY, LANE_SHARD
from shmroute.shared.metrics import (
    LANE_SHARD_WORDS,
    PAGER_SHARD_WORDS,
    PagerMetrics,
    WorkerMetrics,
    snapshot_words,
)
from shmroute.shared.segment import Segment
from shmroute.shared.words import identity_pid


@dataclass(frozen=True)
class RuntimeMetrics:
    """One snapshot of everything that is counted. Counters are read one by one, so they may be a call apart.

    Attributes
    ----------
    total : WorkerMetrics
        All workers that ever were.
    workers : tuple of WorkerMetrics
        Those attached now.
    pager : PagerMetrics
    resident : int
        Experts in slots now.
    slots : int
    pool_bytes, control_bytes : int
        Memory held for experts, and for everything else (slot headers included).
    """

    total: WorkerMetrics
    workers: tuple[WorkerMetrics, ...]
    pager: PagerMetrics
    resident: int
    slots: int
    pool_bytes: int
    control_bytes: int

    @property
    def hit_rate(self) -> float | None:
        """Of all workers together; None before the first route."""
        return self.total.hit_rate

    def worker_of(self, pid: int) -> WorkerMetrics | None:
        """What one process did since it attached; None if it holds no lane."""
        return next((worker for worker in self.workers if worker.pid == pid), None)

    def as_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {
            "hit_rate": self.hit_rate,
            "resident": self.resident,
            "slots": self.slots,
            "pool_bytes": self.pool_bytes,
            "control_bytes": self.control_bytes,
            "total": self.total.as_dict(),
            "workers": [worker.as_dict() for worker in self.workers],
            "pager": self.pager.as_dict(),
        }


def read_metrics(segment: Segment) -> RuntimeMetrics:
    """A snapshot of a segment's counters; the mapping must stay for the length of the call."""
    layout, base = segment.layout, segment.address
    identities = lane_identities(segment)
    total = np.zeros(LANE_SHARD_WORDS, np.int64)
    workers = []
    for lane in range(segment.config.max_workers):
        shard = snapshot_words(base + layout.lane(lane) + LANE_SHARD, LANE_SHARD_WORDS)
        total += shard
        if lane in identities:
            baseline = snapshot_words(base + layout.lane(lane) + LANE_BASELINE, LANE_SHARD_WORDS)
            if segment.read(layout.lane(lane) + LANE_IDENTITY) != identities[lane]:
                continue  # it left meanwhile: what was read may be partly its successor's
            workers.append(WorkerMetrics.from_words(shard - baseline, lane, identity_pid(identities[lane])))
    pager = segment.read(HEADER_PAGER)
    pager_words = snapshot_words(base + layout.pager, PAGER_SHARD_WORDS)
    bitmap = snapshot_words(base + layout.resident, layout.num_layers * layout.resident_row_bytes // WORD)
    return RuntimeMetrics(
        total=WorkerMetrics.from_words(total, None, None),
        workers=tuple(workers),
        pager=PagerMetrics.from_words(pager_words, None if is_dead(pager) else identity_pid(pager)),
        resident=int(np.bitwise_count(bitmap.view(np.uint64)).sum()),
        slots=segment.config.slots,
        pool_bytes=segment.config.budget_bytes,
        control_bytes=layout.total_bytes - segment.config.budget_bytes,
    )
