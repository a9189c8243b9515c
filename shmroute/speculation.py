"""Speculation with a gate: what the next layer's gate would choose for this layer's hidden states.

A layer adds to the hidden state more than it replaces, so the next gate, applied a layer too early, often chooses what
it will choose in the end. The worker pays one small matrix product for it; the pager's arbiter decides what becomes of
the requests, by how often such ones were right in that layer.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from shmroute.attachment import Attachment
from shmroute.shared.atomic import WORD
from shmroute.shared.experts import QUEUE
from shmroute.shared.requests import PagingDirection, PagingPriority, PagingRequest, submit_speculation


def check_hidden(hidden: object, size: int) -> None:
    """Raise `ValueError` unless `hidden` is finite float32 [size] or [T, size]."""
    what = f"{hidden.dtype} {list(hidden.shape)}" if isinstance(hidden, np.ndarray) else repr(hidden)
    if isinstance(hidden, np.ndarray) and hidden.dtype == np.float32 and hidden.shape[-1:] == (size,):
        if hidden.ndim <= 2 and np.isfinite(hidden).all():
            return
        what += "" if hidden.ndim > 2 else " with NaN or inf"
    raise ValueError(f"hidden must be finite float32 [{size}] or [T, {size}], not {what}")


def expected_experts(
    hidden: npt.NDArray[np.float32],
    gate: npt.NDArray[np.float32],
    top_k: int,
    bias: npt.NDArray[np.float32] | None = None,
) -> list[int]:
    """The experts that a gate chooses for some hidden states, each once, those of most weight first.

    Parameters
    ----------
    hidden : ndarray
        float32 [H] or [T, H].
    gate : ndarray
        float32 [E, H].
    top_k : int
    bias : ndarray, optional
        float32 [E], added to the logits.
    """
    logits = np.atleast_2d(hidden @ gate.T).astype(np.float64)
    if bias is not None:
        logits += bias
    chosen = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares /= shares.sum(axis=1, keepdims=True)
    weights = np.zeros(len(gate))
    np.add.at(weights, chosen.ravel(), np.take_along_axis(shares, chosen, 1).ravel())
    experts = np.unique(chosen)
    return [int(expert) for expert in experts[np.argsort(-weights[experts], kind="stable")]]


def request_expected(attachment: Attachment, layer: int, experts: list[int]) -> list[PagingRequest]:
    """Ask for experts as a gate's speculation; what that queued. Claims a lane."""
    lane = attachment.lane()
    with attachment.in_use() as segment:
        layout, base = segment.layout, segment.address
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
            attachment.ring_pager()
    return [PagingRequest(layer, expert, PagingDirection.IN, PagingPriority.PREFETCH) for expert in queued]
