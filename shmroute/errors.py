"""Every error that a user of the runtime can meet, one class for each thing that can be wrong."""

from __future__ import annotations


class ShmrouteError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(ShmrouteError, ValueError):
    """A setting is outside what is allowed; the message says what is."""


class SmallBudgetWarning(UserWarning):
    """The budget can be served, but hardly: the message says what will happen, and which budget would do."""


class NonFiniteLogitsError(ShmrouteError, ValueError):
    """A row of gate logits has fewer finite values than experts to choose.

    Attributes
    ----------
    row : int
        The first such row of the batch. Nothing of the batch was recorded.
    """

    def __init__(self, row: int, finite: int, top_k: int) -> None:
        self.row = row
        super().__init__(
            f"row {row} of the logits has {finite} finite values, but top_k = {top_k} experts must be chosen; "
            f"nothing of this batch was recorded. Check the gate's input for NaN or inf"
        )


class KernelCacheError(ShmrouteError):
    """The directory for compiled kernels cannot be used."""


# ------------------------------------------------------------------ segments


class SegmentError(ShmrouteError):
    """Base of what can be wrong with a shared segment."""


class SegmentExistsError(SegmentError, FileExistsError):
    """The name is taken by a segment that somebody still uses."""


class SegmentNotFoundError(SegmentError, FileNotFoundError):
    """No segment of that name."""


class SegmentPermissionError(SegmentError, PermissionError):
    """The segment belongs to another user, or others may write to it."""


class SegmentForeignError(SegmentError):
    """The file of that name is no segment of this package."""


class SegmentVersionError(SegmentError):
    """The segment was made by a version with another ABI."""


class SegmentLayoutError(SegmentError):
    """The segment's layout is not the one this process computes, or was compiled for."""


class SegmentTruncatedError(SegmentError):
    """The file is shorter or longer than its header says."""


class SegmentNamespaceError(SegmentError):
    """The segment was created in another pid namespace, where process ids mean something else."""


class SegmentClosingError(SegmentError):
    """The segment is being destroyed."""


class SharedMemoryFullError(SegmentError, OSError):
    """``/dev/shm`` has no room for the segment."""


# ------------------------------------------------------------------ workers and experts


class RuntimeClosedError(ShmrouteError, RuntimeError):
    """The runtime was closed, or belongs to the process that forked this one."""


class NoWorkerLane(ShmrouteError):
    """All worker lanes are taken by live processes."""


class DeviceError(ShmrouteError):
    """A GPU did not do what was asked of it."""


class LeaseHeldError(ShmrouteError, RuntimeError):
    """A thread that holds a lease asked for an expert that it would have to wait for."""


class ExpertTimeout(ShmrouteError, TimeoutError):
    """The pager is at work, but the expert was not resident in time."""


class PagerUnavailable(ShmrouteError, TimeoutError):
    """No pager, or one that is stopped, served the request in time."""


class PagerStartError(ShmrouteError):
    """The pager process ended before it served."""


class ExpertLoadError(ShmrouteError):
    """One expert could not be loaded; others are not affected, and the load is retried on a later demand.

    Attributes
    ----------
    layer, expert : int
    path : str
        Where the expert's bytes are.
    reason : str
    """

    def __init__(self, layer: int, expert: int, path: str, reason: str) -> None:
        self.layer, self.expert, self.path, self.reason = layer, expert, path, reason
        super().__init__(f"expert {expert} of layer {layer} could not be loaded from {path}: {reason}")


# ------------------------------------------------------------------ checkpoints


class CheckpointError(ShmrouteError):
    """A checkpoint is missing something, damaged, or of a kind that is not supported.

    Attributes
    ----------
    path : str
        The file at fault.
    tensor : str or None
        The tensor at fault, where it is one tensor.
    """

    def __init__(self, path: str, reason: str, tensor: str | None = None) -> None:
        self.path, self.reason, self.tensor = path, reason, tensor
        super().__init__(f"{path}: {f'tensor {tensor}: ' if tensor else ''}{reason}")


class UnsupportedScoringError(CheckpointError):
    """The model chooses its experts by a rule that the router does not have."""


class UnsupportedDtypeError(CheckpointError):
    """The experts are stored in a dtype that cannot be served as it is."""


class CheckpointChangedError(CheckpointError):
    """A file changed after it was opened."""


# ------------------------------------------------------------------ traces


class InputFileError(ConfigError):
    """A file that a command was given is not what it should be.

    Attributes
    ----------
    path : str
        The file at fault.
    """

    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        super().__init__(f"{path}: {reason}")


class TraceError(InputFileError):
    """A recording of routing cannot be read, or is not what it should be."""


class RecordingError(ShmrouteError):
    """What is routed cannot be recorded where the settings say."""


# ------------------------------------------------------------------ evaluation


class TextError(InputFileError):
    """A text to evaluate on cannot be read, or does not fit the model."""


class EvaluationError(ShmrouteError):
    """A run of an evaluation failed."""


# ------------------------------------------------------------------ serving


class ServingError(ShmrouteError):
    """The HTTP endpoint could not be opened, or cannot go on."""
