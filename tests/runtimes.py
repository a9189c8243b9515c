"""Runtimes for tests, and the pager's side of residency without a pager."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import numpy.typing as npt

from shmroute.config import RuntimeConfig
from shmroute.runtime import Runtime
from shmroute.shared.atomic import WORD, forget_views
from shmroute.shared.experts import begin_load, evict, publish, request_expert_word
from shmroute.shared.layout import LINE
from shmroute.shared.words import RESIDENT, URGENT, expert_mask, expert_slot, expert_state, pack_affinity

TEST_PREFIX = f"test-{os.getpid()}-"
REPOSITORY = Path(__file__).resolve().parent.parent
Metrics = dict[str, int]


def unique_name() -> str:
    """A segment name that only this test process uses, once."""
    return f"{TEST_PREFIX}{uuid4().hex[:8]}"


def small_config(
    *, num_layers: int = 1, num_experts: int = 8, top_k: int = 2, expert_bytes: int = 4096, slots: int = 4, **rest: Any
) -> RuntimeConfig:
    """Settings for routing alone; few lanes, so that segments are small."""
    return RuntimeConfig(num_layers, num_experts, top_k, expert_bytes, slots, **({"max_workers": 4} | rest))


def run_python(code: str, *arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        check=check, capture_output=True, text=True, timeout=100, env=os.environ | environment,
    )  # fmt: skip


class Memory:
    """Private memory for shared words: zeroed, on a line of its own."""

    def __init__(self, size: int) -> None:
        self._block = np.zeros(size + LINE, np.uint8)
        self.size = size
        self.address: int = -(-self._block.ctypes.data // LINE) * LINE

    def close(self) -> None:
        """Leave the views that interpreted kernels opened."""
        forget_views(self.address, self.size)


class Residency:
    """Makes experts resident, or not, by the kernels that the pager uses."""

    def __init__(self, runtime: Runtime) -> None:
        self._segment = runtime._attachment.segment
        self._free = list(range(self._segment.config.slots))

    def word_at(self, layer: int, expert: int) -> int:
        """Address of an expert's word."""
        layout = self._segment.layout
        return self._segment.address + layout.row(layout.experts, layer) + expert * WORD

    def state(self, layer: int, expert: int) -> int:
        """ABSENT, REQUESTED, …"""
        return expert_state(self.word(layer, expert))

    def word(self, layer: int, expert: int) -> int:
        """An expert's word."""
        return self._segment.read(self.word_at(layer, expert) - self._segment.address)

    def _row(self, layer: int) -> int:
        layout = self._segment.layout
        return self._segment.address + layout.resident + layer * layout.resident_row_bytes

    def load(self, layer: int, *experts: int) -> None:
        """Request and load experts into free slots."""
        for expert in experts:
            layout, address = self._segment.layout, self.word_at(layer, expert)
            failure = self._segment.address + layout.row(layout.failures, layer) + expert * WORD
            request_expert_word(address, failure, URGENT)
            slot = self._free.pop(0)
            assert begin_load(address, slot), "an expert that is resident cannot be loaded"
            publish(address, self._row(layer), expert, slot)

    def evict(self, layer: int, *experts: int) -> None:
        """Evict resident experts."""
        for expert in experts:
            word = self.word(layer, expert)
            assert expert_state(word) == RESIDENT
            assert expert_mask(word) == 0
            assert evict(self.word_at(layer, expert), self._row(layer), expert, expert_slot(word))
            self._free.append(expert_slot(word))

    @property
    def free_slots(self) -> int:
        """Slots that hold no expert."""
        return len(self._free)


def logits_choosing(choices: Iterable[Iterable[int]], num_experts: int) -> npt.NDArray[np.float32]:
    """float32 [T, E] whose best experts are, row by row and in order, the given ones."""
    rows = [list(row) for row in choices]
    logits = np.zeros((len(rows), num_experts), np.float32)
    for token, row in enumerate(rows):
        for rank, expert in enumerate(row):
            logits[token, expert] = 10.0 - rank
    return logits


def start_clock(runtime: Runtime, layer: int, tick: int, scores: Iterable[float] | None = None) -> None:
    """Put a layer's clock at a tick, every expert stamped with it and scored 0 (or as given)."""
    segment = runtime._attachment.segment
    layout = segment.layout
    segment.write(layout.clock + layer * LINE, tick)
    values = list(scores) if scores is not None else [0.0] * segment.config.num_experts
    for expert, value in enumerate(values):
        word = pack_affinity(tick & 0xFFFFFFFF, round(value * 0xFFFFFFFF))
        segment.write(layout.affinity(layer, expert), word)


def clock_of(runtime: Runtime, layer: int = 0) -> int:
    """A layer's clock."""
    segment = runtime._attachment.segment
    return segment.read(segment.layout.clock + layer * LINE)


def everything_recorded(runtime: Runtime) -> bytes:
    """All of a segment's control words but the header: equal before and after if nothing was recorded."""
    segment = runtime._attachment.segment
    return bytes(segment.buffer[segment.layout.clock : segment.layout.control_bytes])
