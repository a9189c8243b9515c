"""The files of a run as one `Trace`.

A worker routes a batch through the layers in order, thread by thread. So the calls of one thread, in the order of their
records, are cut into *passes*: a call continues a pass if it has as many tokens and its layer comes later, and nothing
was dropped in between. A pass gives as many tokens as its calls have; a layer of which it has no record is "not
recorded". Each thread is a sequence. Tokens of all workers are ordered by when their first layer was routed, which that
layer's clock tells.
"""

from __future__ import annotations

import bisect
import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shmroute.errors import TraceError
from shmroute.recording import records as r
from shmroute.shared.words import BONUS_ONE, spread_mean
from shmroute.traces.recorded_files import RecordedFile, read_run
from shmroute.traces.trace import NOT_RECORDED, Trace


@dataclasses.dataclass
class _Stream:
    """The tokens of one thread; all arrays but `lane` begin with [tokens, layers]."""

    lane: int
    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    resident: npt.NDArray[np.uint8]
    tick: npt.NDArray[np.int64]
    strength: npt.NDArray[np.float64]
    spread: npt.NDArray[np.float64]
    stall_ns: npt.NDArray[np.int64]
    logits: npt.NDArray[np.float32] | None

    def when(self) -> npt.NDArray[np.int64]:
        """int64 [tokens]: the tick of each one's first recorded layer, never before that of the token before."""
        first = np.argmax(self.tick >= 0, axis=1)
        ticks = np.take_along_axis(self.tick, first[:, None], axis=1)[:, 0]
        return np.maximum.accumulate(ticks)


def merge(folder: Path, run: str | None = None) -> Trace:
    """Read what the workers of a run recorded, all of it that is finished.

    Parameters
    ----------
    folder, run
        As for `read_run`.

    Raises
    ------
    TraceError
        If nothing was recorded there, or it is damaged.
    """
    return merge_files(folder, read_run(folder, run))


def merge_files(folder: Path, files: list[RecordedFile]) -> Trace:
    """`merge` of files that were read."""
    config = files[0].config
    streams, elsewhere = [], 0
    for file in files:
        routes, waits = file.kind(r.ROUTE), file.kind(r.WAIT)
        for thread in dict.fromkeys(routes["thread"].tolist()):
            stream, rest = _stream(file, routes[routes["thread"] == thread], waits[waits["thread"] == thread])
            streams.append(stream)
            elsewhere += rest
        elsewhere += int(waits["moment"][~np.isin(waits["thread"], routes["thread"])].sum())
    if not streams:
        raise TraceError(str(folder), "its workers have recorded no routing call")
    order = np.argsort(np.concatenate([stream.when() for stream in streams]), kind="stable")

    def joined(name: str) -> Any:
        return np.concatenate([getattr(stream, name) for stream in streams])[order]

    lengths = [len(stream.ids) for stream in streams]
    source = config.source
    meta = {
        "source": "shmroute",
        "run": files[0].run,
        "checkpoint": source and str(source.arguments.get("path", source.factory)),
        "layer_numbers": list(config.layer_numbers),
        "expert_bytes": config.expert_bytes,
        "slots": config.slots,
        "router": dataclasses.asdict(config.router),
        "workers": [file.as_dict() for file in files],
        "stall_elsewhere_ns": elsewhere,
    } | {name: sum(getattr(file, name) for file in files) for name in ("unfinished", "damaged", "dropped")}
    return Trace(
        folder.name, str(folder), joined("ids"), config.num_experts, joined("weights"),
        None if streams[0].logits is None else joined("logits"),
        np.repeat(np.arange(len(streams)), lengths)[order], meta,
        resident=joined("resident"), lane=np.repeat([stream.lane for stream in streams], lengths)[order],
        tick=joined("tick"), strength=joined("strength"), spread=joined("spread"), stall_ns=joined("stall_ns"),
    )  # fmt: skip


def _stream(file: RecordedFile, routes: npt.NDArray[Any], waits: npt.NDArray[Any]) -> tuple[_Stream, int]:
    """One thread's tokens, and the ns it waited for experts that none of them had chosen."""
    config, count = file.config, len(routes)
    layer, rows = routes["place"] >> r.LAYER_SHIFT, routes["rows"] >> r.ROWS_SHIFT
    row = routes["rows"] & ((1 << r.ROWS_SHIFT) - 1)
    call = routes["commit"] - row  # one number for all of a call, ascending
    begins = np.concatenate([[True], call[1:] != call[:-1]])
    dropped = routes["dropped"]
    cut = np.concatenate([[True], (layer[1:] <= layer[:-1]) | (rows[1:] != rows[:-1]) | (dropped[1:] != dropped[:-1])])
    # Rows of a call that were dropped, or not finished, are no tokens here unless another layer has them.
    tokens, token = np.unique((np.cumsum(begins & cut) << r.ROWS_SHIFT) | row, return_inverse=True)
    shape = (len(tokens), config.num_layers)

    def placed(values: npt.NDArray[Any], nothing: Any) -> Any:
        array = np.full(shape + values.shape[1:], nothing, values.dtype)
        array[token, layer] = values
        return array

    bitmap = np.ascontiguousarray(routes["snapshot"]).view(np.uint8).reshape(count, -1)
    stream = _Stream(
        lane=file.lane,
        ids=placed(routes["ids"], NOT_RECORDED),
        weights=placed(routes["weights"], 0),
        resident=placed(bitmap[:, : -(-config.num_experts // 8)], 0),
        tick=placed(routes["moment"], NOT_RECORDED),
        strength=placed(routes["detail"] / BONUS_ONE, 0),
        spread=placed(np.array([spread_mean(word) for word in routes["spread"].tolist()]), 0),
        stall_ns=np.zeros(shape, np.int64),
        logits=placed(routes["logits"], np.nan) if "logits" in (routes.dtype.names or ()) else None,
    )
    starts = np.flatnonzero(begins)
    calls = [
        (int(layer[start]), int(routes["commit"][start]), token[start:end])
        for start, end in zip(starts, [*starts[1:], count], strict=True)
    ]
    return stream, _attribute_waits(stream, waits, calls)


def _attribute_waits(
    stream: _Stream, waits: npt.NDArray[Any], calls: list[tuple[int, int, npt.NDArray[np.int64]]]
) -> int:
    """Put each wait to the first token of the layer's last call that had chosen the expert; what is left over, in ns.

    Parameters
    ----------
    calls : list of tuple
        Of each call its layer, its first record's number, its tokens.
    """
    elsewhere = 0
    numbers = [number for _, number, _ in calls]
    for number, layer, expert, ns in zip(
        waits["commit"].tolist(), (waits["place"] >> r.LAYER_SHIFT).tolist(), waits["detail"].tolist(),
        waits["moment"].tolist(), strict=True,
    ):  # fmt: skip
        latest = bisect.bisect_left(numbers, number) - 1
        while latest >= 0 and calls[latest][0] != layer:
            latest -= 1
        tokens = calls[latest][2] if latest >= 0 else np.zeros(0, np.int64)
        chose = tokens[(stream.ids[tokens, layer] == expert).any(axis=1)]
        if len(chose):
            stream.stall_ns[chose[0], layer] += ns
        else:
            elsewhere += ns
    return elsewhere
