"""The decoder and the pools together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shmroute.config import RuntimeConfig
from shmroute.evaluation.decoder import Decoder, KeyValueCache
from shmroute.evaluation.pools import Pools
from shmroute.shared.metrics import LaneCounter


@dataclass(frozen=True)
class Run:
    """What one setting did.

    Attributes
    ----------
    losses : ndarray
        float64 [pools, streams]: nats per token of each window.
    counts : ndarray
        int64 [pools, streams, counters], by `LaneCounter`.
    """

    losses: npt.NDArray[np.float64]
    counts: npt.NDArray[np.int64]

    def total(self, counter: LaneCounter) -> int:
        """A counter, of all pools and streams."""
        return int(self.counts[..., counter].sum())

    @property
    def hit_rate(self) -> float:
        """Share of (token, chosen expert) pairs that were resident when routed."""
        hits = self.total(LaneCounter.HITS)
        return hits / (hits + self.total(LaneCounter.MISSES))


def steps(streams: int, positions: int, layers: int) -> list[tuple[int, int, int]]:
    """In which order a pool's streams compute (position, stream, layer): at one pace, spread over the layers."""
    found = [
        (position * layers + layer + stream * layers / streams, stream, position, layer)
        for position in range(positions)
        for stream in range(streams)
        for layer in range(layers)
    ]
    return [(position, stream, layer) for _, stream, position, layer in sorted(found)]


def run(decoder: Decoder, windows: npt.NDArray[np.int64], config: RuntimeConfig, watch: Callable[[float], None]) -> Run:
    """Decode all windows, each pool's streams in turns, with the experts that routing chooses.

    Parameters
    ----------
    decoder : Decoder
    windows : ndarray
        int64 [pools, streams, tokens]: each token is predicted from those before it in its window.
    config : RuntimeConfig
        Budget, rule and policy; its `max_workers` is the number of streams.
    watch : callable
        Called with the share that is done.
    """
    pools, streams, tokens = windows.shape
    layers, positions = config.num_layers, tokens - 1
    caches = [KeyValueCache(decoder.config, pools, positions) for _ in range(streams)]
    cached = Pools(config, pools)
    hidden = [decoder.embedding[:0] for _ in range(streams)]
    losses = np.zeros((pools, streams))
    schedule = steps(streams, positions, layers)
    for done, (position, stream, layer) in enumerate(schedule):
        if layer == 0:
            hidden[stream] = decoder.embedding[windows[:, stream, position]]
        attended = decoder.attend(layer, hidden[stream], caches[stream], position)
        x, logits = decoder.gate(layer, attended)
        experts, weights = cached.step(stream, layer, logits)
        hidden[stream] = attended + decoder.mix(layer, x, experts, weights)
        if layer == layers - 1:
            losses[:, stream] += decoder.cross_entropy(hidden[stream], windows[:, stream, position + 1])
            watch((done + 1) / len(schedule))
    return Run(losses / positions, cached.counts())
