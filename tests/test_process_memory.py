"""What a process's memory is said to be."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from shmroute.process_memory import memory_of

MEGABYTE = 1 << 20


def test_private_memory_is_counted_in_each_of_the_three() -> None:
    before = memory_of()
    block = bytearray(os.urandom(64 * MEGABYTE))
    after = memory_of()
    for field in ("rss", "pss", "private"):
        assert 60 * MEGABYTE < getattr(after, field) - getattr(before, field) < 80 * MEGABYTE, field
    assert len(block) == 64 * MEGABYTE


def test_another_process() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", "block = bytearray(32 << 20); print(flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stdin is not None
        process.stdout.readline()
        found = memory_of(process.pid)
        process.stdin.close()
    assert found.private >= 32 * MEGABYTE
    assert found.private <= found.pss <= found.rss


def test_no_such_process() -> None:
    with pytest.raises(OSError, match="smaps_rollup"):
        memory_of(2**22 + 1)
