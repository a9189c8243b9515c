"""The experts implementation ``"shmroute"``: a layer's experts computed with the runtime's, one lease at a time.

A batch's tokens are grouped by expert, resident experts come first while the others load, and each is used once. What
the experts give is kept by token and rank and summed at the end, so that a result never depends on the order in which
experts became resident.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from shmroute.config import RuntimeConfig
from shmroute.errors import ConfigError
from shmroute.runtime import Runtime
from shmroute.shared.pool import ExpertWeights

IMPLEMENTATION = "shmroute"
"""The name by which Transformers knows it: ``experts_implementation="shmroute"``."""

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


class ExpertViews:
    """Makes torch's views of a runtime's experts; one for all layers, since a slot holds experts of any.

    Parameters
    ----------
    config : RuntimeConfig
    """

    def __init__(self, config: RuntimeConfig) -> None:
        self._layouts = {tensor.name: tensor for tensor in config.tensors}
        self.dtype = DTYPES[config.tensors[0].dtype]
        self._make: Callable[[ExpertWeights], Projections | TransposedProjections]
        self._make = self._transposed if "gate_up" in self._layouts else self._separate

    def of(self, weights: ExpertWeights) -> Projections | TransposedProjections:
        """The views of an expert, made once for its slot."""
        return weights.derived(self._make)

    def _separate(self, weights: ExpertWeights) -> Projections:
        gate, up, down = (self._layouts[name] for name in ("gate", "up", "down"))
        assert up.offset == gate.offset + gate.nbytes, "sources put an expert's gate and up projection back to back"
        inner, hidden = gate.shape
        return Projections(
            self._view(weights, gate.offset, (2 * inner, hidden)), self._view(weights, down.offset, down.shape)
        )

    def _transposed(self, weights: ExpertWeights) -> TransposedProjections:
        names = ("gate_up", "gate_up_bias", "down", "down_bias")
        layouts = [self._layouts[name] for name in names]
        return TransposedProjections(*(self._view(weights, layout.offset, layout.shape) for layout in layouts))

    def _view(self, weights: ExpertWeights, offset: int, shape: tuple[int, ...]) -> torch.Tensor:
        with warnings.catch_warnings():
            # Torch has no read-only tensors. Nothing here writes to one.
            warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
            flat = torch.frombuffer(weights.raw, dtype=self.dtype, count=math.prod(shape), offset=offset)
        return flat.view(shape)


class SharedExperts:
    """One layer's experts in the runtime; what an experts module refers to instead of holding weights.

    Parameters
    ----------
    runtime : Runtime
    layer : int
        Of the runtime.
    views : ExpertViews
        Of the runtime.
    timeout : float
        Seconds to wait for an expert.
    """

    def __init__(self, runtime: Runtime, layer: int, views: ExpertViews, timeout: float) -> None:
        self._runtime, self._layer, self._views, self._timeout = runtime, layer, views, timeout

    def compute(
        self, module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of each token's experts, [T, H]; the arguments are those of Transformers' interface."""
        tokens, top_k = top_k_index.shape
        hidden = hidden_states.detach()
        outputs = hidden.new_empty(tokens * top_k, hidden.shape[1])
        chosen = self._runtime.experts(self._layer, top_k_index.numpy(), self._timeout)
        with torch.no_grad(), closing(chosen):
            for _, rows, ranks, weights in chosen:
                mine = hidden if tokens == 1 else hidden[torch.from_numpy(rows)]
                outputs[torch.from_numpy(rows * top_k + ranks)] = self._views.of(weights).compute(module, mine)
            weighted = outputs.view(tokens, top_k, -1) * top_k_weights.unsqueeze(-1)
            return weighted.sum(dim=1).to(hidden.dtype)


def shared_experts_forward(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """What Transformers calls for an experts module; `self` is that module.

    Raises
    ------
    ConfigError
        If the model was not made by `load`.
    ExpertLoadError, ExpertTimeout, PagerUnavailable, RuntimeClosedError, SegmentClosingError
        As `Runtime.experts`.
    """
    shared: Any = getattr(self, "shared_experts_of_runtime", None)
    if shared is None:
        raise ConfigError(
            f"experts_implementation={IMPLEMENTATION!r} is for models that share a runtime's experts, and this one has "
            f"its own: make it by shmroute.integrations.transformers.load(checkpoint, runtime)"
        )
    result: torch.Tensor = shared.compute(self, hidden_states, top_k_index, top_k_weights)
    return result


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, shared_experts_forward)
