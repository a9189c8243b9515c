"""``python -m shmroute.demo.worker``: one worker of the demonstration, which plays one domain's recorded tokens.

Says ``ready`` on standard output, starts at a line on standard input, and writes its outputs and choices to a file.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import shmroute
from shmroute.demo.recording import Recording
from shmroute.errors import ShmrouteError
from shmroute.process_memory import memory_of
from shmroute.shared.pool import ExpertWeights

TIMEOUT = 60.0


def feed_forward(weights: ExpertWeights, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """A gated SiLU feed-forward expert on one hidden state, float32 [H]."""
    gate = weights["gate"].astype(np.float32) @ x
    inner = gate / (1 + np.exp(-gate)) * (weights["up"].astype(np.float32) @ x)
    result: npt.NDArray[np.float32] = weights["down"].astype(np.float32) @ inner
    return result


def play(runtime: shmroute.Runtime, hidden: npt.NDArray[np.float32], outputs: Path) -> dict[str, Any]:
    """Route and compute every token of a stream through every layer; how long that took.

    Parameters
    ----------
    hidden : ndarray
        float32 [T, L, H].
    outputs : Path
        Gets ``outputs`` float32 [T, L, H] and ``choices`` int32 [T, L, k].
    """
    config = runtime.config
    gates = [runtime.gate(layer) for layer in range(config.num_layers)]
    routers = [runtime.router(layer) for layer in range(config.num_layers)]
    result = np.zeros_like(hidden)
    choices = np.zeros((*hidden.shape[:2], config.top_k), np.int32)
    experts, weights = np.zeros(config.top_k, np.int32), np.zeros(config.top_k, np.float32)
    print("ready", flush=True)
    sys.stdin.readline()
    began = time.monotonic()
    for token in range(len(hidden)):
        for layer in range(config.num_layers):
            x = hidden[token, layer]
            routers[layer].route_into(gates[layer] @ x, experts, weights)
            choices[token, layer] = experts
            for _, _, ranks, expert in runtime.experts(layer, experts, timeout=TIMEOUT):
                result[token, layer] += weights[ranks[0]] * feed_forward(expert, x)
    seconds = time.monotonic() - began
    np.savez(outputs, outputs=result, choices=choices)
    return {"tokens": len(hidden), "seconds": seconds, "private_bytes": memory_of().private}


def main() -> int:
    """Attach, play, report."""
    parser = argparse.ArgumentParser(prog="python -m shmroute.demo.worker")
    parser.add_argument("name", help="of the runtime")
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--domain", required=True)
    parser.add_argument("--tokens", required=True, type=int, help="at most so many")
    parser.add_argument("--outputs", required=True, type=Path)
    arguments = parser.parse_args()
    hidden = Recording.load(arguments.data).stream(arguments.domain, arguments.tokens)
    try:
        with shmroute.attach(arguments.name) as runtime:
            report = play(runtime, hidden, arguments.outputs)
            mine = runtime.metrics().worker_of(os.getpid())
            assert mine is not None, "the lane that routed is gone"
            print(json.dumps(report | {"metrics": mine.as_dict()}), flush=True)
    except ShmrouteError as error:
        print(f"worker {arguments.domain}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
