"""The decoder and the pools together."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from shmroute.config import RuntimeConfig
from shmroute.evaluation.decoder import Decoder, KeyValueCache
from shmroute.evaluation.pools import Pools
from shmroute.shared.metrics import LaneCounter


@dataclass(frozen=True)
class Setting:
    """What a run is made with.

    Attributes
    ----------
    config : RuntimeConfig
        Budget, rule and policy; its `max_workers` is the number of streams that share a pool.
    layer_factors : tuple of float
        For each layer, by what its rule's strength is multiplied.
    """

    config: RuntimeConfig
    layer_factors: tuple[float, ...]

    def to_json(self) -> str:
        """As JSON, from which `from_json` makes an equal object."""
        return json.dumps({"config": self.config.to_json(), "layer_factors": self.layer_factors})

    @classmethod
    def from_json(cls, text: str) -> Setting:
        """Read what `to_json` wrote."""
        data = json.loads(text)
        return cls(RuntimeConfig.from_json(data["config"]), tuple(data["layer_factors"]))


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


def run(decoder: Decoder, windows: npt.NDArray[np.int64], setting: Setting, watch: Callable[[float], None]) -> Run:
    """Decode all windows, each pool's streams in turns, with the experts that routing chooses.

    Parameters
    ----------
    decoder : Decoder
    windows : ndarray
        int64 [pools, streams, tokens]: each token is predicted from those before it in its window.
    setting : Setting
    watch : callable
        Called with the share that is done.
    """
    pools, streams, tokens = windows.shape
    layers, positions = setting.config.num_layers, tokens - 1
    caches = [KeyValueCache(decoder.config, pools, positions) for _ in range(streams)]
    cached = Pools(setting.config, setting.layer_factors, pools)
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
