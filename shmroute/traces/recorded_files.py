"""The files of a recording, back as arrays. They may be read while they are written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shmroute.config import RuntimeConfig
from shmroute.errors import ConfigError, TraceError
from shmroute.recording import records as r

LONGEST_CONFIG = 1 << 20
"""Bytes."""


@dataclass(frozen=True)
class RecordedFile:
    """What one worker recorded from one attachment.

    Attributes
    ----------
    path : Path
    run : str
        The uuid of the segment, hex.
    config : RuntimeConfig
    lane, generation, pid : int
    records : ndarray
        Those that count, of `RecordLayout.dtype`, in the order of their numbers.
    unfinished : int
        Records that were reserved and not finished.
    damaged : int
        Records that are finished but say what cannot be; left out.
    dropped : int
        Records that found no room.
    errno : int
        Why the file stopped growing; 0 if it did not.
    ended : bool
        Whether the worker left in order; else it was killed, or still records.
    """

    path: Path
    run: str
    config: RuntimeConfig
    lane: int
    generation: int
    pid: int
    records: npt.NDArray[Any]
    unfinished: int
    damaged: int
    dropped: int
    errno: int
    ended: bool

    def kind(self, kind: int) -> npt.NDArray[Any]:
        """The records of one kind."""
        found: npt.NDArray[Any] = self.records[(self.records["place"] & r.KIND_MASK) == kind]
        return found

    def as_dict(self) -> dict[str, Any]:
        """What happened, in JSON types."""
        return {
            "file": self.path.name,
            "lane": self.lane,
            "generation": self.generation,
            "pid": self.pid,
            "routed": len(self.kind(r.ROUTE)),
            "waits": len(self.kind(r.WAIT)),
            "unfinished": self.unfinished,
            "damaged": self.damaged,
            "dropped": self.dropped,
            "errno": self.errno,
            "ended": self.ended,
        }


def read_file(path: Path) -> RecordedFile | None:
    """Read one worker's file; None if its worker ended before the header was whole, so that nothing is in it.

    Raises
    ------
    TraceError
        If it is none, or damaged.
    """
    with path.open("rb") as file:
        words = np.frombuffer(file.read(r.HEADER_WORDS * r.WORD).ljust(r.HEADER_WORDS * r.WORD, b"\0"), "<i8")
        if words[r.HEADER_MAGIC] == 0:
            return None
        if words[r.HEADER_MAGIC] != r.MAGIC:
            raise TraceError(str(path), "it is no file of a recording")
        if words[r.HEADER_VERSION] != r.VERSION:
            raise TraceError(str(path), f"its format is version {words[r.HEADER_VERSION]}, not {r.VERSION}")
        config_bytes = int(words[r.HEADER_CONFIG_BYTES])
        if not 0 < config_bytes <= LONGEST_CONFIG:
            raise TraceError(str(path), f"its header is damaged: settings of {config_bytes} bytes")
        try:
            config = RuntimeConfig.from_json(file.read(config_bytes).decode())
            layout = r.layout_of(config)
        except (ConfigError, UnicodeDecodeError) as error:
            raise TraceError(str(path), f"its header is damaged: {error}") from error
        header_bytes, reserved = int(words[r.HEADER_BYTES]), int(words[r.HEADER_NEXT])
        wanted = (layout.record_bytes, r.header_bytes(config_bytes))
        if (words[r.HEADER_RECORD_BYTES], header_bytes) != wanted or reserved < 0:
            raise TraceError(str(path), "its header is damaged: it contradicts itself")
        present = max(path.stat().st_size - header_bytes, 0) // layout.record_bytes
        file.seek(header_bytes)
        records = np.fromfile(file, layout.dtype, min(reserved, present))
    finished = records["commit"] == np.arange(1, len(records) + 1)
    possible = _possible(records, config)
    return RecordedFile(
        path, words[r.HEADER_UUID : r.HEADER_UUID + 2].tobytes().hex(), config, int(words[r.HEADER_LANE]),
        int(words[r.HEADER_GENERATION]), int(words[r.HEADER_PID]), records[finished & possible],
        reserved - int(finished.sum()), int((finished & ~possible).sum()), int(words[r.HEADER_DROPPED]),
        int(words[r.HEADER_ERRNO]), bool(words[r.HEADER_ENDED]),
    )  # fmt: skip


def _possible(records: npt.NDArray[Any], config: RuntimeConfig) -> npt.NDArray[np.bool_]:
    """Which records say what can be."""
    layer, kind = records["place"] >> r.LAYER_SHIFT, records["place"] & r.KIND_MASK
    rows, row = records["rows"] >> r.ROWS_SHIFT, records["rows"] & ((1 << r.ROWS_SHIFT) - 1)
    in_range = ((records["ids"] >= 0) & (records["ids"] < config.num_experts)).all(axis=1)
    route = (kind == r.ROUTE) & in_range & (row < rows) & (records["moment"] >= 0) & (records["detail"] >= 0)
    wait = (kind == r.WAIT) & (records["detail"] >= 0) & (records["detail"] < config.num_experts)
    possible: npt.NDArray[np.bool_] = (layer >= 0) & (layer < config.num_layers) & (route | wait)
    return possible


def read_run(folder: Path, run: str | None = None) -> list[RecordedFile]:
    """The files of one run, by lane and generation.

    Parameters
    ----------
    folder : Path
    run : str, optional
        How the run's uuid begins; not needed if the folder holds one run.

    Raises
    ------
    TraceError
        If there is no such run, or more than one.
    """
    if not folder.is_dir():
        raise TraceError(str(folder), "there is no such folder")
    paths = sorted(folder.glob(f"*{r.SUFFIX}"))
    if not paths:
        raise TraceError(str(folder), f"it holds no recording: no file *{r.SUFFIX}")
    files = [file for path in paths if (file := read_file(path)) is not None]
    found = sorted({file.run for file in files})
    chosen = [one for one in found if one.startswith(run or "")]
    if not found:
        raise TraceError(str(folder), "no worker has recorded anything yet")
    if len(chosen) != 1:
        raise TraceError(
            str(folder),
            f"it holds the runs {', '.join(one[:8] for one in found)}; say which with 'shmroute record --run'"
            + f", not {run!r}" * (run is not None),
        )
    return [file for file in files if file.run == chosen[0]]
