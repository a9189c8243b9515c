"""What Megatron Core's router tracer writes with ``--moe-routing-trace-path``: ``router_trace_rank{N}.jsonl``.

The format is that of ``RouterTracer`` in ``megatron/core/transformer/moe/router_trace.py`` (NVIDIA/Megatron-LM, commit
4addead). One JSON object a line, for each step, block and layer: ``step``, ``stage`` ("pre_dispatch"), ``block``
("decoder" or "mtp"), ``layer``, ``rank``, ``num_tokens``, ``topk`` and ``top_indices`` [tokens][topk]; records of
multi-token prediction also have ``mtp_idx``. Earlier versions have no ``stage`` and ``block``.

In inference a layer fires once a step. In training a step is an iteration, so a layer comes once for each micro-batch
(and once more where activations are recomputed, which the file does not tell): its n-th record of a step belongs to
the n-th micro-batch. A last micro-batch that lacks layers, since the program ended in it, is left out.

Choices come by ascending id, not by weight, when the router hands out a map. Here the records of one block count,
multi-token prediction left out; layers are numbered by their order. The sidecar files of hidden states and logits are
not read. The caller says how many experts a layer has.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shmroute.errors import TraceError
from shmroute.traces.trace import Trace

LONGEST_LINE = 1 << 26
STAGE = "pre_dispatch"

Layers = dict[int, npt.NDArray[Any]]
"""A micro-batch's choices, [tokens, topk], by layer."""


def load_records(path: Path, num_experts: int) -> Trace:
    """Read one rank's file.

    Raises
    ------
    TraceError
        If a line is no such record, or a micro-batch that is not the last lacks a layer.
    """
    steps: dict[int, list[Layers]] = {}
    block = None
    with path.open("rb") as lines:
        number = 0
        while line := lines.readline(LONGEST_LINE):
            number += 1
            if not line.strip():
                continue
            record = _record(path, number, line)
            if record.get("stage", STAGE) != STAGE or "mtp_idx" in record:
                continue
            block = record.get("block") if block is None else block
            if record.get("block") != block:
                continue
            batches = steps.setdefault(record["step"], [])
            batch = next((layers for layers in batches if record["layer"] not in layers), None)
            if batch is None:
                batches.append(batch := {})
            batch[record["layer"]] = _indices(path, number, record)
    found = [(step, layers) for step in sorted(steps) for layers in steps[step]]
    if not found:
        raise TraceError(str(path), f"it has no record of stage {STAGE!r}")
    numbers = sorted({layer for _, layers in found for layer in layers})
    if len(found) > 1 and len(found[-1][1]) < len(numbers):
        found.pop()
    pieces = []
    for step, layers in found:
        if sorted(layers) != numbers or len({array.shape for array in layers.values()}) > 1:
            raise TraceError(
                str(path),
                f"step {step} has the layers {sorted(layers)} with {sorted({len(a) for a in layers.values()})} tokens; "
                f"each step needs all of {numbers}, with as many tokens and choices in each; give one rank's file",
            )
        pieces.append(np.stack([layers[layer] for layer in numbers], axis=1))
    if len({piece.shape[1:] for piece in pieces}) > 1:
        raise TraceError(str(path), "its steps differ in how many experts a token chooses")
    meta = {"source": "Megatron Core", "layer_numbers": numbers, "block": block}
    return Trace(path.stem, str(path), np.concatenate(pieces), num_experts, meta=meta)


def _record(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TraceError(str(path), f"line {number} is no JSON ({error})") from error
    wanted = isinstance(record, dict) and all(isinstance(record.get(name), int) for name in ("step", "layer"))
    if not wanted or not isinstance(record.get("top_indices"), list):
        raise TraceError(
            str(path),
            f"line {number} is no record of a router: it needs integers 'step' and 'layer', and 'top_indices'",
        )
    return dict(record)


def _indices(path: Path, number: int, record: dict[str, Any]) -> npt.NDArray[Any]:
    try:
        indices = np.array(record["top_indices"])
    except ValueError:
        indices = np.array(None)
    if indices.dtype.kind not in "iu" or indices.ndim != 2:
        raise TraceError(str(path), f"line {number}: 'top_indices' must be integers [tokens][topk]")
    for name, length in (("num_tokens", len(indices)), ("topk", indices.shape[1])):
        if record.get(name, length) != length:
            raise TraceError(str(path), f"line {number}: {name!r} is {record[name]!r}, but 'top_indices' has {length}")
    return indices
