"""A trace as the pager would meet it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shmroute.config import PagerConfig, RuntimeConfig
from shmroute.traces.trace import Trace


@dataclass(frozen=True)
class Accesses:
    """Experts in the order in which they are wanted, in steps: a step is one token in one layer, by one worker.

    Attributes
    ----------
    keys : ndarray
        int64 [accesses]: ``layer * num_experts + expert``.
    starts : ndarray
        int64 [steps + 1]: which accesses are of each step.
    layers, workers : ndarray
        int64 [steps].
    num_layers, num_experts, top_k, num_workers, num_tokens : int
    """

    keys: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    layers: npt.NDArray[np.int64]
    workers: npt.NDArray[np.int64]
    num_layers: int
    num_experts: int
    top_k: int
    num_workers: int
    num_tokens: int

    def settings(self, slots: int, pager: PagerConfig) -> RuntimeConfig:
        """Of a runtime that would serve them."""
        return RuntimeConfig(
            self.num_layers, self.num_experts, self.top_k, expert_bytes=1, slots=slots, max_workers=self.num_workers,
            pager=pager,
        )  # fmt: skip

    def one_by_one(self) -> Accesses:
        """Each access as a step of its own, as textbook simulations have it: nothing is known of a token's others."""
        lengths = np.diff(self.starts)
        return Accesses(
            self.keys, np.arange(len(self.keys) + 1, dtype=np.int64), np.repeat(self.layers, lengths),
            np.repeat(self.workers, lengths), self.num_layers, self.num_experts, self.top_k, self.num_workers,
            self.num_tokens,
        )  # fmt: skip


def accesses_of(trace: Trace, workers: int = 1) -> Accesses:
    """What workers that share a trace's tokens want, one after the other.

    Sequences are dealt to the workers in turn; if there are fewer than workers, the tokens are cut into equal parts.
    The workers compute at the same pace and are spread evenly over the layers.
    """
    tokens, layers = trace.num_tokens, trace.num_layers
    sequences, number = np.unique(trace.seq_id, return_inverse=True)
    dealt = number % workers if len(sequences) >= workers else np.arange(tokens) * workers // tokens
    turn = np.zeros(tokens, np.int64)
    for worker in range(workers):
        mine = np.flatnonzero(dealt == worker)
        turn[mine] = np.arange(len(mine))
    when = (turn[:, None] * layers + np.arange(layers)) + (dealt * layers / workers)[:, None]
    order = np.lexsort((np.repeat(dealt, layers), when.ravel()))
    ids = trace.ids.reshape(tokens * layers, -1)[order].astype(np.int64)
    layer = order % layers
    recorded = ids >= 0
    keys = (ids + layer[:, None] * trace.num_experts)[recorded]
    starts = np.concatenate([[0], np.cumsum(recorded.sum(axis=1))]).astype(np.int64)
    return Accesses(
        keys, starts, layer.astype(np.int64), dealt[order // layers].astype(np.int64), layers, trace.num_experts,
        trace.top_k, workers, tokens,
    )  # fmt: skip
