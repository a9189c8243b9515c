"""Other ways to choose experts: plain NumPy, torch, and the router of Transformers' Mixtral.

All get float32 logits, one token [E] or a batch [T, E], and write ids and weights into the same arrays as
`MemoryAwareRouter.route_into`. None of them knows what is resident or tells anybody what was chosen.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

Route = Callable[[Any, Any, Any], object]
"""Routes one token or batch into the arrays that it was made for, which it is given again."""


def numpy_route(experts: npt.NDArray[np.int32], weights: npt.NDArray[np.float32]) -> Route:
    """argpartition, a sort of the k best, softmax."""
    k = experts.shape[-1]

    def token(logits: npt.NDArray[np.float32], *_: object) -> None:
        chosen = np.argpartition(logits, -k)[-k:]
        chosen = chosen[np.argsort(-logits[chosen], kind="stable")]
        best = np.exp(logits[chosen] - logits[chosen[0]])
        experts[:] = chosen
        np.divide(best, best.sum(), out=weights)

    def batch(logits: npt.NDArray[np.float32], *_: object) -> None:
        chosen = np.argpartition(logits, -k, axis=1)[:, -k:]
        values = np.take_along_axis(logits, chosen, 1)
        order = np.argsort(-values, axis=1, kind="stable")
        values = np.take_along_axis(values, order, 1)
        best = np.exp(values - values[:, :1])
        experts[:] = np.take_along_axis(chosen, order, 1)
        np.divide(best, best.sum(1, keepdims=True), out=weights)

    return token if experts.ndim == 1 else batch


def torch_route(experts: npt.NDArray[np.int32], weights: npt.NDArray[np.float32]) -> Route:
    """``torch.topk``, then softmax of the chosen logits, on one thread.

    Raises
    ------
    ImportError
        If torch is not installed.
    """
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    k = experts.shape[-1]
    to_experts, to_weights = torch.from_numpy(experts), torch.from_numpy(weights)

    def route(logits: npt.NDArray[np.float32], *_: object) -> None:
        with torch.inference_mode():
            best, chosen = torch.topk(torch.from_numpy(logits), k)
            to_experts.copy_(chosen)
            to_weights.copy_(torch.softmax(best, -1))

    return route


def transformers_route(experts: npt.NDArray[np.int32], weights: npt.NDArray[np.float32]) -> Route:
    """``MixtralTopKRouter`` of Transformers 5. It starts from hidden states: the gate is the identity of size E.

    Raises
    ------
    ImportError
        If Transformers is not installed, or has no such class.
    """
    torch = importlib.import_module("torch")
    torch.set_num_threads(1)
    modeling = importlib.import_module("transformers.models.mixtral.modeling_mixtral")
    try:
        router_class = modeling.MixtralTopKRouter
    except AttributeError as error:
        raise ImportError("this version of Transformers has no MixtralTopKRouter") from error
    config = importlib.import_module("transformers").MixtralConfig

    def make(num_experts: int) -> Any:
        router = router_class(
            config(num_local_experts=num_experts, num_experts_per_tok=experts.shape[-1], hidden_size=num_experts)
        )
        router.weight.data.copy_(torch.eye(num_experts))
        return router.eval()

    routers: dict[int, Any] = {}
    to_experts, to_weights = torch.from_numpy(experts), torch.from_numpy(weights)

    def route(logits: npt.NDArray[np.float32], *_: object) -> None:
        router = routers.get(logits.shape[-1]) or routers.setdefault(logits.shape[-1], make(logits.shape[-1]))
        with torch.inference_mode():
            _, scores, chosen = router(torch.from_numpy(logits))
            to_experts.copy_(chosen.reshape(to_experts.shape))
            to_weights.copy_(scores.reshape(to_weights.shape))

    return route


PEERS: dict[str, Callable[[npt.NDArray[np.int32], npt.NDArray[np.float32]], Route]] = {
    "numpy argpartition + softmax": numpy_route,
    "torch topk + softmax": torch_route,
    "Transformers MixtralTopKRouter (with an E×E gate)": transformers_route,
}
