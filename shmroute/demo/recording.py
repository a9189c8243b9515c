"""The recorded token streams that come with the checkpoint of the examples."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from shmroute.errors import CheckpointError


@dataclass(frozen=True)
class Recording:
    """Hidden states that entered every MoE layer of a model, in windows of text of several domains.

    Attributes
    ----------
    hidden : ndarray
        float32 [T, L, H].
    domain : ndarray of str
        [T], which domain each token's window is of.
    """

    hidden: npt.NDArray[np.float32]
    domain: npt.NDArray[np.str_]

    @classmethod
    def load(cls, folder: Path) -> Recording:
        """Read ``activations.npz``.

        Raises
        ------
        CheckpointError
            If it is not there or not what is expected.
        """
        path = folder / "activations.npz"
        try:
            with np.load(path) as file:
                hidden = file["h"].astype(np.float32)
                windows = np.array(json.loads(str(file["meta"]))["sequences"])
                domain = windows[file["seq_id"]]
        except (OSError, KeyError, ValueError, IndexError) as error:
            raise CheckpointError(str(path), f"is no recording of hidden states: {error}") from error
        return cls(hidden, domain)

    def domains(self) -> list[str]:
        """All domains, in order of appearance."""
        return list(dict.fromkeys(self.domain.tolist()))

    def positions(self, domain: str, limit: int) -> npt.NDArray[np.int64]:
        """Where the first `limit` tokens of a domain are."""
        return np.flatnonzero(self.domain == domain)[:limit]

    def stream(self, domain: str, limit: int) -> npt.NDArray[np.float32]:
        """float32 [≤ limit, L, H]: one domain's hidden states."""
        return self.hidden[self.positions(domain, limit)]
