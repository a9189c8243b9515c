"""One open checkpoint file: positioned reads into given buffers, and whether it is still the file it was."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from shmroute.errors import CheckpointChangedError, CheckpointError
from shmroute.sources.bounded_json import open_regular

PART = 1 << 20
"""Bytes that one system call reads at most: what is done with them next finds them in a core's second-level cache, and
the call itself (some 0.2 µs) is nothing beside them."""


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

    def read_into(
        self,
        buffer: memoryview,
        pieces: Sequence[tuple[int, int]],
        offset: int,
        tensor: str,
        filled: Callable[[int, int], object] | None = None,
    ) -> None:
        """Fill pieces of `buffer`, one after the other, with the file's bytes from `offset` on.

        Parameters
        ----------
        buffer : memoryview
            Writable, of format ``"B"``.
        pieces : sequence of (int, int)
            Begin and end of each in `buffer`; none of them is empty.
        offset : int
            Bytes from the file's start.
        tensor : str
            Named in errors.
        filled : callable, optional
            Called as ``filled(begin, end)`` after each part of a piece, of `PART` bytes at most. The parts are the same
            at each read.

        Raises
        ------
        CheckpointChangedError
            If the file changed before or while it was read.
        CheckpointError
            If it ends too early.
        OSError
            As the read gave it.
        """
        for parts in _read_together(pieces):
            remaining = [buffer[begin:end] for begin, end in parts]
            while remaining:
                # Short reads are ordinary: a signal, and network file systems.
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
            if filled is not None:
                for begin, end in parts:
                    filled(begin, end)
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


def _read_together(pieces: Sequence[tuple[int, int]]) -> Iterator[list[tuple[int, int]]]:
    """Cut pieces into parts, and join these to groups, so that no group has more than `PART` bytes."""
    group: list[tuple[int, int]] = []
    room = PART
    for begin, end in pieces:
        at = begin
        while at < end:
            until = min(end, at + room)
            group.append((at, until))
            room -= until - at
            at = until
            if room == 0:
                yield group
                group, room = [], PART
    if group:
        yield group
