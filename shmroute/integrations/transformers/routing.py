"""The runtime's router in the place of a model's: the gate's product is the model's, the choice the runtime's.

Transformers' experts interface receives experts that are chosen already, so this is where residency comes in. The
choice has the form that the family's own router gives: logits [T, E], weights [T, k], ids [T, k].
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from shmroute.errors import ConfigError
from shmroute.integrations.transformers.families import Family
from shmroute.runtime import Runtime


class SharedRouting:
    """What a router module does instead of its own ``forward``.

    Parameters
    ----------
    runtime : Runtime
    layer : int
        Of the runtime: MoE layers counted from 0.
    module : torch.nn.Module
        The model's router, where the model computes. Its parameters stay its own.
    family : Family
    dtype : torch.dtype
        Of the experts.
    following : SharedRouting or None
        Of the next MoE layer, whose gate tells early what that layer will probably choose.
    """

    def __init__(
        self,
        runtime: Runtime,
        layer: int,
        module: nn.Module,
        family: Family,
        dtype: torch.dtype,
        following: SharedRouting | None,
    ) -> None:
        config = runtime.config
        self._runtime, self._layer, self._module, self._family = runtime, layer, module, family
        self._top_k, self._dtype, self._device = config.top_k, dtype, module.weight.device
        self._following = following if runtime.speculates else None
        # More choices than experts would name nearly all of them.
        self._few = config.num_experts // config.top_k
        self._router = runtime.router(layer)

    def __call__(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits [T, E], weights [T, k] and ids int64 [T, k], as the family's router returns them.

        Raises
        ------
        ConfigError
            If the model was moved or converted since it was loaded; nothing was routed.
        NonFiniteLogitsError, RuntimeClosedError
            As `MemoryAwareRouter.route_into`.
        """
        if hidden_states.dtype != self._dtype or hidden_states.device != self._device:
            raise ConfigError(
                f"the hidden states are {hidden_states.dtype} on {hidden_states.device}, but this model's experts are "
                f"{self._dtype} on {self._device} and used as they are: leave the model's dtype and device as loaded"
            )
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1]).detach()
        logits = self.logits(hidden)
        tokens = len(hidden)
        ids, weights = np.empty((tokens, self._top_k), np.int32), np.empty((tokens, self._top_k), np.float32)
        self._router.route_into(_on_host(logits), ids, weights)
        if self._following is not None and tokens <= self._few:
            following = self._following
            self._runtime.expect(self._layer + 1, lambda: _on_host(following.logits(hidden)))
        chosen = torch.from_numpy(weights).to(self._device)
        if not self._family.float32_weights:
            chosen = chosen.to(logits.dtype)
        return logits, chosen, torch.from_numpy(ids).long().to(self._device)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The gate's product with hidden states [T, H], [T, E]."""
        weight, bias = self._module.weight.detach(), getattr(self._module, "bias", None)
        if self._family.float32_logits:
            hidden, weight = hidden.float(), weight.float()
        return functional.linear(hidden, weight, None if bias is None else bias.detach())


def _on_host(logits: torch.Tensor) -> npt.NDArray[np.float32]:
    """Logits as the runtime takes them; of a GPU's this waits for all that was queued before them."""
    array: npt.NDArray[np.float32] = logits.float().cpu().numpy()
    return array
