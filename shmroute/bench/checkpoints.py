"""Checkpoints made on the spot: a folder as of a Mixtral model with one layer, full of random bytes."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shmroute.errors import ShmrouteError

HIDDEN = 512
_BLOCK = 8 << 20
SPARE = 64 << 20
"""Bytes that a checkpoint leaves free on its disk."""


@dataclass(frozen=True)
class Checkpoint:
    """One that was written.

    Attributes
    ----------
    folder, path : Path
        The folder and its only file of weights.
    experts, expert_bytes : int
        How many, and how large each is.
    begin : int
        Offset of the first expert; they lie back to back.
    """

    folder: Path
    path: Path
    experts: int
    expert_bytes: int
    begin: int

    def offset(self, expert: int) -> int:
        """Where an expert begins in the file."""
        return self.begin + expert * self.expert_bytes

    def tensor_names(self, expert: int) -> list[str]:
        """Its three tensors."""
        return [f"model.layers.0.block_sparse_moe.experts.{expert}.{name}.weight" for name in ("w1", "w3", "w2")]

    def forget(self) -> None:
        """Have the kernel drop the file from the page cache."""
        forget_pages(self.path)


def forget_pages(path: Path) -> None:
    """Have the kernel drop a file from the page cache, but for what some process has mapped and touched."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def check_room(folder: Path, size: int, what: str) -> None:
    """Find out whether a file of so many bytes could be written.

    Raises
    ------
    ShmrouteError
        If the disk has no room for it.
    """
    room = os.statvfs(folder)
    if size + SPARE > room.f_bavail * room.f_frsize:
        raise ShmrouteError(f"{folder} has no room for {what}; set TMPDIR to a folder on a larger disk")


def expert_bytes_near(size: int) -> int:
    """The size of an expert of about `size` bytes: three float16 matrices of 512 columns or rows."""
    return 6 * HIDDEN * max(round(size / (6 * HIDDEN)), 1)


@contextmanager
def checkpoint(folder: Path, experts: int, size: int) -> Iterator[Checkpoint]:
    """Write a checkpoint whose experts have about `size` bytes, and remove it afterwards.

    Raises
    ------
    ShmrouteError
        If the disk has no room for it.
    """
    expert_bytes = expert_bytes_near(size)
    check_room(folder, experts * expert_bytes, f"{experts} experts of {expert_bytes:,} bytes")
    with tempfile.TemporaryDirectory(prefix="shmroute-bench-", dir=folder) as name:
        yield _write(Path(name), experts, expert_bytes)


def _write(folder: Path, experts: int, expert_bytes: int) -> Checkpoint:
    inner = expert_bytes // (6 * HIDDEN)
    settings = {
        "model_type": "mixtral", "hidden_size": HIDDEN, "intermediate_size": inner, "num_local_experts": experts,
        "num_hidden_layers": 1, "num_experts_per_tok": min(2, experts),
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    path = folder / "model.safetensors"
    made = Checkpoint(folder, path, experts, expert_bytes, 0)
    gate_bytes = 2 * HIDDEN * experts
    header = {
        "model.layers.0.block_sparse_moe.gate.weight": {
            "dtype": "F16", "shape": [experts, HIDDEN], "data_offsets": [0, gate_bytes]
        }
    }  # fmt: skip
    at = gate_bytes
    for expert in range(experts):
        for tensor, shape in zip(
            made.tensor_names(expert), ([inner, HIDDEN], [inner, HIDDEN], [HIDDEN, inner]), strict=True
        ):
            header[tensor] = {"dtype": "F16", "shape": shape, "data_offsets": [at, at + 2 * inner * HIDDEN]}
            at += 2 * inner * HIDDEN
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    # The same random block over and over, at another place each time: no two experts are equal.
    block = np.random.default_rng(3).bytes(_BLOCK)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        left, shift = at, 0
        while left > 0:
            piece = block[shift : shift + min(left, _BLOCK - shift)]
            file.write(piece)
            left -= len(piece)
            shift = (shift + 4097) % (_BLOCK // 2)
        file.flush()
        os.fsync(file.fileno())  # pages that are not on the disk yet cannot be dropped
    return Checkpoint(folder, path, experts, expert_bytes, 8 + len(raw) + gate_bytes)


def disk_folder() -> Path:
    """A folder for temporary files that is no memory: the first of the usual ones whose file system is a disk's."""
    candidates = [Path(tempfile.gettempdir()), Path("/var/tmp"), Path.cwd()]
    for folder in candidates:
        if os.access(folder, os.W_OK) and _file_system(folder) not in ("tmpfs", "ramfs"):
            return folder
    return candidates[0]


def _file_system(folder: Path) -> str:
    """Its type, from ``/proc/mounts``."""
    best, kind = "", ""
    resolved = str(folder.resolve())
    for line in Path("/proc/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
        _, mount, of, *_ = line.split()
        if (resolved == mount or resolved.startswith(mount.rstrip("/") + "/")) and len(mount) >= len(best):
            best, kind = mount, of
    return kind
