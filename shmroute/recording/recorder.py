"""One process's recording of what it routes: a file that grows ahead of its writers.

The file is mapped in chunks. A thread of the worker looks a hundred times a second how far its writers are, reserves
and maps chunks ahead of them, and unmaps those that are full. So a writer finds memory that is there already: the disk
has promised its blocks (`posix_fallocate`: a full disk is an error here, never SIGBUS in a worker), and its pages are
mapped. Writers that outrun that thread count what they cannot write.

The file is made at the first router or lease of an attachment, and cut to what was written when the attachment ends. A
worker that is killed leaves it longer; the rest is zeros.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import warnings
import weakref
from pathlib import Path
from typing import Final

import numpy as np

from shmroute.attachment import Attachment
from shmroute.config import RuntimeConfig, TraceConfig
from shmroute.errors import RecordingError
from shmroute.recording import append as a
from shmroute.recording import records as r
from shmroute.shared.atomic import WORD, forget_views
from shmroute.shared.experts import read_word, write_word
from shmroute.shared.layout import LANE_IDENTITY
from shmroute.shared.words import identity_generation

LOOK_EVERY: Final = 0.01
"""Seconds."""

CHUNKS_AHEAD: Final = 4
"""Chunks that are ready before they are needed, at least: 65,536 records. Twice what was used since the last look, if
that is more."""

MADV_POPULATE_WRITE: Final = 23  # Linux 5.14; before, the first write to a page costs its writer a fault

_libc = ctypes.CDLL(None, use_errno=True)  # its calls let go of the GIL, those of the `mmap` module do not
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_READ_WRITE, _SHARED, _MAP_FAILED = 1 | 2, 1, ctypes.c_void_p(-1).value

_recorders: weakref.WeakSet[Recorder] = weakref.WeakSet()


class Recorder:
    """The recording of one attachment. Made by `recorder_of`.

    Parameters
    ----------
    config : RuntimeConfig
        Names the folder.
    uuid : str
        Of the segment.
    lane, generation : int
    counters : int
        Address of the lane's counters.
    growing : bool
        Start the thread that grows the file. Without, the caller calls `grow`.

    Attributes
    ----------
    path : Path
    address : int
        Of the words that plans hold; see `shmroute.recording.append`.

    Raises
    ------
    RecordingError
        If the file cannot be made.
    """

    def __init__(
        self, config: RuntimeConfig, uuid: str, lane: int, generation: int, counters: int, *, growing: bool = True
    ) -> None:
        assert config.recording is not None
        layout = r.layout_of(config)
        settings = config.to_json().encode()
        self._chunk_bytes = layout.record_bytes * a.CHUNK_RECORDS
        self._header_bytes = r.header_bytes(len(settings))
        self.path = prepare_folder(config.recording) / f"{uuid[:8]}-lane{lane:02}-{generation}-{os.getpid()}{r.SUFFIX}"
        self._words = np.zeros(a.RECORDER_WORDS, np.int64)
        self.address: int = self._words.ctypes.data
        self._header = 0
        self._chunks: dict[int, int] = {}
        self._next_chunk = 0
        self._reserved_before = 0
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise RecordingError(f"{self.path} cannot be made: {error.strerror}") from error
        try:
            os.posix_fallocate(self._descriptor, 0, self._header_bytes)
            self._header = self._map(0, self._header_bytes)
            self._words[a.HEADER], self._words[a.COUNTERS] = self._header, counters
            self._words[a.RECORD_BYTES], self._words[a.WITH_LOGITS] = layout.record_bytes, layout.logits
            self._words[a.NUM_EXPERTS], self._words[a.TOP_K] = config.num_experts, config.top_k
            ctypes.memmove(self._header + r.HEADER_WORDS * WORD, settings, len(settings))
            first, second = np.frombuffer(bytes.fromhex(uuid), "<i8").tolist()
            for word, value in (
                (r.HEADER_VERSION, r.VERSION), (r.HEADER_BYTES, self._header_bytes),
                (r.HEADER_RECORD_BYTES, layout.record_bytes), (r.HEADER_CONFIG_BYTES, len(settings)),
                (r.HEADER_UUID, first), (r.HEADER_UUID + 1, second), (r.HEADER_LANE, lane),
                (r.HEADER_GENERATION, generation), (r.HEADER_PID, os.getpid()),
            ):  # fmt: skip
                write_word(self._header + word * WORD, value)
            self.grow()
            write_word(self._header + r.HEADER_MAGIC * WORD, r.MAGIC)
        except OSError as error:
            self._unmap_all()
            os.close(self._descriptor)
            self.path.unlink()
            raise RecordingError(
                f"{self.path} cannot be made: {error.strerror}; recording begins with "
                f"{self._header_bytes + (CHUNKS_AHEAD + 1) * self._chunk_bytes} bytes for each worker"
            ) from error
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._grow_ahead, name="shmroute-recorder", daemon=True)
        if growing:
            self._thread.start()
        _recorders.add(self)

    # ---------------------------------------------------------- growing

    def _read(self, word: int) -> int:
        return int(read_word(self._header + word * WORD))

    def grow(self) -> None:
        """Let full chunks go, and have enough that are ready. Only one thread at a time may call this.

        Raises
        ------
        OSError
            If there is no room for another chunk, on the disk or in the address space.
        """
        reserved = self._read(r.HEADER_NEXT)
        for chunk, address in list(self._chunks.items()):
            first = chunk << a.CHUNK_BITS
            if first + a.CHUNK_RECORDS > reserved:
                break
            if a.committed_records(address, first, int(self._words[a.RECORD_BYTES])) == a.CHUNK_RECORDS:
                self._unmap(address, self._chunk_bytes)
                del self._chunks[chunk]
        pace, self._reserved_before = (reserved - self._reserved_before) >> a.CHUNK_BITS, reserved
        wanted = (reserved >> a.CHUNK_BITS) + max(CHUNKS_AHEAD, 2 * pace) + 1
        oldest = min(self._chunks, default=self._next_chunk)
        while self._next_chunk < min(wanted, oldest + a.TABLE_CHUNKS):
            offset = self._header_bytes + self._next_chunk * self._chunk_bytes
            os.posix_fallocate(self._descriptor, offset, self._chunk_bytes)
            address = self._chunks[self._next_chunk] = self._map(offset, self._chunk_bytes)
            a.offer_chunk(self.address, self._next_chunk, address)
            self._next_chunk += 1

    def _grow_ahead(self) -> None:
        while not self._ended.wait(LOOK_EVERY):
            try:
                self.grow()
            except OSError as error:
                # Workers go on: what finds no room from here on is counted.
                write_word(self._header + r.HEADER_ERRNO * WORD, error.errno or errno.EIO)
                warnings.warn(
                    f"recording to {self.path} ends here: {error.strerror}. Routing goes on; what is not recorded is "
                    f"counted as 'unrecorded'",
                    RuntimeWarning,
                    stacklevel=1,
                )
                return

    def _map(self, offset: int, size: int) -> int:
        address = _libc.mmap(None, size, _READ_WRITE, _SHARED, self._descriptor, offset)
        if address == _MAP_FAILED:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        _libc.madvise(address, size, MADV_POPULATE_WRITE)
        return int(address)

    def _unmap(self, address: int, size: int) -> None:
        forget_views(address, size)
        _libc.munmap(address, size)

    def _unmap_all(self) -> None:
        for address in self._chunks.values():
            self._unmap(address, self._chunk_bytes)
        self._chunks.clear()
        if self._header:
            self._unmap(self._header, self._header_bytes)
            self._header = 0

    # ---------------------------------------------------------- end

    def close(self) -> None:
        """End the file, when no writer is left."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        written = self._header_bytes + self._read(r.HEADER_NEXT) * int(self._words[a.RECORD_BYTES])
        write_word(self._header + r.HEADER_ENDED * WORD, 1)
        self._unmap_all()
        os.ftruncate(self._descriptor, written)
        os.close(self._descriptor)
        forget_views(self.address, self._words.nbytes)

    def abandon_in_child(self) -> None:
        """After a fork, in the child: let go of the parent's file without touching it."""
        if self._header:
            self._unmap_all()
            os.close(self._descriptor)


def prepare_folder(trace: TraceConfig) -> Path:
    """Make the folder to record to, if need be; where it is.

    Raises
    ------
    RecordingError
        If it cannot be made.
    """
    try:
        os.makedirs(trace.folder, exist_ok=True)
    except OSError as error:
        raise RecordingError(f"{trace.folder} cannot be made a folder to record to: {error.strerror}") from error
    return Path(trace.folder)


def recorder_of(attachment: Attachment) -> Recorder | None:
    """The recorder of an attachment, by `Attachment.one`; None if its runtime records nothing. Claims a lane."""
    segment = attachment.segment
    if segment.config.recording is None:
        return None
    lane = attachment.lane()
    word = segment.read(segment.layout.lane(lane.number) + LANE_IDENTITY)
    recorder = Recorder(segment.config, segment.uuid, lane.number, identity_generation(word), lane.counters)
    attachment.before_close(recorder.close)
    return recorder


def _abandon_all_in_child() -> None:
    for recorder in list(_recorders):
        recorder.abandon_in_child()


os.register_at_fork(after_in_child=_abandon_all_in_child)
