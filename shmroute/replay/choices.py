"""Recorded choices once more: the routing kernel itself on the recorded logits, residency and bonus.

What a cache-aware router chooses depends on what was resident, which no two runs have alike. A recording has the very
snapshot that each call consulted; with that, routing is a function, and gives the same ids and the same bits of every
weight. (On another kind of processor the last bits of an exponential may differ.)
"""

from __future__ import annotations

import dataclasses
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import types

from shmroute.config import RouterConfig, RuntimeConfig
from shmroute.errors import TraceError
from shmroute.routing import plan_words as p
from shmroute.routing.plan import Plan, Turns
from shmroute.routing.publication import publish_and_leave
from shmroute.routing.route import route
from shmroute.shared.affinity import power_table
from shmroute.shared.atomic import WORD, address_of, i64_array, store
from shmroute.shared.kernel import kernel, load_kernels
from shmroute.shared.private_tables import PrivateTables
from shmroute.shared.words import pack_bonus, pack_spread
from shmroute.traces.trace import Trace

_WORDS_2D, _WORDS_1D = types.int64[:, ::1], types.int64[::1]
_FLOATS, _IDS = types.float32[:, ::1], types.int32[:, ::1]


@dataclass(frozen=True)
class Verification:
    """How recorded choices compare with recomputed ones; a *choice* is one token in one layer.

    Attributes
    ----------
    choices : int
        Compared.
    not_recorded : int
        Left out: the recording lacks them.
    different_ids, different_weights : int
        Choices of other experts, or in another order; of the rest, those with another bit in a weight.
    first : dict or None
        The first difference: token, layer, lane, and both choices.
    """

    choices: int
    not_recorded: int
    different_ids: int
    different_weights: int
    first: dict[str, Any] | None

    @property
    def exact(self) -> bool:
        """Whether nothing differs."""
        return self.different_ids == self.different_weights == 0

    def as_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return asdict(self) | {"exact": self.exact}


@kernel(types.int64(types.int64, _FLOATS, _WORDS_2D, _WORDS_1D, _WORDS_1D, _IDS, _FLOATS))
def choose_again(
    plan: int,
    logits: npt.NDArray[np.float32],
    residency: npt.NDArray[np.int64],
    strengths: npt.NDArray[np.int64],
    spreads: npt.NDArray[np.int64],
    experts: npt.NDArray[np.int32],
    weights: npt.NDArray[np.float32],
) -> int:
    """Route tokens one by one, each with its residency [T, ⌈E/64⌉], bonus word and spread word [T]; how many were."""
    words = i64_array(plan, p.PLAN_WORDS)
    num_experts, k = words[p.NUM_EXPERTS], words[p.TOP_K]
    for token in range(len(logits)):
        for i in range(residency.shape[1]):
            store(words[p.RESIDENT] + i * WORD, residency[token, i])
        store(words[p.BONUS], strengths[token])
        store(words[p.SPREAD], spreads[token])
        code = route(
            plan, address_of(logits) + token * num_experts * 4, address_of(experts) + token * k * 4,
            address_of(weights) + token * k * 4, 1,
        )  # fmt: skip
        if code < 0:
            return token
    return len(logits)


def verify(trace: Trace) -> Verification:
    """Recompute every recorded choice and compare ids exactly, weights bit for bit.

    Raises
    ------
    TraceError
        If the trace lacks what the choices depended on.
    """
    if trace.resident is None or trace.strength is None or trace.spread is None or trace.weights is None:
        raise TraceError(
            trace.path,
            "it cannot be verified: it has no residency, bonus, spread and weights, as what shmroute recorded has",
        )
    if trace.logits is None:
        raise TraceError(
            trace.path,
            "it cannot be verified: it was recorded without logits (TraceConfig(logits=True), --trace-logits)",
        )
    load_kernels()
    config = _config(trace)
    tables = PrivateTables(config)
    powers = power_table(config.affinity.decay)
    tokens, layers, k = trace.ids.shape
    recorded = np.all(trace.ids >= 0, axis=2)
    ids, weights = np.zeros_like(trace.ids), np.zeros_like(trace.weights)
    words = -(-trace.num_experts // 64)
    bitmaps = np.zeros((tokens, layers, words * WORD), np.uint8)
    bitmaps[:, :, : trace.resident.shape[2]] = trace.resident
    for layer in range(layers):
        rows = np.flatnonzero(recorded[:, layer])
        plan = Plan(tables, layer, 0, powers.ctypes.data, Turns(layers))
        again, weighed = np.zeros((len(rows), k), np.int32), np.zeros((len(rows), k), np.float32)
        routed = choose_again(
            plan.address, np.ascontiguousarray(trace.logits[rows, layer]),
            np.ascontiguousarray(bitmaps[rows, layer]).view(np.int64).reshape(len(rows), words),
            np.array([pack_bonus(value) for value in trace.strength[rows, layer].tolist()], np.int64),
            np.array([pack_spread(1, value) for value in trace.spread[rows, layer].tolist()], np.int64),
            again, weighed,
        )  # fmt: skip
        publish_and_leave(plan.address, p.CLOSED)
        plan.forget()
        if routed < len(rows):
            raise TraceError(
                trace.path, f"token {rows[routed]} of layer {layer} cannot be routed: fewer than {k} finite logits"
            )
        ids[rows, layer], weights[rows, layer] = again, weighed
    other = recorded & (ids != trace.ids).any(axis=2)
    differs = recorded & ~other & (weights.view(np.int32) != trace.weights.view(np.int32)).any(axis=2)
    first = None
    if (other | differs).any():
        token, layer = np.argwhere(other | differs)[0].tolist()
        first = {
            "token": token,
            "layer": layer,
            "lane": None if trace.lane is None else int(trace.lane[token]),
            "recorded": {"ids": trace.ids[token, layer].tolist(), "weights": trace.weights[token, layer].tolist()},
            "recomputed": {"ids": ids[token, layer].tolist(), "weights": weights[token, layer].tolist()},
        }
    return Verification(int(recorded.sum()), int((~recorded).sum()), int(other.sum()), int(differs.sum()), first)


def _config(trace: Trace) -> RuntimeConfig:
    """The settings by which the choices were made."""
    try:
        router = RouterConfig(**trace.meta["router"])
    except (KeyError, TypeError, ValueError) as error:
        raise TraceError(trace.path, f"its 'meta' has no router's settings: {error!r}") from error
    if router.scoring == "sigmoid":
        raise TraceError(
            trace.path, "it cannot be verified: sigmoid scores are chosen by with a correction bias, which no trace has"
        )
    router = dataclasses.replace(router, quality_budget=None)  # each choice has the bonus that the budget then allowed
    return RuntimeConfig(
        trace.num_layers, trace.num_experts, trace.top_k, expert_bytes=1, slots=1, max_workers=1, router=router
    )
