"""The experts implementation ``"shmroute"``: a layer's experts computed with the runtime's, as they are lent.

A batch's tokens are grouped by expert, resident experts come first while the others load, and each is used once. What
the experts give is kept by token and rank and summed at the end, so that a result never depends on the order in which
experts became resident.
"""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from shmroute.errors import ConfigError
from shmroute.integrations.transformers.expert_views import Lender

IMPLEMENTATION = "shmroute"
"""The name by which Transformers knows it: ``experts_implementation="shmroute"``."""


class SharedExperts:
    """One layer's experts in the runtime; what an experts module refers to instead of holding weights.

    Parameters
    ----------
    lend : callable
    layer : int
        Of the runtime.
    timeout : float
        Seconds to wait for an expert.
    """

    def __init__(self, lend: Lender, layer: int, timeout: float) -> None:
        self._lend, self._layer, self._timeout = lend, layer, timeout

    def compute(
        self, module: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The weighted sum of each token's experts, [T, H]; the arguments are those of Transformers' interface."""
        tokens, top_k = top_k_index.shape
        hidden = hidden_states.detach()
        outputs = hidden.new_empty(tokens * top_k, hidden.shape[1])
        ids = top_k_index.cpu().numpy()
        # The (token, rank) pairs by expert, those of expert e from begins[e] on. They are sent to a GPU before anything
        # is queued there that this would wait for.
        pairs = torch.from_numpy(np.argsort(ids, axis=None, kind="stable")).to(hidden.device)
        begins = np.bincount(ids.ravel() + 1).cumsum().tolist()
        with torch.no_grad(), closing(self._lend(self._layer, ids, self._timeout)) as lent:
            for expert, weights in lent:
                mine = pairs[begins[expert] : begins[expert + 1]]
                outputs[mine] = weights.compute(module, hidden if tokens == 1 else hidden[mine // top_k])
            weighted = outputs.view(tokens, top_k, hidden.shape[1]) * top_k_weights.unsqueeze(-1)
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
