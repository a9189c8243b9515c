"""A source that fails on command: wrap it around another to see how *your* service takes a failing disk.

It is part of the package, not of its tests, because whoever integrates the runtime has the same questions:
what do workers see when a read fails, when it takes a second, when the pager dies in the middle of one? Reads
happen in another process, so faults are switched on and off in a small control file, which is read anew at
each read::

    spec = faulty_spec(source.spec, control="/tmp/faults.json", log="/tmp/reads.log")
    ...                                     # start the runtime on `spec`
    set_faults("/tmp/faults.json", [Fault(layer=0, expert=3, error="EIO")])
    ...                                     # expert 3 of layer 0 now fails to load
    set_faults("/tmp/faults.json", [])
    read_log("/tmp/reads.log")              # who read what so far, in all processes

Not for production: each read opens the control file, and one line is written for it.
"""

from __future__ import annotations

import errno
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from shmroute.errors import CheckpointError, ConfigError
from shmroute.sources.base import ExpertGeometry, SourceSpec
from shmroute.sources.bounded_json import open_regular, parse_json_object, read_exactly, shown

MAX_CONTROL_BYTES = 2**20
MAX_DELAY = 3600.0
POLL_SECONDS = 0.005
_ERRNO_BY_NAME = {name: number for number, name in errno.errorcode.items()}


@dataclass(frozen=True)
class Fault:
    """What happens to reads of certain experts. What is set takes effect in the order given here.

    Attributes
    ----------
    layer, expert : int or "*"
        The reads it applies to; ``"*"`` means all.
    delay : float
        Seconds to wait before reading, at most an hour.
    block_until : str or None
        Path: the read waits, without limit, until something exists there. To kill a pager in mid-load.
    error : str or None
        Name of an errno (``"EIO"``): the read raises that `OSError`.
    truncate : bool
        The read raises the `CheckpointError` of a file that ends too early.
    corrupt : bool
        The read succeeds, with all bits of the first, middle and last byte flipped.

    Raises
    ------
    ConfigError
        If a field is of another type or outside its range.
    """

    layer: int | str = "*"
    expert: int | str = "*"
    delay: float = 0.0
    block_until: str | None = None
    error: str | None = None
    truncate: bool = False
    corrupt: bool = False

    def __post_init__(self) -> None:
        for name, number in (("layer", self.layer), ("expert", self.expert)):
            if number != "*" and (type(number) is not int or number < 0):
                raise ConfigError(f"a fault's {name} is {shown(number)}; an integer from 0 or '*' is expected")
        if isinstance(self.delay, bool) or not isinstance(self.delay, int | float) or not 0 <= self.delay <= MAX_DELAY:
            raise ConfigError(f"a fault's delay is {shown(self.delay)}; seconds from 0 to {MAX_DELAY:g} are expected")
        if self.block_until is not None and not isinstance(self.block_until, str):
            raise ConfigError(f"a fault's block_until is {shown(self.block_until)}; a path is expected")
        if self.error is not None and (not isinstance(self.error, str) or self.error not in _ERRNO_BY_NAME):
            raise ConfigError(f"a fault's error is {shown(self.error)}; the name of an errno is expected")
        for name, flag in (("truncate", self.truncate), ("corrupt", self.corrupt)):
            if not isinstance(flag, bool):
                raise ConfigError(f"a fault's {name} is {shown(flag)}; true or false is expected")

    def applies_to(self, layer: int, expert: int) -> bool:
        return self.layer in ("*", layer) and self.expert in ("*", expert)


class LoggedRead(NamedTuple):
    """One line of the log: a read that was begun."""

    layer: int
    expert: int
    pid: int


def set_faults(path: str | os.PathLike[str], faults: Sequence[Fault]) -> None:
    """Make `faults` the ones in force, in all processes, for reads that begin from now on.

    The file is replaced in one step: a reader sees the old faults or the new ones.

    Parameters
    ----------
    path : str or os.PathLike
        The control file.
    faults : sequence of Fault
        Empty to end all faults.
    """
    target = os.path.abspath(os.fspath(path))
    fd, draft = tempfile.mkstemp(dir=os.path.dirname(target), prefix=".faults-")
    try:
        with os.fdopen(fd, "w") as file:
            json.dump({"faults": [asdict(fault) for fault in faults]}, file)
        os.replace(draft, target)
    except BaseException:
        os.unlink(draft)
        raise


def read_faults(path: str) -> tuple[Fault, ...]:
    """The faults that a control file sets; none if there is no such file.

    Raises
    ------
    ConfigError
        If it holds anything else than `set_faults` writes.
    """
    if not os.path.lexists(path):
        return ()
    try:
        fd = open_regular(path)
        try:
            size = os.fstat(fd).st_size
            if size > MAX_CONTROL_BYTES:
                raise ConfigError(f"{path}: {size} bytes are too many for a control file")
            listed = parse_json_object(read_exactly(fd, size, 0, path), path).get("faults")
        finally:
            os.close(fd)
    except CheckpointError as error:
        raise ConfigError(f"the control file is unusable: {error}") from error
    if not isinstance(listed, list):
        raise ConfigError(f"{path}: the key 'faults' must be a list, not {shown(listed)}")
    known = {field.name for field in fields(Fault)}
    faults = []
    for entry in listed:
        if not isinstance(entry, dict) or not entry.keys() <= known:
            raise ConfigError(f"{path}: a fault is {shown(entry)}; an object with keys of {sorted(known)} is expected")
        faults.append(Fault(**entry))
    return tuple(faults)


def read_log(path: str | os.PathLike[str]) -> list[LoggedRead]:
    """All reads begun so far, in the order of their lines; none if there is no log yet."""
    if not os.path.exists(path):
        return []
    with open(path, encoding="ascii") as file:
        return [LoggedRead(*map(int, line.split())) for line in file]


def faulty_spec(
    inner: SourceSpec, control: str | os.PathLike[str], log: str | os.PathLike[str] | None = None
) -> SourceSpec:
    """The recipe of a `FaultySource` around the source that `inner` describes."""
    return SourceSpec(
        "shmroute.sources.faulty:FaultySource",
        {
            "inner_factory": inner.factory,
            "inner_arguments": dict(inner.arguments),
            "control": os.path.abspath(os.fspath(control)),
            "log": None if log is None else os.path.abspath(os.fspath(log)),
        },
    )


class FaultySource:
    """Another source, with faults.

    Parameters
    ----------
    inner_factory, inner_arguments
        The other source's `SourceSpec`; `faulty_spec` fills them in.
    control : str
        Path of the control file; see `set_faults`. It need not exist.
    log : str or None
        Path of a file to which each read adds a line, before any fault takes effect; see `read_log`.

    Raises
    ------
    ConfigError
        If the control file is unusable, or the inner source's factory cannot be imported.
    CheckpointError
        If the inner source refuses.
    OSError
        If the log cannot be opened.
    """

    def __init__(
        self, inner_factory: str, inner_arguments: dict[str, Any], control: str, log: str | None = None
    ) -> None:
        self._control = os.path.abspath(control)
        self._log = None if log is None else os.path.abspath(log)
        read_faults(self._control)
        self._inner = SourceSpec(inner_factory, inner_arguments).open()
        self._log_fd = -1
        if self._log is not None:
            try:
                self._log_fd = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            except OSError:
                self._inner.close()
                raise

    @property
    def geometry(self) -> ExpertGeometry:
        return self._inner.geometry

    @property
    def spec(self) -> SourceSpec:
        return faulty_spec(self._inner.spec, self._control, self._log)

    def read_into(
        self, layer: int, expert: int, buffer: memoryview, filled: Callable[[int, int], object] | None = None
    ) -> None:
        """Read from the inner source, with the faults that the control file sets for this expert just now.

        Raises
        ------
        ConfigError
            If the control file became unusable.
        CheckpointError, OSError
            As the faults or the inner source say.
        """
        if self._log_fd >= 0:
            # One write of one short line to an O_APPEND descriptor: lines of several processes never mix.
            os.write(self._log_fd, f"{layer} {expert} {os.getpid()}\n".encode("ascii"))
        faults = [fault for fault in read_faults(self._control) if fault.applies_to(layer, expert)]
        for fault in faults:
            self._before_read(fault, layer, expert)

        def damage(begin: int, end: int) -> None:
            for position in {0, len(buffer) // 2, len(buffer) - 1}:
                if begin <= position < end:
                    buffer[position] ^= 0xFF
            if filled is not None:
                filled(begin, end)

        self._inner.read_into(layer, expert, buffer, damage if any(fault.corrupt for fault in faults) else filled)

    def _before_read(self, fault: Fault, layer: int, expert: int) -> None:
        time.sleep(fault.delay)
        while fault.block_until is not None and not os.path.exists(fault.block_until):
            time.sleep(POLL_SECONDS)
        if fault.error is not None:
            number = _ERRNO_BY_NAME[fault.error]
            raise OSError(number, os.strerror(number), self._inner.location(layer, expert))
        if fault.truncate:
            raise CheckpointError(self._inner.location(layer, expert), "the file is truncated (an injected fault)")

    def drop_page_cache(self, layer: int, expert: int) -> None:
        self._inner.drop_page_cache(layer, expert)

    def location(self, layer: int, expert: int) -> str:
        return self._inner.location(layer, expert)

    def gate(self, layer: int) -> npt.NDArray[np.float32]:
        """The inner source's; faults apply to experts only."""
        return self._inner.gate(layer)

    def gate_bias(self, layer: int) -> npt.NDArray[np.float32] | None:
        """As the inner source's."""
        return self._inner.gate_bias(layer)

    def correction_bias(self, layer: int) -> npt.NDArray[np.float32] | None:
        """As the inner source's."""
        return self._inner.correction_bias(layer)

    def close(self) -> None:
        self._inner.close()
        if self._log_fd >= 0:
            fd, self._log_fd = self._log_fd, -1
            os.close(fd)
