"""An expert's weights as torch sees them: views of a slot's bytes, wherever the slot is."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from shmroute.config import RuntimeConfig
from shmroute.runtime import Runtime
from shmroute.shared.pool import ExpertWeights

DTYPES: dict[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
"""Torch's of the runtime's dtypes."""


@dataclass(frozen=True)
class Projections:
    """One expert's weights as torch sees them: views of the slot, to be read only under the lease.

    Attributes
    ----------
    gate_up : Tensor
        [2I, H], the gate's rows first.
    down : Tensor
        [H, I].
    """

    gate_up: torch.Tensor
    down: torch.Tensor

    def compute(self, module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """What the expert makes of hidden states, [n, H]; `module` knows its activation."""
        return functional.linear(module._apply_gate(functional.linear(hidden, self.gate_up)), self.down)


@dataclass(frozen=True)
class TransposedProjections:
    """The same of a family that stores them transposed, interleaved and with biases.

    Attributes
    ----------
    gate_up : Tensor
        [H, 2I], columns of gate and up projection in turn, as the module's activation expects them.
    gate_up_bias : Tensor
        [2I], likewise.
    down : Tensor
        [I, H].
    down_bias : Tensor
        [H].
    """

    gate_up: torch.Tensor
    gate_up_bias: torch.Tensor
    down: torch.Tensor
    down_bias: torch.Tensor

    def compute(self, module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """As `Projections.compute`."""
        # Product and bias in two steps, each rounded, as the family's own code has it.
        inner = module._apply_gate(torch.mm(hidden, self.gate_up).add_(self.gate_up_bias))
        return torch.mm(inner, self.down).add_(self.down_bias)


Expert = Projections | TransposedProjections

LentExperts = Generator[tuple[int, Expert], None, None]
"""Each expert of some tokens' choice, once: its id, and its weights until the next step of the iteration."""

Lender = Callable[[int, npt.NDArray[np.int64], float], LentExperts]
"""Lends what the tokens of a layer chose, int64 [T, k], waiting so many seconds for an expert if need be."""


def bytes_of(weights: ExpertWeights) -> torch.Tensor:
    """All of a leased expert, uint8 [expert_bytes]: a view, made once for its slot."""
    return weights.derived(_as_bytes)


def _as_bytes(weights: ExpertWeights) -> torch.Tensor:
    with warnings.catch_warnings():
        # Torch has no read-only tensors. Nothing here writes to one.
        warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
        return torch.frombuffer(weights.raw, dtype=torch.uint8)


class ExpertViews:
    """Makes torch's views of a runtime's experts; one for all layers, since a slot holds experts of any.

    Parameters
    ----------
    config : RuntimeConfig
    """

    def __init__(self, config: RuntimeConfig) -> None:
        self._layouts = {tensor.name: tensor for tensor in config.tensors}
        self.dtype = DTYPES[config.tensors[0].dtype]
        self.of_bytes: Callable[[torch.Tensor], Expert]
        """The views of an expert whose bytes are the first of uint8 [n]."""
        self.of_bytes = self._transposed if "gate_up" in self._layouts else self._separate

    def of(self, weights: ExpertWeights) -> Expert:
        """The views of a leased expert, made once for its slot."""
        return weights.derived(self._make)

    def lender(self, runtime: Runtime) -> Lender:
        """Lends a runtime's experts where they are, one lease at a time."""

        def lend(layer: int, choices: npt.NDArray[np.int64], timeout: float) -> LentExperts:
            with closing(runtime.experts(layer, choices, timeout)) as chosen:
                for expert, _, _, weights in chosen:
                    yield expert, self.of(weights)

        return lend

    def _make(self, weights: ExpertWeights) -> Expert:
        return self.of_bytes(bytes_of(weights))

    def _separate(self, raw: torch.Tensor) -> Projections:
        gate, up, down = (self._layouts[name] for name in ("gate", "up", "down"))
        assert up.offset == gate.offset + gate.nbytes, "sources put an expert's gate and up projection back to back"
        inner, hidden = gate.shape
        return Projections(self._view(raw, gate.offset, (2 * inner, hidden)), self._view(raw, down.offset, down.shape))

    def _transposed(self, raw: torch.Tensor) -> TransposedProjections:
        names = ("gate_up", "gate_up_bias", "down", "down_bias")
        layouts = [self._layouts[name] for name in names]
        return TransposedProjections(*(self._view(raw, layout.offset, layout.shape) for layout in layouts))

    def _view(self, raw: torch.Tensor, offset: int, shape: tuple[int, ...]) -> torch.Tensor:
        end = offset + math.prod(shape) * self.dtype.itemsize
        return raw[offset:end].view(self.dtype).view(shape)
