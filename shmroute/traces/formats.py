"""Which loader reads a file, by how its name ends."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Final

from shmroute.errors import TraceError
from shmroute.traces.megatron import load_records
from shmroute.traces.merging import merge
from shmroute.traces.npz import load_npz
from shmroute.traces.table import load_csv
from shmroute.traces.trace import Trace
from shmroute.traces.vllm import load_array, load_response

FOREIGN: Final[dict[str, tuple[str, Callable[[Path, int], Trace]]]] = {
    ".csv": ("CSV", load_csv),
    ".json": ("a vLLM response", load_response),
    ".npy": ("vLLM's routed experts", load_array),
    ".jsonl": ("Megatron Core's router trace", load_records),
}


def open_trace(path: str | Path, num_experts: int | None = None) -> Trace:
    """Read a trace.

    Parameters
    ----------
    path : str or Path
        ``.npz`` (this package's format), ``.json`` or ``.npy`` (vLLM), ``.jsonl`` (Megatron Core) or ``.csv``; or the
        folder to which workers recorded.
    num_experts : int, optional
        Experts in each layer: needed for all formats but npz, which says so itself.

    Raises
    ------
    TraceError
        If there is no such file, or it is not what its name says.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if path.is_dir():
        return merge(path)
    if suffix != ".npz" and suffix not in FOREIGN:
        raise TraceError(
            str(path), f"a trace ends in .npz, {', '.join(FOREIGN)}; {suffix or 'no ending'} is none of these"
        )
    try:
        if not path.is_file():
            raise TraceError(str(path), "there is no such file")
        if suffix == ".npz":
            return load_npz(path)
        kind, load = FOREIGN[suffix]
        if num_experts is None:
            raise TraceError(
                str(path), f"{kind} does not say how many experts a layer has: give that number (--experts)"
            )
        return load(path, num_experts)
    except OSError as error:
        raise TraceError(str(path), f"it cannot be read: {error.strerror}") from error
    except MemoryError as error:
        raise TraceError(str(path), "it is larger than memory") from error
