"""`Runtime`: what a process holds of a shared cache of experts; see `shmroute.lifecycle` for how one is made."""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import subprocess
import threading
from collections.abc import Callable, Generator, Sequence
from types import TracebackType
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from shmroute.attachment import Attachment, attachment_to, leave
from shmroute.errors import (
    RuntimeClosedError,
)
from shmroute.leases import ExpertLease, ExpertRows, Leases, hand_out, prefetch
from shmroute.metrics import RuntimeMetrics, read_metrics
from shmroute.pager.process import stop_pager
from shmroute.routing import MemoryAwareRouter
from shmroute.routing.grouping import group_by_expert
from shmroute.shared.affinity import ExpertAffinity
from shmroute.shared.atomic import WORD
from shmroute.shared.experts import resident_ids
from shmroute.shared.removal import claim_destruction, unlink_segment
from shmroute.shared.requests import PagingDirection, PagingPriority, PagingRequest
from shmroute.shared.ring import PUSHED, ring_push
from shmroute.shared.segment import Segment
from shmroute.shared.words import NO_LANE, NORMAL, PAGE_OUT, pack_request
from shmroute.speculation import Speculation, checked_rows

T = TypeVar("T")

DEFAULT_TIMEOUT = 5.0
"""Seconds to wait for an expert."""

_open_runtimes: set[Runtime] = set()
"""Closed when the interpreter ends, and kept until then even if nobody else does: a lost owner would leak a segment."""


class Runtime:
    """One process's hold on a shared cache of experts. Made by `create` or `attach`; a context manager.

    Methods may be called from several threads. All raise `RuntimeClosedError` after `close`.

    Attributes
    ----------
    name : str
    uuid : str
        Tells it from all others that ever had the name; files that its workers record begin with it.
    config : RuntimeConfig
    owner : bool
        Whether leaving the runtime ends it for everybody.
    """

    def __init__(self, segment: Segment, *, owner: bool, pager: subprocess.Popen[bytes] | None = None) -> None:
        self._attachment: Attachment = attachment_to(segment)
        self.name, self.uuid = segment.name, segment.uuid
        self.config = segment.config
        self.owner = owner
        self._pager = pager
        self._pid = os.getpid()
        self._mutex = threading.RLock()
        self._leases: Leases | None = None
        self._speculation: Speculation | None = None
        self._gates: dict[int, npt.NDArray[np.float32]] = {}
        self._gate_biases: dict[int, npt.NDArray[np.float32] | None] = {}
        self._closed = False
        _open_runtimes.add(self)

    # ---------------------------------------------------------- routing

    def router(self, layer: int) -> MemoryAwareRouter:
        """The router of one layer: one object for all of this process's runtimes on the segment. Claims a lane.

        It works until the last of those is closed.

        Raises
        ------
        ValueError
            If there is no such layer.
        NoWorkerLane
            If all lanes are taken by live processes.
        """
        layer = self._checked_layer(layer)
        self._check_open()
        return self._attachment.one(MemoryAwareRouter, layer)

    def affinity(self, layer: int) -> ExpertAffinity:
        """The affinity of one layer's experts. Claims no lane.

        Raises
        ------
        ValueError
            If there is no such layer.
        """
        layer = self._checked_layer(layer)
        self._check_open()
        return ExpertAffinity(self._attachment, layer)

    def gate(self, layer: int) -> npt.NDArray[np.float32]:
        """The router weights of one layer from the checkpoint, float32 [E, hidden].

        Logits are ``x @ gate.T``, plus `gate_bias` if there is one.

        Raises
        ------
        ValueError
            If there is no such layer.
        ConfigError
            If the runtime has no checkpoint.
        CheckpointError
            If it cannot be read here.
        """
        layer = self._checked_layer(layer)
        self._check_open()
        with self._mutex:
            if layer not in self._gates:
                self._gates[layer] = self._attachment.source().gate(layer)
            return self._gates[layer]

    def gate_bias(self, layer: int) -> npt.NDArray[np.float32] | None:
        """What the router of one layer adds to its logits, float32 [E]; None if the model's adds nothing.

        Of the supported families only gpt-oss has one. It is a part of the logits that `MemoryAwareRouter.route` is
        given; a correction bias, for choosing only, is not, and is read by the router itself.

        Raises
        ------
        As `gate`.
        """
        layer = self._checked_layer(layer)
        self._check_open()
        with self._mutex:
            if layer not in self._gate_biases:
                self._gate_biases[layer] = self._attachment.source().gate_bias(layer)
            return self._gate_biases[layer]

    # ---------------------------------------------------------- experts

    def expert(self, layer: int, expert: int, timeout: float = DEFAULT_TIMEOUT) -> ExpertLease:
        """One lease, as a context manager that gives the expert's weights.

        Parameters
        ----------
        layer, expert : int
        timeout : float
            Seconds to wait if the expert is not resident.

        Returns
        -------
        ExpertLease
            ``with`` it; entering may raise what is below.

        Raises
        ------
        ValueError
            If there is no such expert, or the timeout is negative.
        LeaseHeldError
            If the expert is not resident and this thread holds a lease.
        ExpertLoadError
            If the expert cannot be loaded.
        ExpertTimeout, PagerUnavailable
            If it was not resident in time: because the pager is busy, or because there is none at work.
        SegmentClosingError
            If the segment is being destroyed.
        """
        layer, expert = self._checked_ids(layer, expert)
        return ExpertLease(self._lease_table(), layer, expert, _checked_timeout(timeout))

    def experts(
        self, layer: int, experts: npt.NDArray[np.integer] | Sequence[int], timeout: float = DEFAULT_TIMEOUT
    ) -> Generator[ExpertRows, None, None]:
        """Each expert that some tokens chose, once, as it becomes resident; one lease at a time.

        All that are missing are requested at once; resident ones come first, so they are computed while the others
        load. Leaving the loop early releases the lease.

        Parameters
        ----------
        layer : int
        experts : ndarray of int, [k] or [T, k]
            The tokens' choices.
        timeout : float
            Seconds to wait for each expert that is not resident.

        Yields
        ------
        expert : int
        rows, ranks : ndarray
            int64 of equal length: the tokens that chose it, ascending, and at which rank.
        weights : ExpertWeights
            Valid until the next step of the iteration.

        Raises
        ------
        As `expert`.
        """
        layer = self._checked_layer(layer)
        ids, groups = group_by_expert(experts, self.config.num_experts)
        timeout = _checked_timeout(timeout)
        return hand_out(self._lease_table(), layer, ids, groups, timeout)

    def resident(self, layer: int) -> list[int]:
        """Sorted ids of a layer's experts that the router takes for resident now."""
        layer = self._checked_layer(layer)
        self._check_open()
        ids = np.empty(self.config.num_experts, np.int64)
        with self._attachment.in_use() as segment:
            count = resident_ids(segment.address + _resident_row(segment, layer), ids)
        resident: list[int] = ids[:count].tolist()
        return resident

    def is_resident(self, layer: int, expert: int) -> bool:
        """Whether the router takes an expert for resident now. Claims no lane.

        A hint: the expert may be evicted, or loaded, at any moment. Only a lease keeps it in place.

        Raises
        ------
        ValueError
            If there is no such expert.
        """
        layer, expert = self._checked_ids(layer, expert)
        self._check_open()
        with self._attachment.in_use() as segment:
            bits = segment.read(_resident_row(segment, layer) + (expert >> 6) * WORD)
        return bits >> (expert & 63) & 1 == 1

    def prefetch(self, layer: int, experts: Sequence[int] | npt.NDArray[np.integer]) -> int:
        """Hint that experts will be wanted soon; how many requests that queued.

        A prefetch yields to every demand and is cancelled when it has waited too long.
        """
        layer = self._checked_layer(layer)
        return prefetch(self._lease_table(), layer, experts, self.config.num_experts)

    def smart_prefetch(self, layer: int, lookahead: int) -> list[PagingRequest]:
        """Hint that the absent experts of highest affinity will be wanted soon.

        Parameters
        ----------
        layer : int
        lookahead : int
            How many of the layer's absent experts to ask for, the best by affinity first; ties go to the lower id. All
            of them, if there are fewer.

        Returns
        -------
        list of PagingRequest
            What this queued, best first: not what was requested or loading already, nor what failed of late.

        Raises
        ------
        ValueError
            If there is no such layer, or `lookahead` is negative.
        """
        layer = self._checked_layer(layer)
        if not isinstance(lookahead, int | np.integer) or isinstance(lookahead, bool) or lookahead < 0:
            raise ValueError(f"lookahead must be an integer, 0 or more, not {lookahead!r}")
        leases, resident = self._lease_table(), set(self.resident(layer))
        absent = [expert for expert in self.affinity(layer).top(self.config.num_experts) if expert not in resident]
        return [
            PagingRequest(layer, expert, PagingDirection.IN, PagingPriority.PREFETCH)
            for expert in absent[: int(lookahead)]
            if prefetch(leases, layer, [expert], self.config.num_experts)
        ]

    def speculate(self, layer: int, hidden: npt.NDArray[np.float32]) -> list[PagingRequest]:
        """Ask ahead for what the next layer will probably choose: apply its gate to this layer's hidden states.

        To be called once `layer` is routed. The pager loads what it trusts such predictions to be worth, as time
        allows.

        Parameters
        ----------
        layer : int
            The layer that the hidden states enter. The last one has no next: nothing is asked for.
        hidden : ndarray
            float32 [H] or [T, H], finite.

        Returns
        -------
        list of PagingRequest
            What this queued, those of most gate weight first: not what is resident, requested or loading. Nothing if
            the settings leave no place for it: ``gate`` is not among `PagerConfig`'s predictors, or its prefetch is 0;
            and but for one time in 128 nothing while the pager has found such predictions not to be worth what they
            cost, as it does where no core is idle.

        Raises
        ------
        ValueError
            If there is no such layer, or the hidden states have another shape or dtype, or are not finite.
        ConfigError, CheckpointError
            As `gate`.
        """
        layer = self._checked_layer(layer)
        self._check_open()
        rows = checked_rows("hidden", hidden, self.config.hidden_size)
        if layer + 1 == self.config.num_layers or not self.speculates:
            return []
        gate, bias = self.gate(layer + 1), self.gate_bias(layer + 1)

        def logits() -> npt.NDArray[np.float32]:
            product: npt.NDArray[np.float32] = rows @ gate.T
            return product if bias is None else product + bias

        return self._ask_ahead(layer + 1, logits)

    def expect(
        self, layer: int, logits: npt.NDArray[np.float32] | Callable[[], npt.NDArray[np.float32]]
    ) -> list[PagingRequest]:
        """Ask ahead for what a layer will probably choose, by an estimate of the logits that it will get.

        Where `speculate` reads the gate for it, this is for callers who have the gate, or another estimate, themselves.

        Parameters
        ----------
        layer : int
        logits : ndarray or callable
            float32 [E] or [T, E], finite; or what computes them, which is called only if they are wanted.

        Returns
        -------
        list of PagingRequest
            As `speculate`.

        Raises
        ------
        ValueError
            If there is no such layer, or the logits have another shape or dtype, or are not finite.
        """
        layer = self._checked_layer(layer)
        self._check_open()
        experts = self.config.num_experts
        if callable(logits):
            compute = logits
            return self._ask_ahead(layer, lambda: checked_rows("logits", compute(), experts))
        rows = checked_rows("logits", logits, experts)
        return self._ask_ahead(layer, lambda: rows)

    def _ask_ahead(self, layer: int, logits: Callable[[], npt.NDArray[np.float32]]) -> list[PagingRequest]:
        if not self.speculates:
            return []
        speculation = self._speculation
        if speculation is None:
            speculation = self._speculation = self._attachment.one(Speculation)
        return speculation.ask(layer, logits)

    @property
    def speculates(self) -> bool:
        """Whether the settings leave place for what `speculate` and `expect` ask for."""
        return self.config.pager.prefetch > 0 and "gate" in self.config.pager.predictors

    def page_out(self, layer: int, expert: int) -> bool:
        """Hint that an expert may be evicted first; whether the pager's queue took the hint."""
        layer, expert = self._checked_ids(layer, expert)
        self._check_open()
        with self._attachment.in_use() as segment:
            layout = segment.layout
            request = pack_request(layer, expert, PAGE_OUT, NORMAL, NO_LANE)
            taken = bool(ring_push(segment.address + layout.ring, layout.ring_bits, request) == PUSHED)
            self._attachment.ring_pager()
        return taken

    # ---------------------------------------------------------- looking

    def metrics(self) -> RuntimeMetrics:
        """One snapshot of all counters. Claims no lane."""
        self._check_open()
        with self._attachment.in_use() as segment:
            return read_metrics(segment)

    def one(self, make: Callable[[Attachment], T]) -> T:
        """What `make` makes of this process's attachment, once for all its runtimes here; for integrations."""
        self._check_open()
        return self._attachment.one(make)

    # ---------------------------------------------------------- end

    def close(self) -> None:
        """Let go of everything; the owner also stops the pager and removes the segment.

        Leases still held by other threads are released, waits end with `RuntimeClosedError`. Views of weights that are
        still referenced keep their memory mapped until they go (a `ResourceWarning` says so), but their bytes may
        change from now on. Does nothing the second time.

        Raises
        ------
        RuntimeError
            If a signal handler calls this in the middle of another call of the same thread; nothing has changed.
        """
        if os.getpid() != self._pid:
            return  # a forked child holds nothing, and the mutex may belong to a thread that does not exist here
        self._attachment.check_idle_here()
        _open_runtimes.discard(self)
        with self._mutex:
            if self._closed:
                return
            self._closed = True
        try:
            if self.owner:
                self._destroy()
        finally:
            self._leases = self._speculation = None
            leave(self._attachment)

    def _destroy(self) -> None:
        with contextlib.suppress(RuntimeClosedError), self._attachment.in_use() as segment:
            # The files go before the pager does: should this process die in between, the pager finishes for it.
            if claim_destruction(segment):
                unlink_segment(segment)
            if self._pager is not None:
                stop_pager(self._pager)

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---------------------------------------------------------- checks

    def _lease_table(self) -> Leases:
        leases = self._leases
        if leases is None or self._closed or self._attachment.closed:
            self._check_open()
            leases = self._leases = self._attachment.one(Leases)
        return leases

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeClosedError(f"the runtime {self.name!r} was closed; attach to it again")
        if self._attachment.closed:
            self._attachment.check_open()

    def _checked_layer(self, layer: int) -> int:
        return _checked_index("layer", layer, self.config.num_layers)

    def _checked_ids(self, layer: int, expert: int) -> tuple[int, int]:
        config = self.config
        if type(layer) is type(expert) is int and 0 <= layer < config.num_layers and 0 <= expert < config.num_experts:
            return layer, expert
        return self._checked_layer(layer), _checked_index("expert", expert, config.num_experts)


def _resident_row(segment: Segment, layer: int) -> int:
    """Offset of a layer's bitmap."""
    return segment.layout.resident + layer * segment.layout.resident_row_bytes


def _checked_index(name: str, value: int, count: int) -> int:
    """`value` as an int: NumPy's narrow integers would overflow in the arithmetic of addresses."""
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or not 0 <= value < count:
        raise ValueError(f"{name} must be an integer from 0 to {count - 1}, not {value!r}")
    return int(value)


def _checked_timeout(timeout: float) -> float:
    if type(timeout) is float and 0 <= timeout <= threading.TIMEOUT_MAX:
        return timeout
    if not isinstance(timeout, int | float | np.floating | np.integer) or not math.isfinite(timeout) or timeout < 0:
        raise ValueError(f"timeout must be a finite number of seconds, 0 or more, not {timeout!r}")
    return min(float(timeout), threading.TIMEOUT_MAX)


@atexit.register
def _close_all() -> None:
    for runtime in list(_open_runtimes):
        runtime.close()
