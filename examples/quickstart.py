"""One process that owns a shared cache of experts and uses it. Run: python examples/quickstart.py"""

from pathlib import Path

import numpy as np

import shmroute
from shmroute import RouterConfig, RuntimeConfig

CHECKPOINT = Path(__file__).parent / "tiny-mixtral"


def feed_forward(w, x):
    """A gated SiLU expert on hidden states [n, hidden]."""
    gate = x @ w["gate"].astype(np.float32).T
    return (gate / (1 + np.exp(-gate)) * (x @ w["up"].astype(np.float32).T)) @ w["down"].astype(np.float32).T


hidden = np.load(CHECKPOINT / "activations.npz")["h"].astype(np.float32)  # [tokens, layers, hidden], recorded
config = RuntimeConfig.from_checkpoint(CHECKPOINT, budget="50%", router=RouterConfig(cache_bonus=0.5))
with shmroute.create("quickstart", config, pager=True) as rt:  # also starts the pager; leaving removes everything
    for batch in np.split(hidden[:128], 64):  # two tokens at a time
        for layer in range(config.num_layers):
            x = batch[:, layer]
            decision = rt.router(layer).route(x @ rt.gate(layer).T)  # experts int32 [2, k], weights float32 [2, k]
            out = np.zeros_like(x)
            # Each needed expert once: resident ones first, the others as they arrive.
            for _, rows, ranks, w in rt.experts(layer, decision.experts, timeout=5.0):
                out[rows] += decision.weights[rows, ranks, None] * feed_forward(w, x[rows])
    metrics = rt.metrics()
    print(f"hit rate {metrics.hit_rate:.2f}, {metrics.pager.counters['loads']} loads; layer 0 has", rt.resident(0))
    print("most used of late in layer 0:", rt.affinity(0).top(3), rt.affinity(0).scores().round(2))
