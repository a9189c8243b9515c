"""The shipped checkpoint, its decoder and a few windows of its held-out text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from shmroute.evaluation.decoder import Decoder
from shmroute.evaluation.text import deal, read_texts

CHECKPOINT = Path(__file__).resolve().parents[2] / "examples" / "tiny-mixtral"
TEXT = CHECKPOINT / "heldout_tokens.npz"


@pytest.fixture(scope="session")
def decoder() -> Decoder:
    """The shipped model."""
    return Decoder(CHECKPOINT)


@pytest.fixture(scope="session")
def windows() -> npt.NDArray[np.int64]:
    """int64 [3 pools, 4 streams, 24 tokens] of held-out text."""
    return deal(read_texts(TEXT, CHECKPOINT, 2048), TEXT, 24, 4, 3)
