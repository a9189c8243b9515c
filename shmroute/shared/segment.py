"""A segment: one file in ``/dev/shm`` that holds the control part and the weight pool.

*Creation* is one act. The file is made without a name (``O_TMPFILE``), reserved, filled in whole, and then given its
name by ``linkat``. Nobody ever sees a half-made segment, and a creator that dies earlier leaves nothing. Of several
creators of one name, one link succeeds.

*Attaching* checks everything before it is used, each failure an error of its own, and maps the very file that it
checked.

How one is removed: `shmroute.shared.removal`.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import stat
import uuid as uuid_module
import warnings
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

from shmroute.config import RuntimeConfig
from shmroute.errors import (
    ConfigError,
    SegmentClosingError,
    SegmentExistsError,
    SegmentForeignError,
    SegmentLayoutError,
    SegmentNamespaceError,
    SegmentNotFoundError,
    SegmentPermissionError,
    SegmentTruncatedError,
    SegmentVersionError,
    SharedMemoryFullError,
)
from shmroute.shared.atomic import WORD, forget_views
from shmroute.shared.experts import read_word, swap_word, write_word
from shmroute.shared.identity import own_identity
from shmroute.shared.layout import (
    ABI,
    CONSTANTS,
    HEADER_ABI,
    HEADER_CONFIG,
    HEADER_CONFIG_BYTES,
    HEADER_FINGERPRINT,
    HEADER_MAGIC,
    HEADER_OWNER,
    HEADER_PID_NAMESPACE,
    HEADER_STATE,
    HEADER_TOTAL_BYTES,
    HEADER_UUID,
    LINE,
    MAGIC,
    RING_HEAD,
    RING_TAIL,
    Layout,
    compiled_constants,
)
from shmroute.shared.words import DESTROYING, LIVE, identity_pid, identity_state, pack_bonus

SHM = Path("/dev/shm")
PREFIX = "shmroute."
"""Of a segment's file; what goes with a segment is named ``shmroute-UUID…`` instead."""

NAME_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
MAX_CONFIG_BYTES = 1 << 20


def checked_name(name: str) -> str:
    """`name`, if it may name a segment.

    Raises
    ------
    ConfigError
        If it may not.
    """
    if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name):
        raise ConfigError(
            f"{name!r} is no name for a segment: 1 to 100 letters, digits, '_', '-' and '.', not starting with - or ."
        )
    return name


def segment_path(name: str) -> Path:
    """Where the segment of a name is."""
    return SHM / f"{PREFIX}{checked_name(name)}"


def pid_namespace() -> int:
    """Inode of this process's pid namespace."""
    return os.stat("/proc/self/ns/pid").st_ino


class _Mapping(SharedMemory):
    """A `SharedMemory` over a file that is already open.

    The base class's constructor opens by name, registers what it merely attaches with the resource tracker (which then
    unlinks a live segment when an unrelated process exits) and unlinks when mapping fails. So it is not called: its
    attributes are set here, and the rest of the class works on them.
    """

    _track = False

    def __init__(self, name: str, fd: int, size: int) -> None:
        self._fd = fd
        self._name = f"/{name}"
        self._size = size
        self._mmap: Any = mmap.mmap(fd, size)
        self._buf: Any = memoryview(self._mmap)
        anchor = ctypes.c_char.from_buffer(self._mmap)
        self.address = ctypes.addressof(anchor)
        del anchor  # an exported pointer would keep the mapping from being closed

    def __reduce__(self) -> Any:
        raise TypeError("a segment cannot be pickled: attach to it by name in the other process")

    def unlink(self) -> None:
        raise TypeError("a mapping does not unlink: see shmroute.shared.removal")

    def close(self) -> None:
        """Unmap, or leave the mapping to the views that still use it."""
        if self._buf is None:
            return
        forget_views(self.address, self._size)
        try:
            self._buf.release()
            self._mmap.close()  # refused, like the release, while anybody holds a view
        except BufferError:
            warnings.warn(
                f"views of expert weights outlive {self._name[1:]}; its memory stays mapped until they are gone",
                ResourceWarning,
                stacklevel=3,
            )
        self._buf = self._mmap = None
        os.close(self._fd)
        self._fd = -1


@dataclass(frozen=True)
class Segment:
    """A mapped segment.

    Attributes
    ----------
    name : str
    config : RuntimeConfig
    layout : Layout
    uuid : str
        32 hex digits, different for every segment ever made.
    mapping : SharedMemory
        Closed by `close`.
    address : int
        Where the mapping begins.
    inode : tuple of int
        (st_dev, st_ino) of the file.
    """

    name: str
    config: RuntimeConfig
    layout: Layout
    uuid: str
    mapping: _Mapping
    address: int
    inode: tuple[int, int]

    @property
    def buffer(self) -> memoryview:
        """The whole segment, writable."""
        assert self.mapping.buf is not None, "the segment was closed"
        return self.mapping.buf

    @property
    def lock_path(self) -> Path:
        """The file that the pager locks."""
        return SHM / f"shmroute-{self.uuid}.lock"

    def semaphore_name(self, lane: int | None) -> str:
        """The semaphore of a lane's bell, or with None of the pager's."""
        return _semaphore_name(self.uuid, lane)

    def read(self, offset: int) -> int:
        """The shared word at an offset."""
        return int(read_word(self.address + offset))

    def write(self, offset: int, value: int) -> None:
        """Set a shared word that has one writer."""
        write_word(self.address + offset, value)

    def swap(self, offset: int, expected: int, desired: int) -> bool:
        """One CAS on the shared word at an offset."""
        return bool(swap_word(self.address + offset, expected, desired))

    @property
    def closing(self) -> bool:
        """Whether the segment is being destroyed."""
        return identity_state(self.read(HEADER_STATE)) != LIVE

    def check_live(self) -> None:
        """Raise `SegmentClosingError` if the segment is being destroyed."""
        if self.closing:
            raise SegmentClosingError(f"{self.name!r} is being destroyed; attach again when it has been created anew")

    def close(self) -> None:
        """Unmap. Nothing in shared memory changes."""
        self.mapping.close()


def _semaphore_name(uuid: str, lane: int | None) -> str:
    return f"shmroute-{uuid}-{'pager' if lane is None else f'lane{lane}'}"


# ------------------------------------------------------------------ create


def create_segment(name: str, config: RuntimeConfig) -> Segment:
    """Make a segment and publish it under a name; this process is its owner.

    Raises
    ------
    SegmentExistsError
        If the name is taken. Nothing is left behind.
    SharedMemoryFullError
        If ``/dev/shm`` has no room.
    """
    path = segment_path(name)
    config_json = config.to_json().encode()
    layout = _layout(config, len(config_json))
    directory = os.open(SHM, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fd = os.open(SHM, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            _reserve(fd, layout.total_bytes)
            mapping = _Mapping(path.name, fd, layout.total_bytes)
        except BaseException:
            os.close(fd)
            raise
        status = os.fstat(fd)
        identifier = uuid_module.uuid4()
        segment = Segment(
            name, config, layout, identifier.hex, mapping, mapping.address, (status.st_dev, status.st_ino)
        )
        try:
            _initialise(segment, config_json, identifier.bytes)
            # A source directory makes Python call linkat, which alone follows the link to an unnamed file.
            os.link(f"/proc/self/fd/{fd}", path, src_dir_fd=directory, follow_symlinks=True)
        except BaseException as error:
            mapping.close()
            if isinstance(error, FileExistsError):
                raise SegmentExistsError(
                    f"a segment named {name!r} exists already: attach to it, choose another name, or remove it with "
                    f"'shmroute destroy {name}'"
                ) from None
            raise
    finally:
        os.close(directory)
    return segment


def _layout(config: RuntimeConfig, config_bytes: int) -> Layout:
    return Layout(
        config.num_layers, config.num_experts, config.max_workers, config.slots, config.slot_bytes, config_bytes
    )


def _reserve(fd: int, size: int) -> None:
    """Take the memory now: a full tmpfs is an error here, not a SIGBUS later."""
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
            raise
        filesystem = os.statvfs(SHM)
        free = filesystem.f_bavail * filesystem.f_frsize
        raise SharedMemoryFullError(
            error.errno,
            f"the segment needs {size} bytes, {SHM} has {free} free: give it a smaller budget, remove leftovers "
            f"(shmroute doctor), or enlarge it (mount -o remount,size=… {SHM}; in a container, --shm-size)",
        ) from None


def _initialise(segment: Segment, config_json: bytes, uuid: bytes) -> None:
    """Fill in a segment that nobody else can see. Words that are not set here start as 0."""
    layout, buffer = segment.layout, segment.buffer
    me = own_identity(LIVE)
    segment.write(HEADER_MAGIC, MAGIC)
    segment.write(HEADER_ABI, ABI)
    segment.write(HEADER_TOTAL_BYTES, layout.total_bytes)
    segment.write(HEADER_FINGERPRINT, layout.fingerprint)
    segment.write(HEADER_PID_NAMESPACE, pid_namespace())
    segment.write(HEADER_CONFIG_BYTES, len(config_json))
    buffer[HEADER_UUID : HEADER_UUID + 16] = uuid
    buffer[HEADER_CONFIG : HEADER_CONFIG + len(config_json)] = config_json
    segment.write(HEADER_STATE, me)
    segment.write(HEADER_OWNER, me)
    for layer in range(layout.num_layers):
        segment.write(layout.bonus + layer * LINE, pack_bonus(segment.config.router.initial_bonus(layer)))
    for cursor in (RING_HEAD, RING_TAIL):
        segment.write(layout.ring + cursor, 1 << layout.ring_bits)


# ------------------------------------------------------------------ attach


def attach_segment(name: str, *, closing: bool = False) -> Segment:
    """Map a segment that another process made.

    Parameters
    ----------
    name : str
    closing : bool
        Accept one that is being destroyed, to finish that.

    Raises
    ------
    SegmentNotFoundError, SegmentPermissionError, SegmentForeignError, SegmentVersionError, SegmentTruncatedError,
    SegmentNamespaceError, SegmentLayoutError, SegmentClosingError
        Each for what its name says.
    """
    path = segment_path(name)
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        raise SegmentNotFoundError(
            f"no segment named {name!r} ({path}): start it with shmroute.create or 'shmroute pager'; "
            f"'shmroute ls' shows what there is"
        ) from None
    except PermissionError as error:
        raise SegmentPermissionError(f"{path} may not be opened by this user: {error.strerror}") from None
    except OSError as error:
        raise SegmentForeignError(f"{path} cannot be a segment: {error.strerror}") from None
    try:
        status = os.fstat(fd)
        _check_file(path, status)
        config, layout, uuid = _read_header(path, fd, status, closing=closing)
        try:
            mapping = _Mapping(path.name, fd, layout.total_bytes)
        except ValueError as error:
            raise SegmentTruncatedError(f"{path} was truncated just now: {error}") from None
    except BaseException:
        os.close(fd)
        raise
    return Segment(name, config, layout, uuid, mapping, mapping.address, (status.st_dev, status.st_ino))


def _check_file(path: Path, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise SegmentForeignError(f"{path} is no regular file")
    if status.st_uid != os.geteuid():
        raise SegmentPermissionError(
            f"{path} belongs to user {status.st_uid}, this process runs as {os.geteuid()}: "
            f"a segment serves one user's processes only"
        )
    if status.st_mode & 0o077:
        raise SegmentPermissionError(
            f"{path} has mode {stat.S_IMODE(status.st_mode):04o}, so others may change it; expected 0600"
        )


def _read_header(path: Path, fd: int, status: os.stat_result, *, closing: bool) -> tuple[RuntimeConfig, Layout, str]:
    """Check a segment's header, from the fixed part to the settings; sizes before they are used."""
    size = status.st_size
    header = os.pread(fd, HEADER_CONFIG, 0)

    def word(offset: int) -> int:
        return int.from_bytes(header[offset : offset + WORD], "little", signed=True)

    if word(HEADER_MAGIC) != MAGIC:
        raise SegmentForeignError(f"{path} is no segment of shmroute: it does not begin with its magic number")
    if len(header) < HEADER_CONFIG:
        raise SegmentTruncatedError(f"{path} has {size} bytes, less than a header")
    if word(HEADER_ABI) != ABI:
        raise SegmentVersionError(
            f"{path} has ABI version {word(HEADER_ABI)}, this process has {ABI}: run one version of shmroute in all "
            f"processes of a runtime"
        )
    if word(HEADER_TOTAL_BYTES) != size:
        raise SegmentTruncatedError(f"{path} has {size} bytes, its header says {word(HEADER_TOTAL_BYTES)}")
    if status.st_blocks * 512 < size:  # holes: touching one takes memory, and is a SIGBUS where there is none
        raise SegmentTruncatedError(f"{path} has {size} bytes, but memory for {status.st_blocks * 512} of them only")
    if word(HEADER_PID_NAMESPACE) != pid_namespace():
        raise SegmentNamespaceError(
            f"{path} was created in another pid namespace; all processes of a runtime must be in one "
            f"(in containers, share it: --pid)"
        )
    config_bytes = word(HEADER_CONFIG_BYTES)
    if not 0 < config_bytes <= min(MAX_CONFIG_BYTES, size - HEADER_CONFIG):
        raise SegmentLayoutError(f"{path}: settings of {config_bytes} bytes do not fit the file")
    try:
        config = RuntimeConfig.from_json(os.pread(fd, config_bytes, HEADER_CONFIG).decode())
    except (ConfigError, UnicodeDecodeError) as error:
        raise SegmentLayoutError(f"{path}: the settings in its header cannot be read: {str(error)[:200]}") from error
    layout = _layout(config, config_bytes)
    if layout.total_bytes != size or word(HEADER_FINGERPRINT) != layout.fingerprint:
        raise SegmentLayoutError(
            f"{path} was laid out otherwise than this process would (fingerprint {word(HEADER_FINGERPRINT):x}, "
            f"expected {layout.fingerprint:x}): run one version of shmroute in all processes of a runtime"
        )
    if compiled_constants() != CONSTANTS:
        raise SegmentLayoutError("the compiled kernels are not those of the Python code: see shmroute doctor")
    state = identity_state(word(HEADER_STATE))
    if state == DESTROYING and not closing:
        raise SegmentClosingError(f"{path} is being destroyed by process {identity_pid(word(HEADER_STATE))}")
    if state not in (LIVE, DESTROYING):
        raise SegmentForeignError(f"{path} is in no state that a segment can be in")
    return config, layout, header[HEADER_UUID : HEADER_UUID + 16].hex()


# ------------------------------------------------------------------ what is there
