"""Where experts come from: Hugging Face folders, a random number generator, or either of them with faults."""

from __future__ import annotations

import os

from shmroute.sources.base import DTYPES, ExpertGeometry, ExpertSource, ModelScoring, SourceSpec, TensorLayout
from shmroute.sources.faulty import (
    Fault,
    FaultySource,
    LoggedRead,
    faulty_spec,
    read_faults,
    read_log,
    set_faults,
)
from shmroute.sources.huggingface import HuggingFaceSource
from shmroute.sources.synthetic import SyntheticSource

__all__ = [
    "DTYPES",
    "ExpertGeometry",
    "ExpertSource",
    "Fault",
    "FaultySource",
    "HuggingFaceSource",
    "LoggedRead",
    "ModelScoring",
    "SourceSpec",
    "SyntheticSource",
    "TensorLayout",
    "faulty_spec",
    "open_source",
    "read_faults",
    "read_log",
    "set_faults",
]


def open_source(source: str | os.PathLike[str] | ExpertSource) -> ExpertSource:
    """What a user may give as "the model", as a source.

    Parameters
    ----------
    source : str, os.PathLike or ExpertSource
        A local Hugging Face model folder, or a source, which is returned as it is.

    Raises
    ------
    CheckpointError
        If the folder cannot be served.
    TypeError
        If `source` is none of these.
    """
    if isinstance(source, str | os.PathLike):
        return HuggingFaceSource(source)
    if isinstance(source, ExpertSource) and not isinstance(source, type):
        return source
    raise TypeError(
        f"a path of a Hugging Face model folder or an ExpertSource is expected, not {type(source).__name__}"
    )
