"""A worker that attaches to a cache served by `shmroute pager`. Run: python examples/worker.py NAME [DOMAIN]"""

import sys
from pathlib import Path

import numpy as np

import shmroute

name, domain = sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "kjv"
recording = np.load(Path(__file__).parent / "tiny-mixtral" / "activations.npz")  # hidden states that entered each layer
windows = {"kjv": 0, "faq": 4, "fortunes": 8, "python": 12}
hidden = recording["h"][recording["seq_id"] == windows[domain]].astype(np.float32)

with shmroute.attach(name) as rt:
    for x in hidden:  # token by token
        for layer in range(rt.config.num_layers):
            decision = rt.router(layer).route(rt.gate(layer) @ x[layer])
            out = np.zeros_like(x[layer])
            for _, _, ranks, w in rt.experts(layer, decision.experts, timeout=5.0):
                gate = w["gate"].astype(np.float32) @ x[layer]
                inner = gate / (1 + np.exp(-gate)) * (w["up"].astype(np.float32) @ x[layer])
                out += decision.weights[ranks[0]] * (w["down"].astype(np.float32) @ inner)
    print(f"{len(hidden)} tokens of {domain}; hit rate of all workers so far: {rt.metrics().hit_rate:.3f}")
