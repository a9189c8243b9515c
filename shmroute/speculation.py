"""Speculation with a gate: what the next layer's gate would choose for this layer's hidden states.

A layer adds to the hidden state more than it replaces, so the next gate, applied a layer too early, often chooses what
it will choose in the end. The worker pays one small matrix product for it, and tells the pager how much CPU time that
took; the pager's arbiter decides what becomes of the requests, by how often such ones were right in that layer. Where
it has turned them down altogether, workers do not even compute what they would ask for
(`shmroute.shared.turned_down`).
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from shmroute.attachment import Attachment
from shmroute.routing import MemoryAwareRouter
from shmroute.shared.atomic import WORD
from shmroute.shared.experts import QUEUE
from shmroute.shared.layout import HEADER_TURNED_DOWN
from shmroute.shared.metrics import LaneCounter, Predictor, add
from shmroute.shared.requests import PagingDirection, PagingPriority, PagingRequest, submit_speculation
from shmroute.shared.turned_down import withholds

GATE = int(Predictor.GATE)


class Speculation:
    """This process's speculations on one segment. Claims a lane."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self._lane = attachment.lane()
        self._top_k = attachment.segment.config.top_k
        self._turn = np.zeros(1, np.int64)
        self._turn_at = self._turn.ctypes.data

    def ask(self, layer: int, logits: Callable[[], npt.NDArray[np.float32]]) -> list[PagingRequest]:
        """Ask for what some tokens will probably choose, unless the pager has turned that down; what that queued.

        Parameters
        ----------
        layer : int
        logits : callable
            Computes float32 [T, E], if they are wanted.
        """
        with self._attachment.in_use() as segment:
            if withholds(segment.address + HEADER_TURNED_DOWN, GATE, self._lane.counters, self._turn_at):
                return []
        began = time.thread_time_ns()
        router = self._attachment.one(MemoryAwareRouter, layer)
        experts = [e for e in expected_experts(logits(), self._top_k) if not router.is_on_device(e)]
        with self._attachment.in_use() as segment:
            requests = self._request(segment.address, layer, experts)
            add(self._lane.counter(LaneCounter.SPECULATING_NS), time.thread_time_ns() - began)
        return requests

    def _request(self, base: int, layer: int, experts: list[int]) -> list[PagingRequest]:
        layout, lane = self._attachment.segment.layout, self._lane
        queued = [
            expert
            for expert in experts
            if submit_speculation(
                base + layout.row(layout.experts, layer) + expert * WORD,
                base + layout.row(layout.failures, layer) + expert * WORD,
                base + layout.ring, layout.ring_bits, lane.counters, layer, expert, lane.number,
            ) == QUEUE
        ]  # fmt: skip
        if queued:
            self._attachment.ring_pager()
        return [PagingRequest(layer, expert, PagingDirection.IN, PagingPriority.PREFETCH) for expert in queued]


def checked_rows(name: str, rows: object, size: int) -> npt.NDArray[np.float32]:
    """`rows` as float32 [T, size]; raise `ValueError` unless they are finite float32 [size] or [T, size]."""
    what = f"{rows.dtype} {list(rows.shape)}" if isinstance(rows, np.ndarray) else repr(rows)
    if isinstance(rows, np.ndarray) and rows.dtype == np.float32 and rows.shape[-1:] == (size,):
        if rows.ndim <= 2 and np.isfinite(rows).all():
            return rows.reshape(-1, size)
        what += "" if rows.ndim > 2 else " with NaN or inf"
    raise ValueError(f"{name} must be finite float32 [{size}] or [T, {size}], not {what}")


def expected_experts(logits: npt.NDArray[np.float32], top_k: int) -> list[int]:
    """The experts that some tokens' logits choose, each once, those of most weight first.

    Parameters
    ----------
    logits : ndarray
        float32 [T, E].
    top_k : int
    """
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    if len(chosen) == 1:
        one: list[int] = chosen[0].tolist()
        return one
    shares = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    weights = np.zeros(logits.shape[1])
    np.add.at(weights, chosen.ravel(), np.take_along_axis(shares, chosen, 1).ravel())
    experts = np.unique(chosen)
    return [int(expert) for expert in experts[np.argsort(-weights[experts], kind="stable")]]
