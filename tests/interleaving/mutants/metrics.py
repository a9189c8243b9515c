"""Broken rules of metrics."""

from __future__ import annotations

from ..mutation import Mutant

METRICS = (
    Mutant(
        "lost counts",
        "a counter grows by fetch_add",
        "shared.metrics:add",
        (("    fetch_add(address, value)", "    fetch_add(address, load(address) + value - load(address))"),),
        ("metrics",),
    ),
    Mutant(
        "no baseline",
        "a lane's baseline is its shard when it is free",
        "shared.lanes:vacate",
        (("    _copy_words(lane_address + LANE_SHARD, lane_address + LANE_BASELINE, LANE_SHARD_WORDS)\n", ""),),
        ("metrics",),
    ),
    Mutant(
        "a worker's counts read over a change of workers",
        "a reader keeps a worker's counts only if the lane is still that worker's",
        "metrics:read_metrics",
        (
            (
                "            if segment.read(layout.lane(lane) + LANE_IDENTITY) != identities[lane]:",
                "            if False:",
            ),
        ),
        ("metrics-handed-over",),
    ),
)
