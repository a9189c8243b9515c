"""Why a load failed: from an exception in the pager to the failure word, and from there to the waiter's message."""

from __future__ import annotations

import os

from shmroute.errors import CheckpointChangedError, CheckpointError
from shmroute.shared.words import (
    FAILURE_CHANGED,
    FAILURE_CHECKPOINT,
    FAILURE_CHECKSUM,
    FAILURE_ERRNO_BITS,
    FAILURE_OS_ERROR,
    FAILURE_SOURCE,
    failure_errno,
    failure_kind,
)

REASONS = {
    FAILURE_CHECKPOINT: "the file does not hold what it held when it was opened (truncated or damaged)",
    FAILURE_CHANGED: "the file changed after it was opened; restart the pager to serve the new one",
    FAILURE_CHECKSUM: "the bytes read differ from those of the first load (checksum mismatch)",
    FAILURE_SOURCE: "the source raised an unexpected error; the pager's output has it",
}


class ChecksumMismatch(Exception):
    """The bytes of a load differ from those of the expert's first load."""


def classify(error: BaseException) -> tuple[int, int]:
    """(kind, errno) of a failed load, for `pack_failure`."""
    if isinstance(error, ChecksumMismatch):
        return FAILURE_CHECKSUM, 0
    if isinstance(error, CheckpointChangedError):
        return FAILURE_CHANGED, 0
    if isinstance(error, CheckpointError):
        return FAILURE_CHECKPOINT, 0
    if isinstance(error, OSError):
        return FAILURE_OS_ERROR, (error.errno or 0) & ((1 << FAILURE_ERRNO_BITS) - 1)
    return FAILURE_SOURCE, 0


def failure_reason(word: int) -> str:
    """What a failure word says, in words."""
    if failure_kind(word) == FAILURE_OS_ERROR:
        return os.strerror(failure_errno(word)) if failure_errno(word) else "the read failed"
    return REASONS.get(failure_kind(word), "unknown")
