"""What vLLM returns with ``--enable-return-routed-experts``.

A response of ``/v1/completions``, as JSON: ``prompt_routed_experts`` [prompt tokens, layers, k] at its top, and
``routed_experts`` [generated tokens, layers, k] in each of its ``choices``, as nested lists
(https://docs.vllm.ai/en/v0.21.0/training/routed_experts_replay/). Or one such array, saved as npy from offline use.
Each choice is one sequence, after a copy of the prompt's tokens for the first only: the prompt is computed once.

Neither says how many experts a layer has, so the caller must.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shmroute.errors import TraceError
from shmroute.traces.trace import Trace

MOST_BYTES = 1 << 30
"""Of a response."""


def load_response(path: Path, num_experts: int) -> Trace:
    """Read a completions response.

    Raises
    ------
    TraceError
        If it is none, or has no routed experts.
    """
    if path.stat().st_size > MOST_BYTES:
        raise TraceError(str(path), f"it has {path.stat().st_size} bytes, more than the {MOST_BYTES} allowed")
    try:
        response = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise TraceError(str(path), f"it is no JSON ({error})") from error
    choices = response.get("choices") if isinstance(response, dict) else None
    if not isinstance(choices, list) or not choices or not all(isinstance(choice, dict) for choice in choices):
        raise TraceError(str(path), "it is no response of /v1/completions: it has no list 'choices'")
    if not any("routed_experts" in choice for choice in choices):
        raise TraceError(
            str(path), "no choice has 'routed_experts': start vLLM with --enable-return-routed-experts and ask again"
        )
    pieces, sequences = [], []
    if response.get("prompt_routed_experts") is not None:
        pieces.append(_ids(path, "prompt_routed_experts", response["prompt_routed_experts"]))
        sequences.append(0)
    for number, choice in enumerate(choices):
        if choice.get("routed_experts") is not None:
            pieces.append(_ids(path, f"choices[{number}].routed_experts", choice["routed_experts"]))
            sequences.append(number)
    pieces, sequences = _without_empty(pieces, sequences)
    if not pieces or len({piece.shape[1:] for piece in pieces}) > 1:
        raise TraceError(str(path), f"its routed experts differ in layers or k: {[piece.shape for piece in pieces]}")
    ids = np.concatenate(pieces)
    seq_id = np.concatenate([np.full(len(piece), sequence) for piece, sequence in zip(pieces, sequences, strict=True)])
    return Trace(path.stem, str(path), ids, num_experts, seq_id=seq_id, meta={"source": "vLLM"})


def load_array(path: Path, num_experts: int) -> Trace:
    """Read one sequence's routed experts, saved with ``numpy.save``.

    Raises
    ------
    TraceError
        If it is anything else.
    """
    try:
        with path.open("rb") as file:
            ids = np.lib.format.read_array(file, allow_pickle=False)
    except (ValueError, EOFError, OverflowError) as error:
        raise TraceError(str(path), f"it is no plain npy array ({error})") from error
    return Trace(path.stem, str(path), ids, num_experts, meta={"source": "vLLM"})


def _ids(path: Path, name: str, value: Any) -> npt.NDArray[Any]:
    try:
        array = np.array(value)
    except ValueError:
        array = np.array(None)
    if array.size == 0:
        return np.zeros((0, 0, 0), np.int64)
    if array.dtype.kind not in "iu" or array.ndim != 3:
        raise TraceError(
            str(path),
            f"{name} must be integers [tokens, layers, k] in nested lists of equal lengths, not {array.dtype}",
        )
    return array


def _without_empty(pieces: list[npt.NDArray[Any]], sequences: list[int]) -> tuple[list[npt.NDArray[Any]], list[int]]:
    kept = [number for number, piece in enumerate(pieces) if len(piece)]
    return [pieces[number] for number in kept], [sequences[number] for number in kept]
