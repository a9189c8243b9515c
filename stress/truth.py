"""What the bytes of every expert and the output of every layer must be, read without the runtime.

The bytes come through the `safetensors` library, and the outputs from the demo's dense reference, which shares no code
with the runtime either. It is made once by the command, on the checkpoint as it was given, before anything is done to
the copy that is served.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash
from safetensors import SafetensorError, safe_open

from shmroute.config import describe
from shmroute.demo.recording import Recording
from shmroute.demo.reference import dense_reference
from shmroute.errors import CheckpointError

WEIGHTS = "model.safetensors"
_PARTS = ("w1", "w3", "w2")  # gate, up, down: the order in which an expert's tensors are served


@dataclass(frozen=True)
class Truth:
    """The recorded tokens of a Mixtral checkpoint, its experts' digests and its dense outputs.

    Attributes
    ----------
    hidden : ndarray
        float32 [T, L, H], the hidden states that enter the layers.
    digests : ndarray
        uint64 [L, E], xxh3 of each expert's bytes.
    outputs : ndarray
        float32 [T, L, H].
    choices : ndarray
        int64 [T, L, k], best first.
    """

    hidden: npt.NDArray[np.float32]
    digests: npt.NDArray[np.uint64]
    outputs: npt.NDArray[np.float32]
    choices: npt.NDArray[np.int64]

    @classmethod
    def of(cls, checkpoint: Path) -> Truth:
        """Compute everything.

        Raises
        ------
        CheckpointError
            If the folder is no Mixtral checkpoint in one file with a recording.
        """
        hidden = Recording.load(checkpoint).hidden
        geometry, _ = describe(checkpoint)
        try:
            digests = _digests(checkpoint / WEIGHTS, geometry.num_layers, geometry.num_experts)
            outputs, choices = dense_reference(checkpoint, hidden, geometry.top_k)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                str(checkpoint / WEIGHTS),
                f"the dense reference reads a Mixtral checkpoint in this one file, and could not: {error}",
            ) from error
        return cls(hidden, digests, outputs, choices)

    def save_for_workers(self, folder: Path) -> None:
        """Write what workers need; `load_for_worker` maps it."""
        np.save(folder / "hidden.npy", self.hidden)
        np.save(folder / "digests.npy", self.digests)


def load_for_worker(folder: Path) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.uint64]]:
    """The hidden states, mapped, and the digests."""
    return np.load(folder / "hidden.npy", mmap_mode="r"), np.load(folder / "digests.npy")


def digest_of(data: npt.NDArray[np.uint8]) -> int:
    """xxh3 of an expert's bytes."""
    return xxhash.xxh3_64_intdigest(data.data)


def _digests(path: Path, layers: int, experts: int) -> npt.NDArray[np.uint64]:
    digests = np.zeros((layers, experts), np.uint64)
    with safe_open(path, framework="numpy") as file:
        for layer in range(layers):
            for expert in range(experts):
                names = [f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{part}.weight" for part in _PARTS]
                parts = [np.ascontiguousarray(file.get_tensor(name)).view(np.uint8).ravel() for name in names]
                digests[layer, expert] = digest_of(np.concatenate(parts))
    return digests
