"""Traces as plain CSV: one row for each choice, or for each token and layer.

The header names the columns, in any order: ``token`` and ``layer``, both from 0, and either ``expert`` (one choice a
row) or ``expert0``, ``expert1``, … (one token and layer a row, -1 where not recorded); ``weight`` or ``weight0``, …,
and ``seq`` if known. Further columns are ignored. The caller says how many experts a layer has.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shmroute.errors import TraceError
from shmroute.shared.words import MAX_EXPERTS, MAX_LAYERS
from shmroute.traces.trace import NOT_RECORDED, Trace

MOST_TOKENS = 1 << 24
MOST_CELLS = 1 << 30


def load_csv(path: Path, num_experts: int) -> Trace:
    """Read a CSV file.

    Raises
    ------
    TraceError
        If a column is missing or a cell is no number.
    """
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.reader(file)
        header = [name.strip().lower() for name in next(reader, [])]
        at = {name: number for number, name in enumerate(header)}
        ranked = [f"expert{rank}" for rank in range(len(header)) if f"expert{rank}" in at]
        experts = [name for name in ("expert",) if name in at] or ranked
        if not experts or "token" not in at or "layer" not in at:
            raise TraceError(
                str(path),
                f"its first line must name the columns token, layer and expert (or expert0, expert1, …), not "
                f"{', '.join(header) or 'nothing'}",
            )
        weights = [name.replace("expert", "weight") for name in experts]
        with_weights = all(name in at for name in weights)
        rows: list[list[float]] = []
        try:
            for row in reader:
                if row:
                    cells = [row[at[name]] for name in ("token", "layer", *experts)]
                    rows.append([float(int(cell)) for cell in cells] + [float(row[at["seq"]]) if "seq" in at else 0.0])
                    if with_weights:
                        rows[-1] += [float(row[at[name]]) for name in weights]
        except (ValueError, IndexError, OverflowError, csv.Error) as error:
            raise TraceError(str(path), f"line {reader.line_num}: {error}") from error
    if not rows:
        raise TraceError(str(path), "it has no rows after its header")
    return _trace(path, num_experts, np.array(rows), len(experts), with_weights)


def _trace(path: Path, num_experts: int, rows: npt.NDArray[np.float64], columns: int, with_weights: bool) -> Trace:
    token, layer = rows[:, 0].astype(np.int64), rows[:, 1].astype(np.int64)
    if token.min() < 0 or layer.min() < 0 or token.max() >= MOST_TOKENS or layer.max() >= MAX_LAYERS:
        raise TraceError(str(path), f"token and layer must be from 0, under {MOST_TOKENS} and {MAX_LAYERS}: one is not")
    tokens, layers = int(token.max()) + 1, int(layer.max()) + 1
    cell = token * layers + layer
    order = np.argsort(cell, kind="stable")
    rows, cell = rows[order], cell[order]
    first = np.searchsorted(cell, cell)
    rank = np.arange(len(cell)) - first
    k = (int(rank.max()) + 1) * columns
    if columns > 1 and k > columns:
        again = divmod(int(cell[np.argmax(rank)]), layers)
        raise TraceError(str(path), f"token {again[0]} has layer {again[1]} in more than one row")
    if k > MAX_EXPERTS or tokens * layers * k > MOST_CELLS:
        raise TraceError(str(path), f"{tokens} tokens × {layers} layers × {k} choices are too many")
    ids = np.full((tokens * layers, k), NOT_RECORDED, np.int64)
    weights = np.zeros((tokens * layers, k), np.float32)
    for column in range(columns):
        ids[cell, rank + column] = rows[:, 2 + column].astype(np.int64)
        if with_weights:
            weights[cell, rank + column] = rows[:, 3 + columns + column]
    seq_id = np.zeros(tokens, np.int64)
    seq_id[cell // layers] = rows[:, 2 + columns].astype(np.int64)
    shape = (tokens, layers, k)
    return Trace(
        path.stem,
        str(path),
        ids.reshape(shape).astype(np.int32),
        num_experts,
        weights.reshape(shape) if with_weights else None,
        seq_id=seq_id,
        meta={"source": "CSV"},
    )
