"""A trace recorded on the shipped model by one worker: always the same."""

from __future__ import annotations

from pathlib import Path

from runtimes import REPOSITORY, unique_name

from shmroute.config import RouterConfig, RuntimeConfig
from shmroute.demo.recording import Recording
from shmroute.lifecycle import create
from shmroute.traces import Trace
from shmroute.traces.merging import merge

CHECKPOINT = REPOSITORY / "examples" / "tiny-mixtral"


def record_shipped_model(folder: Path) -> Trace:
    """Route every recorded token of the shipped model, one by one, without a bonus; what was recorded of it."""
    hidden = Recording.load(CHECKPOINT).hidden
    config = RuntimeConfig.from_checkpoint(CHECKPOINT, "50%", router=RouterConfig(cache_bonus=0.0), trace=folder)
    with create(unique_name(), config, progress=None) as runtime:
        layers = range(config.num_layers)
        gates, routers = [runtime.gate(layer) for layer in layers], [runtime.router(layer) for layer in layers]
        for token in hidden:
            for layer in layers:
                routers[layer].route(gates[layer] @ token[layer])
    return merge(folder)
