"""How large the control part of a segment is: computed from the layout, at the size of DeepSeek-V3."""

from __future__ import annotations

from collections.abc import Iterator

from shmroute.bench.report import Table, exact
from shmroute.bench.stage import Bench
from shmroute.config import RuntimeConfig
from shmroute.shared.layout import SLOT_HEADER_BYTES, Layout

LAYERS, EXPERTS, TOP_K, WORKERS = 61, 256, 8, 32
LIMIT = 4 << 20
EXPERT_BYTES = 44_040_192
"""Of DeepSeek-V3: three matrices of 7168 × 2048, one byte each."""


def measure(bench: Bench) -> Iterator[Table]:
    """One table; nothing in it varies."""
    every = LAYERS * EXPERTS
    with_all, with_tenth = (_layout(slots) for slots in (every, every // 10))
    scores = every * 8
    figures = [
        exact("control part and headers of a slot for each expert", with_all.pool),
        exact("… of slots for a tenth of the experts", with_tenth.pool, with_all.pool),
        exact("… without slot headers", with_all.control_bytes, with_all.pool),
        exact("slot headers, a slot for each expert", every * SLOT_HEADER_BYTES, with_all.pool),
        exact("one word per expert, the least any table of them takes", scores, with_all.pool),
        exact("one of 32 worker lanes", with_all.lane_bytes, with_all.pool),
        exact("limit: 4 MiB", LIMIT, with_all.pool),
        exact("one expert of DeepSeek-V3 in 8 bits", EXPERT_BYTES, with_all.pool),
    ]
    yield Table(
        "sizes/control", f"control segment: {LAYERS} layers × {EXPERTS} experts, {WORKERS} workers", "bytes", "lower",
        tuple(figures),
    )  # fmt: skip


def _layout(slots: int) -> Layout:
    config = RuntimeConfig(LAYERS, EXPERTS, TOP_K, EXPERT_BYTES, slots, max_workers=WORKERS)
    return Layout(
        LAYERS, EXPERTS, WORKERS, slots, slot_bytes=config.slot_bytes, config_bytes=len(config.to_json().encode())
    )
