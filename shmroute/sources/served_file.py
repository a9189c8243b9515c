"""One open checkpoint file: positioned reads into given buffers, and whether it is still the file it was."""

from __future__ import annotations

import os
from collections.abc import Sequence

from shmroute.errors import CheckpointChangedError, CheckpointError
from shmroute.sources.bounded_json import open_regular


class ServedFile:
    """A regular file, opened once, read by any number of threads.

    Parameters
    ----------
    path : str

    Raises
    ------
    CheckpointError
        If the file cannot be opened.

    Notes
    -----
    The file is known by device, inode, size and modification time (ns). A *rewrite in place* changes the time
    and is detected, unless somebody sets the time back or the write falls into the same tick of the kernel's
    clock (some ms) as the last one before opening. A *replacement* of the name by another file needs no
    detection: the descriptor goes on reading the old one, which is what was promised.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.fd = open_regular(path)
        self._identity = self._look()
        self.size = self._identity[2]

    def _look(self) -> tuple[int, int, int, int]:
        status = os.fstat(self.fd)
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    def check_unchanged(self, tensor: str | None = None) -> None:
        """Compare the file with what it was when it was opened.

        Raises
        ------
        CheckpointChangedError
            If size or modification time differ.
        """
        now = self._look()
        if now != self._identity:
            raise CheckpointChangedError(
                self.path,
                f"the file changed after it was opened (then {self._identity[2]} bytes, modified at "
                f"{self._identity[3]} ns; now {now[2]} bytes, {now[3]} ns); restart what serves it",
                tensor,
            )

    def read_into(self, buffers: Sequence[memoryview], offset: int, tensor: str) -> None:
        """Fill `buffers`, one after the other, with the file's bytes from `offset` on.

        Parameters
        ----------
        buffers : sequence of memoryview
            Writable, of format ``"B"``, none of them empty.
        offset : int
            Bytes from the file's start.
        tensor : str
            Named in errors.

        Raises
        ------
        CheckpointChangedError
            If the file changed before or while it was read.
        CheckpointError
            If it ends too early.
        OSError
            As the read gave it.
        """
        remaining = list(buffers)
        while remaining:
            # Short reads are ordinary: a signal, a network file system, and any read beyond 2 GiB.
            count = os.preadv(self.fd, remaining, offset)
            if count == 0:
                self.check_unchanged(tensor)
                raise CheckpointError(self.path, f"the file is truncated: nothing to read at byte {offset}", tensor)
            offset += count
            while remaining and count >= len(remaining[0]):
                count -= len(remaining[0])
                del remaining[0]
            if count:
                remaining[0] = remaining[0][count:]
        self.check_unchanged(tensor)  # afterwards, which covers a change before the read too

    def drop_page_cache(self, offset: int, length: int) -> None:
        """Let the kernel drop the cached pages of a range; pages that reach beyond the range stay."""
        os.posix_fadvise(self.fd, offset, length, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the descriptor; closing twice does nothing."""
        if self.fd >= 0:
            # Not only closed but forgotten: its number may soon be somebody else's file.
            fd, self.fd = self.fd, -1
            os.close(fd)
