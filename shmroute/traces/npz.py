"""The format of a trace file: a NumPy npz archive, without pickled objects.

| array | dtype, shape | |
|---|---|---|
| ``ids`` | integer [tokens, layers, k] | experts chosen, -1 where not recorded |
| ``weights`` | float [tokens, layers, k] | optional: their routing weights |
| ``logits`` | float [tokens, layers, experts] | optional: the gate's logits of all experts |
| ``seq_id`` | integer [tokens] | optional: which sequence a token belongs to |
| ``meta`` | str, 0-d | JSON object; ``experts``: how many a layer has (needed if there are no ``logits``) |

What shmroute recorded itself (`shmroute.recording`) also has

| array | dtype, shape | |
|---|---|---|
| ``resident`` | uint8 [tokens, layers, ⌈experts/8⌉] | the residency consulted: expert e: bit e mod 8 of byte e div 8 |
| ``lane`` | integer [tokens] | the worker lane that routed it |
| ``tick`` | integer [tokens, layers] | the layer's clock: a tick for each token of any worker; -1 where not recorded |
| ``strength`` | float64 [tokens, layers] | the cache bonus by which it was chosen; 0 where it could change nothing |
| ``spread`` | float64 [tokens, layers] | the spread by which it was chosen; 0 unless the rule is cache-prior |
| ``stall_ns`` | integer [tokens, layers] | ns waited for what it chose; of a batch, the first token that chose it |

and in ``meta``: ``run``, ``checkpoint``, ``layer_numbers``, ``expert_bytes``, ``slots``, ``router`` (the settings),
``workers`` (for each file: lane, generation, pid, records; unfinished, damaged and dropped ones), the sums of the last
three, and ``stall_elsewhere_ns`` (waited for experts that no token had chosen). Misses follow from ids and residency.

Tokens are in the order in which they were computed. Further arrays are ignored.
"""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shmroute.errors import TraceError
from shmroute.traces.trace import PER_TOKEN, Trace

LONGEST_META = 1 << 20
"""Characters."""

MOST_BYTES = 1 << 34
"""Of the arrays of one archive together, unpacked: a small file may claim to hold anything."""

UNREADABLE = (
    zipfile.BadZipFile, zlib.error, ValueError, EOFError, KeyError, OverflowError, SyntaxError, NotImplementedError,
    RuntimeError,
)  # fmt: skip
"""What reading a damaged archive raises: a wrong file, damaged data or header, an unknown compression, a password."""

ARRAYS = (*PER_TOKEN, "meta")


def load_npz(path: Path) -> Trace:
    """Read a trace file.

    Raises
    ------
    TraceError
        If it is none.
    """
    found = _arrays(path)
    if "ids" not in found:
        raise TraceError(
            str(path), "it has no array 'ids' (integers [tokens, layers, k], the experts that each token chose)"
        )
    meta = _meta(path, found.get("meta"))
    logits = found.get("logits")
    experts = meta.get("experts", meta.get("num_experts"))
    if experts is None and logits is not None and logits.ndim == 3:
        experts = logits.shape[2]
    if not isinstance(experts, int) or isinstance(experts, bool):
        raise TraceError(
            str(path),
            f"its 'meta' must say how many experts a layer has, as JSON such as {{\"experts\": 64}}, not {experts!r}",
        )
    optional = {name: found[name] for name in PER_TOKEN[1:] if name in found}
    return Trace(path.stem, str(path), found["ids"], experts, meta=meta, **optional)


def _arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist() if Path(entry.filename).stem in ARRAYS)
        if size > MOST_BYTES:
            raise TraceError(str(path), f"its arrays would take {size} bytes, more than the {MOST_BYTES} allowed")
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in ARRAYS if name in archive.files}
    except TraceError:
        raise
    except UNREADABLE as error:
        reason = f"it is no npz archive of plain arrays ({error}); see 'shmroute replay --help'"
        raise TraceError(str(path), reason) from error


def _meta(path: Path, array: npt.NDArray[Any] | None) -> dict[str, Any]:
    if array is None:
        return {}
    try:
        if array.dtype.kind != "U" or array.ndim != 0 or array.dtype.itemsize > 4 * LONGEST_META:
            raise ValueError(f"it is {array.dtype} {array.shape}")
        meta = json.loads(str(array))
        if not isinstance(meta, dict):
            raise ValueError(f"it is a {type(meta).__name__}")
    except (ValueError, RecursionError) as error:
        raise TraceError(str(path), f"'meta' must be one JSON object as a string: {error}") from error
    return meta


def save_trace(trace: Trace, path: Path) -> None:
    """Write a trace file: whole, or not at all."""
    arrays = {name: array for name in PER_TOKEN if (array := getattr(trace, name)) is not None}
    arrays["ids"] = trace.ids.astype(np.int16)
    meta = trace.meta | {"experts": trace.num_experts, "k": trace.top_k}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            np.savez_compressed(file, meta=np.array(json.dumps(meta)), **arrays)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
