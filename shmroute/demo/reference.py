"""The dense reference: what the layers' outputs must be.

Deliberately shares no code with the runtime: the weights are read by the `safetensors` library, routing is a few lines
of plain numpy, and every expert is in memory.
"""

from __future__ import annotations

from pathlib import Path

import ml_dtypes  # noqa: F401 - lets numpy hold bfloat16
import numpy as np
import numpy.typing as npt
from safetensors import safe_open


def dense_reference(
    checkpoint: Path, hidden: npt.NDArray[np.float32], top_k: int
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Outputs and choices of a Mixtral checkpoint's MoE layers, nothing cached, nothing biased.

    Parameters
    ----------
    checkpoint : Path
        Folder with ``model.safetensors``.
    hidden : ndarray
        float32 [T, L, H], the hidden states that enter each layer.
    top_k : int

    Returns
    -------
    outputs : ndarray
        float32 [T, L, H].
    choices : ndarray
        int64 [T, L, k], best first.
    """
    tokens, layers, _ = hidden.shape
    outputs = np.zeros_like(hidden)
    choices = np.zeros((tokens, layers, top_k), np.int64)
    with safe_open(checkpoint / "model.safetensors", framework="numpy") as file:

        def tensor(name: str) -> npt.NDArray[np.float32]:
            return np.asarray(file.get_tensor(name)).astype(np.float32)

        for layer in range(layers):
            block = f"model.layers.{layer}.block_sparse_moe"
            x = hidden[:, layer]
            logits = x @ tensor(f"{block}.gate.weight").T
            chosen = np.argsort(-logits, axis=1, kind="stable")[:, :top_k]
            exponents = np.exp(np.take_along_axis(logits, chosen, 1) - logits.max(1, keepdims=True))
            weights = exponents / exponents.sum(1, keepdims=True)
            choices[:, layer] = chosen
            for expert in range(logits.shape[1]):
                rows, ranks = np.nonzero(chosen == expert)
                w1, w2, w3 = (tensor(f"{block}.experts.{expert}.{name}.weight") for name in ("w1", "w2", "w3"))
                gate = x[rows] @ w1.T
                inner = gate / (1 + np.exp(-gate)) * (x[rows] @ w3.T)
                outputs[rows, layer] += weights[rows, ranks, None] * (inner @ w2.T)
    return outputs, choices
