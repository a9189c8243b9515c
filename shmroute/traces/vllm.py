"""What vLLM returns with ``--enable-return-routed-experts``: a response of its HTTP server, or an array of offline use.

Two formats, both in the field ``routed_experts`` of each of a response's ``choices``:

- since 0.22 a string: base64 of an npy file, unsigned or int32 [prompt + generated tokens - 1, layers, k]. The last
  token that was sampled is never routed (``CompletionResponseChoice`` in vLLM's
  ``vllm/entrypoints/openai/completion/protocol.py``; vllm-project/vllm pull request 38939);
- in 0.21 nested lists [generated tokens, layers, k], and the prompt's in ``prompt_routed_experts`` [prompt tokens,
  layers, k] at the response's top; tokens that the prefix cache spared are -1
  (https://docs.vllm.ai/en/v0.21.0/training/routed_experts_replay/).

Either may be null. Offline, ``CompletionOutput.routed_experts`` is such an array, to be saved with ``numpy.save``
(vLLM's ``examples/rl/routed_experts_e2e.py``).

Each choice is one sequence, after the prompt's tokens in the first: the prompt is computed once, so where later choices
repeat its rows, these are left out. Versions that count all of a model's layers leave zeros for those without experts;
such layers are left out too. Neither format says how many experts a layer has, so the caller must.
"""

from __future__ import annotations

import base64
import io
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
    prompt = _prompt_tokens(response)
    first: npt.NDArray[Any] | None = None
    for number, choice in enumerate(choices):
        if choice.get("routed_experts") is None:
            continue
        ids = _ids(path, f"choices[{number}].routed_experts", choice["routed_experts"])
        if isinstance(choice["routed_experts"], str):
            if first is None:
                first = ids
            elif np.array_equal(ids[:prompt], first[:prompt]):
                ids = ids[prompt:]
        pieces.append(ids)
        sequences.append(number)
    pieces, sequences = _without_empty(pieces, sequences)
    if not pieces:
        raise TraceError(str(path), "its routed experts are all null or empty: the requests were aborted, or not run")
    if len({piece.shape[1:] for piece in pieces}) > 1:
        raise TraceError(str(path), f"its routed experts differ in layers or k: {[piece.shape for piece in pieces]}")
    ids = np.concatenate(pieces)
    seq_id = np.concatenate([np.full(len(piece), sequence) for piece, sequence in zip(pieces, sequences, strict=True)])
    return _trace(path, ids, num_experts, seq_id)


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
    except (ValueError, EOFError, OverflowError, SyntaxError) as error:
        raise TraceError(str(path), f"it is no plain npy array ({error})") from error
    if ids.ndim != 3 or ids.dtype.kind not in "iu":
        raise TraceError(str(path), f"it must be integers [tokens, layers, k], not {ids.dtype} {ids.shape}")
    return _trace(path, ids, num_experts, np.zeros(len(ids), np.int64))


def _trace(path: Path, ids: npt.NDArray[Any], num_experts: int, seq_id: npt.NDArray[np.int64]) -> Trace:
    """The trace of a model's layers, without those that have no experts."""
    numbers = np.arange(ids.shape[1])
    if ids.shape[2] > 1 and (ids > 0).any():  # no layer with experts chooses number 0 more than once
        numbers = np.flatnonzero((ids > 0).any(axis=(0, 2)))
    meta = {"source": "vLLM", "layer_numbers": numbers.tolist()}
    return Trace(path.stem, str(path), ids[:, numbers], num_experts, seq_id=seq_id, meta=meta)


def _prompt_tokens(response: dict[str, Any]) -> int:
    """How many tokens the prompt has, 0 if the response does not say."""
    usage = response.get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) and count > 0 else 0


def _ids(path: Path, name: str, value: Any) -> npt.NDArray[Any]:
    try:
        if isinstance(value, str):
            array = np.lib.format.read_array(io.BytesIO(base64.b64decode(value, validate=True)), allow_pickle=False)
        else:
            array = np.array(value)
    except (ValueError, EOFError, OverflowError, SyntaxError, MemoryError):
        array = np.array(None)
    if array.size == 0:
        return np.zeros((0, 0, 0), np.int64)
    if array.dtype.kind not in "iu" or array.ndim != 3:
        raise TraceError(
            str(path),
            f"{name} must be integers [tokens, layers, k]: nested lists of equal lengths, or an npy file in base64",
        )
    return array


def _without_empty(pieces: list[npt.NDArray[Any]], sequences: list[int]) -> tuple[list[npt.NDArray[Any]], list[int]]:
    kept = [number for number, piece in enumerate(pieces) if len(piece)]
    return [pieces[number] for number in kept], [sequences[number] for number in kept]
