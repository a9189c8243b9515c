"""One process's recording of what it routes: its file, and the thread that grows it.

The file is made at the first router or lease of an attachment, and cut to what was written when the attachment ends. A
worker that is killed leaves it longer; the rest is zeros. Its blocks are promised by the disk before they are mapped: a
full disk is an error here, never SIGBUS in a worker.
"""

from __future__ import annotations

import ctypes
import os
import threading
import warnings
import weakref
from pathlib import Path

import numpy as np

from shmroute.attachment import Attachment
from shmroute.config import RuntimeConfig, TraceConfig
from shmroute.errors import RecordingError
from shmroute.recording import append as a
from shmroute.recording import records as r
from shmroute.recording.grow import CHUNKS_AHEAD, grow, keep_growing
from shmroute.recording.system import FAILED, allocate_blocks, map_shared, unmap
from shmroute.shared.atomic import WORD, forget_views
from shmroute.shared.experts import read_word, write_word
from shmroute.shared.layout import LANE_IDENTITY
from shmroute.shared.words import identity_generation

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
        Start the thread that grows the file. Without, the caller calls `grow_now`.

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
        self.path = prepare_folder(config.recording) / f"{uuid[:8]}-lane{lane:02}-{generation}-{os.getpid()}{r.SUFFIX}"
        self._chunk_bytes = layout.record_bytes * a.CHUNK_RECORDS
        self._header_bytes = r.header_bytes(len(settings))
        self._header = 0
        self._words = np.zeros(a.RECORDER_WORDS, np.int64)
        self.address: int = self._words.ctypes.data
        try:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise RecordingError(f"{self.path} cannot be made: {error.strerror}") from error
        try:
            self._header = self._map_header()
            for word, value in (
                (a.HEADER, self._header), (a.RECORD_BYTES, layout.record_bytes), (a.NUM_EXPERTS, config.num_experts),
                (a.TOP_K, config.top_k), (a.WITH_LOGITS, layout.logits), (a.COUNTERS, counters),
                (a.DESCRIPTOR, self._descriptor), (a.HEADER_BYTES, self._header_bytes),
            ):  # fmt: skip
                self._words[word] = value
            ctypes.memmove(self._header + r.HEADER_WORDS * WORD, settings, len(settings))
            first, second = np.frombuffer(bytes.fromhex(uuid), "<i8").tolist()
            for word, value in (
                (r.HEADER_VERSION, r.VERSION), (r.HEADER_BYTES, self._header_bytes),
                (r.HEADER_RECORD_BYTES, layout.record_bytes), (r.HEADER_CONFIG_BYTES, len(settings)),
                (r.HEADER_UUID, first), (r.HEADER_UUID + 1, second), (r.HEADER_LANE, lane),
                (r.HEADER_GENERATION, generation), (r.HEADER_PID, os.getpid()),
            ):  # fmt: skip
                write_word(self._header + word * WORD, value)
            self.grow_now()
            write_word(self._header + r.HEADER_MAGIC * WORD, r.MAGIC)
        except OSError as error:
            self._unmap_all()
            os.close(self._descriptor)
            self.path.unlink()
            raise RecordingError(
                f"{self.path} cannot be made: {error.strerror}; recording begins with "
                f"{self._header_bytes + (CHUNKS_AHEAD + 1) * self._chunk_bytes} bytes for each worker"
            ) from error
        self._thread = threading.Thread(target=self._grow_ahead, name="shmroute-recorder", daemon=True)
        if growing:
            self._thread.start()
        _recorders.add(self)

    # ---------------------------------------------------------- growing

    @property
    def mapped_chunks(self) -> range:
        """The chunks that are mapped now."""
        return range(int(self._words[a.OLDEST]), int(self._words[a.FOLLOWING]))

    def grow_now(self) -> None:
        """Let full chunks go, and have enough that are ready; not while the growing thread is at work.

        Raises
        ------
        OSError
            If there is no room for another chunk, on the disk or in the address space.
        """
        if (code := int(grow(self.address))) != 0:
            raise OSError(code, os.strerror(code))

    def _grow_ahead(self) -> None:
        code = int(keep_growing(self.address))
        if code == 0:
            return
        # Workers go on: what finds no room from here on is counted.
        write_word(self._header + r.HEADER_ERRNO * WORD, code)
        warnings.warn(
            f"recording to {self.path} ends here: {os.strerror(code)}. Routing goes on; what is not recorded is "
            f"counted as 'unrecorded'",
            RuntimeWarning,
            stacklevel=1,
        )

    def _map_header(self) -> int:
        code = allocate_blocks(self._descriptor, 0, self._header_bytes)
        address = map_shared(self._descriptor, 0, self._header_bytes) if code == 0 else FAILED
        if address == FAILED:
            code = code or ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return address

    def _unmap_all(self) -> None:
        for chunk in self.mapped_chunks:
            unmap(int(self._words[a.CHUNK_TABLE + chunk % a.TABLE_CHUNKS]), self._chunk_bytes)
        self._words[a.OLDEST] = self._words[a.FOLLOWING]
        if self._header:
            unmap(self._header, self._header_bytes)
            self._header = 0

    # ---------------------------------------------------------- end

    def close(self) -> None:
        """End the file, when no writer is left."""
        write_word(self.address + a.ENDED * WORD, 1)
        if self._thread.is_alive():
            self._thread.join()
        written = self._header_bytes + int(read_word(self._header + r.HEADER_NEXT * WORD)) * int(
            self._words[a.RECORD_BYTES]
        )
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
