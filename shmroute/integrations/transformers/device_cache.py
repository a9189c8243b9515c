"""A worker's cache of experts in the memory of its GPU, filled from the shared slots while the GPU computes.

Slots of whole experts in one allocation; which expert is in which, and which goes first, `shmroute.device_tier` says.
The shared pool is page-locked, so that the GPU fetches experts from it by itself, on a stream beside that of the
model's computations (the *side stream*).

A layer call hands out the experts that are there already; their products are queued, and run while the others come.
Then each that is missing, as it becomes resident in host memory and is leased:

1. a slot is taken, perhaps from another expert;
2. the copy is queued on the side stream, behind the last product that read the slot; (slot read / slot overwritten)
3. the model's stream is told to wait for it; (copied / read)
4. the caller queues its products;
5. the thread waits for the copy; only then the expert counts as present, the lease is given back and the next one is
   asked for. (copied / lease given back)

So the next copy runs while the GPU is at the products of step 4, a thread holds one lease at a time and none while it
waits for the pager, and a copy is under way only inside that step: whatever raises in it, the lease outlives the copy.
A slot is overwritten only for an expert that is missing, when all that were there have been handed out.

Layer calls of several threads run one after the other, and so do their computations on the GPU.

Death windows: none. A dead worker's lease is cleared by the reaper as ever; its GPU's memory goes with its process.
"""

from __future__ import annotations

import threading
import warnings
from contextlib import closing
from functools import partial
from typing import Any, Protocol

import torch

from shmroute.attachment import Attachment
from shmroute.device_tier import DeviceTier, Ids
from shmroute.errors import ConfigError, DeviceError, ExpertTimeout
from shmroute.integrations.transformers.expert_views import ExpertViews, Lender, LentExperts, bytes_of
from shmroute.routing.grouping import group_by_expert
from shmroute.runtime import Runtime

CLOSE_PATIENCE = 5.0
"""Seconds within which a layer call ends whose runtime is being closed."""


class Device(Protocol):
    """What the cache needs of a GPU: `shmroute.integrations.transformers.cuda` has it of a real one.

    All but `finish` and `synchronize` return at once: the GPU does in its own time what it was told.
    """

    @property
    def torch_device(self) -> torch.device:
        """Where its tensors are."""

    def allocate(self, slots: int, slot_bytes: int) -> torch.Tensor:
        """uint8 [slots, slot_bytes] in its memory.

        Raises
        ------
        ConfigError
            If there is no room.
        """

    def page_lock(self, address: int, size: int) -> None:
        """Keep host memory in place, and let copies read it directly.

        Raises
        ------
        DeviceError
            If that is refused.
        """

    def page_unlock(self, address: int) -> None:
        """Undo `page_lock`."""

    def begin(self) -> None:
        """What this thread's stream computes from here on comes after all that other threads' have computed so far."""

    def mark(self) -> Any:
        """Note the point up to which this thread's stream has been told what to compute."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> None:
        """Copy page-locked host memory on the side stream, once the GPU has come to a mark."""

    def join(self) -> None:
        """What this thread's stream computes from here on comes after all copies so far."""

    def finish(self) -> None:
        """Wait until all copies so far are done."""

    def synchronize(self) -> None:
        """Wait until all is done that it was told."""


class DeviceCache:
    """The one cache of a process in its GPU; see the file's head. Made by `Attachment.one`, and filled once opened."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self._num_experts = attachment.segment.config.num_experts
        self._pool = attachment.segment.address + attachment.segment.layout.pool
        self._opened: tuple[Device, int] | None = None
        self._mutex = threading.Lock()  # not re-entrant: a generator that was dropped may end in another thread

    def open(self, device: Device, slots: int, views: ExpertViews) -> None:
        """Take the GPU's memory and lock the pool; does nothing if it is open already with the same.

        Raises
        ------
        ConfigError
            If this process has another cache on this runtime, or the GPU has no room.
        DeviceError
            If the pool cannot be page-locked.
        """
        segment = self._attachment.segment
        with self._mutex:
            if self._opened is not None:
                if (self._opened[0].torch_device, self._opened[1]) == (device.torch_device, slots):
                    return
                raise ConfigError(
                    f"this process has a cache of {self._opened[1]} experts in {self._opened[0].torch_device} for the "
                    f"runtime {segment.name!r} already: give the same device and budget, or use another process"
                )
            buffer = device.allocate(slots, segment.config.slot_bytes)
            device.page_lock(self._pool, segment.config.budget_bytes)
            try:
                self._tier = DeviceTier(self._attachment, slots)
                self._attachment.before_close(self._close)
            except BaseException:
                device.page_unlock(self._pool)
                raise
            self._device, self._buffer = device, buffer
            self._experts = [views.of_bytes(slot) for slot in buffer]
            # For each slot, the mark after the last product that reads it; None while that is not known.
            self._read: list[Any] = [device.mark()] * slots
            self._opened = device, slots

    @property
    def torch_device(self) -> torch.device:
        """Where the experts are that it lends."""
        return self._device.torch_device

    def lender(self, runtime: Runtime) -> Lender:
        """Lends the experts of one of this process's runtimes."""
        return partial(self.lend, runtime)

    def lend(self, runtime: Runtime, layer: int, choices: Ids, timeout: float) -> LentExperts:
        """Each expert that some tokens of a layer chose, once: those in the GPU first, the others as they come.

        Parameters
        ----------
        runtime : Runtime
            One of this process's.
        layer : int
        choices : ndarray
            int64 [T, k].
        timeout : float
            Seconds to wait for each expert that is not there, and for other threads' layer calls.

        Yields
        ------
        expert : int
        weights : Projections or TransposedProjections
            To be read by what is queued before the next step of the iteration.

        Raises
        ------
        As `Runtime.experts`.
        """
        ids, _ = group_by_expert(choices, self._num_experts)
        if not self._mutex.acquire(timeout=timeout):
            raise ExpertTimeout(f"another thread's layer call has the GPU's cache for longer than {timeout:g} s")
        try:
            self._attachment.check_open()
            self._device.begin()
            self._tier.use(layer, choices)
            there = {e: slot for e in ids.tolist() if (slot := self._tier.slot_of(layer, e)) is not None}
            missing = [expert for expert in ids.tolist() if expert not in there]
            with closing(runtime.experts(layer, missing, timeout)) as coming:  # they are requested here
                for expert, slot in there.items():
                    yield from self._hand_out(expert, slot)
                for expert, _, _, weights in coming:
                    yield from self._fetch(layer, expert, bytes_of(weights), ids)
        finally:
            self._mutex.release()

    def _hand_out(self, expert: int, slot: int) -> LentExperts:
        self._read[slot] = None
        try:
            yield expert, self._experts[slot]
        finally:
            self._read[slot] = self._device.mark()  # (slot read / slot overwritten)

    def _fetch(self, layer: int, expert: int, source: torch.Tensor, wanted: Ids) -> LentExperts:
        """Copy an expert under its lease, hand it out, and wait for the copy."""
        slot = self._tier.make_room(layer, expert, wanted)
        queued = False
        try:
            if self._read[slot] is None:  # something was raised before its last reader was marked
                self._device.synchronize()
                self._read[slot] = self._device.mark()
            target = self._buffer[slot, : len(source)]
            self._device.copy(target, source, self._read[slot])  # (slot read / slot overwritten)
            queued = True
            self._device.join()  # (copied / read)
            yield from self._hand_out(expert, slot)
        finally:
            self._device.finish()  # (copied / lease given back)
            if queued:
                self._tier.arrived(layer, expert, slot)
            else:
                self._tier.left_out(layer, expert, slot)

    def _close(self) -> None:
        """Let go of the pool before it is unmapped, and free the GPU's memory."""
        # Held for good only by a call of this very thread, if a signal handler closes: then all stays as it is. What
        # that call may still copy from keeps the pool mapped.
        if not self._mutex.acquire(timeout=CLOSE_PATIENCE):
            warnings.warn("a layer call keeps the shared pool page-locked", ResourceWarning, stacklevel=2)
            return
        try:
            self._tier.close()
            self._device.synchronize()
            self._device.page_unlock(self._pool)
            del self._buffer, self._experts
        except (DeviceError, RuntimeError) as error:  # of a GPU that is in error; the segment must be left all the same
            warnings.warn(f"the GPU did not let go of the shared pool: {error}", ResourceWarning, stacklevel=2)
        finally:
            self._mutex.release()
