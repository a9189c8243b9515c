"""What the measurements use: runtimes of their own, the pager's side of residency, and logits."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from shmroute.bench.measuring import Scale
from shmroute.config import RouterConfig, RuntimeConfig
from shmroute.lifecycle import create
from shmroute.runtime import Runtime
from shmroute.shared.atomic import WORD
from shmroute.shared.experts import begin_load, publish, request_expert_word
from shmroute.shared.segment import Segment
from shmroute.shared.words import URGENT

_numbers = itertools.count()

ROWS = 512
"""Tokens that a loop routes in turn: few of them over and over, and the branch predictor would learn the answers."""


def segment_name() -> str:
    """A segment name that only this process uses, once."""
    return f"bench-{os.getpid()}-{next(_numbers)}"


def segment_of(runtime: Runtime) -> Segment:
    """The mapping behind a runtime."""
    return runtime._attachment.segment


@contextlib.contextmanager
def routing_runtime(
    experts: int,
    top_k: int,
    *,
    layers: int = 1,
    resident: Iterable[int] | None = None,
    metrics: bool = True,
    router: RouterConfig | None = None,
) -> Iterator[Runtime]:
    """A runtime without a source, for routing alone, with some experts of each layer (all by default) resident."""
    config = RuntimeConfig(
        num_layers=layers, num_experts=experts, top_k=top_k, expert_bytes=64, slots=layers * experts,
        router=dataclasses.replace(router or RouterConfig(), metrics=metrics),
    )  # fmt: skip
    with create(segment_name(), config, progress=None) as runtime:
        chosen = list(range(experts) if resident is None else resident)
        for layer in range(layers):
            make_resident(runtime, layer, chosen, first_slot=layer * len(chosen))
        yield runtime


def make_resident(runtime: Runtime, layer: int, experts: Iterable[int], first_slot: int = 0) -> None:
    """Load experts into free slots, by the kernels that a pager uses; their bytes stay zero."""
    segment = segment_of(runtime)
    layout = segment.layout
    row = segment.address + layout.resident + layer * layout.resident_row_bytes
    for slot, expert in enumerate(experts, first_slot):
        word = segment.address + layout.row(layout.experts, layer) + expert * WORD
        request_expert_word(word, segment.address + layout.row(layout.failures, layer) + expert * WORD, URGENT)
        begin_load(word, slot)
        publish(word, row, expert, slot)


def logits(tokens: int, experts: int, seed: int = 1) -> npt.NDArray[np.float32]:
    """float32 [tokens, experts], normally distributed, always the same."""
    return np.random.default_rng(seed).standard_normal((tokens, experts), np.float32)


def token_rows(experts: int) -> list[npt.NDArray[np.float32]]:
    """`ROWS` tokens, each an array of its own."""
    return list(logits(ROWS, experts))


@dataclass
class Bench:
    """What a run of the suite hands to each group.

    Attributes
    ----------
    scale : Scale
    absent : dict
        Peers that cannot be measured here, and why; groups add to it.
    resources : ExitStack
        Closed at the end of the run: what several groups share.
    """

    scale: Scale
    absent: dict[str, str] = field(default_factory=dict)
    resources: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    shared: dict[str, Any] = field(default_factory=dict)
