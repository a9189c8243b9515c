"""What simulated processes do, and what must hold: one file for each protocol."""

from __future__ import annotations

from ..world import World
from . import affinity, bell, lanes, leases, lifecycle, metrics, paging, quality_budget, recording, ring, spread

WORLDS: dict[str, type[World]] = {
    "ring-pair": ring.RingPair,
    "ring-two-producers": ring.RingTwoProducers,
    "ring-two-consumers": ring.RingTwoConsumers,
    "ring-of-one": ring.RingOfOne,
    "ring-laps": ring.RingLaps,
    "bell": bell.Bell,
    "bell-buffered": bell.BellBuffered,
    "affinity": affinity.Affinity,
    "affinity-clamped": affinity.AffinityClamped,
    "affinity-put-off": affinity.AffinityPutOff,
    "affinity-restamped": affinity.AffinityRestamped,
    "affinity-half": affinity.AffinityHalf,
    "affinity-wrapped": affinity.AffinityWrapped,
    "spread": spread.Spread,
    "leases": leases.Leases,
    "lanes": lanes.Lanes,
    "lanes-reaped": lanes.LanesReaped,
    "lanes-inherited": lanes.LanesInherited,
    "metrics-handed-over": metrics.MetricsHandedOver,
    "metrics": metrics.Metrics,
    "recording": recording.Recording,
    "creation": lifecycle.Creation,
    "removal": lifecycle.Removal,
    "reclaiming": lifecycle.Reclaiming,
    "hand-over": lifecycle.HandOver,
    "owners-end": lifecycle.OwnersEnd,
    "one-slot": paging.OneSlot,
    "one-slot-buffered": paging.OneSlotBuffered,
    "hints": paging.Hints,
    "failing": paging.Failing,
    "impatient": paging.Impatient,
    "routing": paging.Routing,
    "shared": paging.Shared,
    "crowd": paging.Crowd,
    "overtaking": paging.Overtaking,
    "threads": paging.Threads,
    "takeover": paging.Takeover,
    "takeover-of-one-slot": paging.TakeoverOfOneSlot,
    "quality-budget": quality_budget.QualityBudget,
    "quality-budget-batches": quality_budget.QualityBudgetBatches,
}
"""Every world, by the name that schedules are printed with."""
