"""`MemoryAwareRouter`: one layer's router, as workers call it."""

from __future__ import annotations

import os
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from shmroute.attachment import Attachment
from shmroute.errors import NonFiniteLogitsError
from shmroute.recording.recorder import recorder_of
from shmroute.routing import plan_words as p
from shmroute.routing.codes import NOT_FINITE, REFUSED, RING_BELL
from shmroute.routing.entry import bind
from shmroute.routing.plan import Plan, Turns
from shmroute.routing.publication import publish_and_leave
from shmroute.routing.route import route_rows
from shmroute.shared.layout import LINE
from shmroute.shared.requests import PagingRequest
from shmroute.shared.words import pack_bonus, unpack_bonus
from shmroute.validation import require_float

_routers: weakref.WeakSet[MemoryAwareRouter] = weakref.WeakSet()


@dataclass(frozen=True)
class RoutingDecision:
    """Where the tokens of one call go.

    Attributes
    ----------
    experts : ndarray
        int32 [k] or [T, k], best first by choosing score (logit plus bonus, or what the rule makes of it; see
        `shmroute.routing.rules`); ties go to the lower id.
    weights : ndarray
        float32 likewise, from the unmodified logits.
    hits : int
        (token, chosen expert) pairs that were resident when routed.
    requests : list of PagingRequest
        What this call queued: not what was queued or loading already.
    """

    experts: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    hits: int
    requests: list[PagingRequest]


class MemoryAwareRouter:
    """Chooses experts for the tokens of one layer, with a bonus for those that are resident.

    Made by `Runtime.router`. Safe to use from several threads; calls of different threads on one layer run in turn.

    Attributes
    ----------
    layer : int
    """

    def __init__(self, attachment: Attachment, layer: int) -> None:
        self.layer = layer
        self._attachment = attachment
        config = attachment.segment.config
        self._num_experts, self._top_k = config.num_experts, config.top_k
        lane = attachment.lane().number
        powers = attachment.powers.ctypes.data
        self._hot, self._second = (
            Plan(attachment.segment, layer, lane, powers, attachment.one(_turns), attachment.trail_address)
            for _ in range(2)
        )
        self._bias = np.zeros(self._num_experts, np.float32)
        self._device: npt.NDArray[np.int64] | None = None
        if (recorder := attachment.one(recorder_of)) is not None:
            for plan in (self._hot, self._second):
                plan.words[p.TRACE] = recorder.address
                plan.words[p.MOST_PENDING] = 0  # a record tells its token's tick, so all are taken at once
        # The hot path takes the first plan without a lock; whoever finds it busy queues for the second.
        self._second_mutex = threading.Lock()
        if config.router.scoring == "sigmoid" and config.source is not None:
            bias = attachment.source().correction_bias(layer)
            if bias is not None:
                self._set_bias(bias)
        self._bonus = attachment.segment.layout.bonus + layer * LINE
        attachment.before_close(self._close)
        attachment.records_late(layer, self._publish)
        if (function := bind(self._hot, self.route_into, self._finish_hot)) is not None:
            vars(self)["route_into"] = function  # in place of the method, which does the same more slowly
        _routers.add(self)

    @property
    def cache_bonus(self) -> float:
        """The strength of the rule by which residency is let into the choice; 0 is the model's own routing.

        Shared by all workers, settable at any time. For the rule ``absolute`` it is what a resident expert's logit is
        raised by.
        """
        with self._attachment.in_use() as segment:
            return round(unpack_bonus(segment.read(self._bonus)), 9)

    @cache_bonus.setter
    def cache_bonus(self, value: float) -> None:
        require_float("cache_bonus", value, 0, 1e6)
        with self._attachment.in_use() as segment:
            segment.write(self._bonus, pack_bonus(value))

    @property
    def correction_bias(self) -> npt.NDArray[np.float32]:
        """What is added to each expert's sigmoid when choosing, float32 [E]: a copy; zeros with softmax scoring.

        It comes from the checkpoint, read by each process for itself. Only a runtime without one can be given it, and
        then in every process, before it routes: workers that do not agree on it choose differently.

        Raises
        ------
        ValueError
            If it is set where there is no sigmoid scoring, or where the checkpoint has the say; or if it is not float32
            [E], or not finite.
        """
        return self._bias.copy()

    @correction_bias.setter
    def correction_bias(self, bias: npt.NDArray[np.float32]) -> None:
        config = self._attachment.segment.config
        if config.router.scoring != "sigmoid":
            raise ValueError(f"a correction_bias belongs to scoring='sigmoid', not {config.router.scoring!r}")
        if config.source is not None:
            raise ValueError("the correction_bias is the checkpoint's; it cannot be set")
        self._set_bias(bias)

    def set_device_residency(self, bitmap: npt.NDArray[np.int64] | None) -> None:
        """Say which experts are in this process's GPU: they get the whole bonus, others in memory the host's share.

        They count as resident, in `route`'s hits too, and are not requested. See `shmroute.device_tier`.

        Parameters
        ----------
        bitmap : ndarray or None
            int64 [⌈E/64⌉], read at each call: whoever gives it may change its words at any time. None ends that.

        Raises
        ------
        ValueError
            If it is anything else.
        """
        words = -(-self._num_experts // 64)
        if bitmap is not None and not (
            isinstance(bitmap, np.ndarray) and bitmap.dtype == np.int64 and bitmap.shape == (words,)
            and bitmap.flags.c_contiguous and bitmap.flags.aligned
        ):  # fmt: skip
            raise ValueError(f"the bitmap must be a contiguous, aligned int64 [{words}], not {_describe(bitmap)}")
        self._device = bitmap
        for plan in (self._hot, self._second):
            plan.set_device(bitmap)

    def is_on_device(self, expert: int) -> bool:
        """Whether an expert is in this process's GPU; see `set_device_residency`."""
        return self._device is not None and bool(self._device[expert >> 6] >> (expert & 63) & 1)

    def _set_bias(self, bias: Any) -> None:
        if not isinstance(bias, np.ndarray) or bias.shape != (self._num_experts,) or bias.dtype != np.float32:
            raise ValueError(f"correction_bias must be float32 [{self._num_experts}], not {_describe(bias)}")
        if not np.isfinite(bias).all():
            raise ValueError("correction_bias must be finite")
        self._bias = bias.copy()
        self._hot.set_correction_bias(bias)
        self._second.set_correction_bias(bias)

    def route(self, logits: npt.NDArray[np.float32]) -> RoutingDecision:
        """Route one token or a batch.

        Parameters
        ----------
        logits : ndarray
            float32 [E] or [T, E], contiguous or not.

        Raises
        ------
        ValueError
            If the shape, rank or dtype is another; nothing has changed.
        NonFiniteLogitsError
            If a row has fewer than k finite logits; nothing of the batch was recorded.
        RuntimeClosedError
            If the runtime was closed.
        """
        logits = self._checked_logits(logits)
        shape = (*logits.shape[:-1], self._top_k)
        experts, weights = np.empty(shape, np.int32), np.empty(shape, np.float32)
        with self._second_mutex:
            misses = self._finish(route_rows(self._second.address, logits, experts, weights), self._second)
            words = self._second.queued[: self._second.words[p.QUEUED_COUNT]].tolist()
        return RoutingDecision(experts, weights, experts.size - misses, [PagingRequest.unpack(word) for word in words])

    def route_into(
        self,
        logits: npt.NDArray[np.float32],
        experts: npt.NDArray[np.int32],
        weights: npt.NDArray[np.float32],
    ) -> int:
        """The hot path: route into the caller's arrays, allocating nothing.

        Parameters
        ----------
        logits : ndarray
            float32 [E] or [T, E]. One that is not contiguous is copied first.
        experts, weights : ndarray
            int32 and float32, [k] or [T, k], contiguous and writable; undefined if this raises.

        Returns
        -------
        int
            (token, chosen expert) pairs that missed.

        Raises
        ------
        ValueError, NonFiniteLogitsError, RuntimeClosedError
            As `route`.
        """
        # What `bind` made goes before this method, and calls it for arguments that want a closer look, or if the first
        # plan is in use.
        logits = self._checked_logits(logits)
        shape = (*logits.shape[:-1], self._top_k)
        for name, array, dtype in (("experts", experts, np.int32), ("weights", weights, np.float32)):
            if not isinstance(array, np.ndarray) or array.shape != shape or array.dtype != dtype:
                raise ValueError(f"{name} must be {np.dtype(dtype)} {list(shape)}, not {_describe(array)}")
            if not array.flags.c_contiguous or not array.flags.writeable or not array.flags.aligned:
                raise ValueError(f"{name} must be a contiguous, aligned, writable array")
        with self._second_mutex:
            return self._finish(route_rows(self._second.address, logits, experts, weights), self._second)

    # ---------------------------------------------------------- the slow way round

    def _checked_logits(self, logits: Any) -> npt.NDArray[np.float32]:
        """The logits as a contiguous array, copied if need be."""
        wanted = f"float32 [{self._num_experts}] or [T, {self._num_experts}]"
        if not isinstance(logits, np.ndarray) or logits.dtype != np.float32 or logits.ndim not in (1, 2):
            raise ValueError(f"logits must be {wanted}, not {_describe(logits)}")
        if logits.shape[-1] != self._num_experts:
            raise ValueError(
                f"logits must be {wanted}, not {_describe(logits)}: layer {self.layer} has {self._num_experts} experts"
            )
        if logits.flags.writeable:
            return np.require(logits, requirements=["C", "A"])
        return logits.copy()

    def _finish(self, code: int, plan: Plan) -> int:
        """Turn a kernel's code into misses, after waking the pager if it asked for that, or into an error."""
        if code == NOT_FINITE:
            raise NonFiniteLogitsError(int(plan.words[p.BAD_ROW]), int(plan.words[p.BAD_FINITE]), self._top_k)
        if code == REFUSED:
            self._attachment.check_open()
        if code & RING_BELL and code > 0:
            code -= RING_BELL
            with self._attachment.in_use():
                self._attachment.answer_bell(int(plan.words[p.BELL_WORD]))
        return code

    def _finish_hot(self, code: int) -> int:
        return self._finish(code, self._hot)

    def _publish(self) -> None:
        """Have others see all that was routed."""
        for plan in (self._hot, self._second):
            publish_and_leave(plan.address, p.IDLE)

    def _close(self) -> None:
        """Wait for the calls under way, if any, publish what they put off, and refuse all further ones."""
        for plan in (self._hot, self._second):
            publish_and_leave(plan.address, p.CLOSED)
            plan.forget()

    def _abandon_in_child(self) -> None:
        """After a fork: the mapping is gone here, so refuse every call, whatever the parent's threads were doing."""
        self._hot.abandon()
        self._second.abandon()
        self._second_mutex = threading.Lock()


def _turns(attachment: Attachment) -> Turns:
    return Turns(attachment.segment.config.num_layers)


def _describe(value: object) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype} {list(value.shape)}"
    return f"a {type(value).__name__}"


def _abandon_all_in_child() -> None:
    for router in list(_routers):
        router._abandon_in_child()


os.register_at_fork(after_in_child=_abandon_all_in_child)
