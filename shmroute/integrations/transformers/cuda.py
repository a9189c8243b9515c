"""The CUDA calls that `device_cache` needs, through torch, and nothing else.

Streams, as CUDA has them: what one stream is told to do happens in that order; between streams only `wait_event` orders
anything, and that for what is told afterwards. The "current" stream is the calling thread's, on which torch computes.
"""

from __future__ import annotations

import torch

from shmroute.errors import ConfigError, DeviceError


class CudaDevice:
    """One GPU. See `shmroute.integrations.transformers.device_cache.Device` for what its methods promise.

    Parameters
    ----------
    name : str or torch.device
        Such as ``"cuda"``, which is torch's current one, or ``"cuda:1"``.

    Raises
    ------
    ConfigError
        If it is no GPU, or none that torch can use here.
    """

    def __init__(self, name: str | torch.device) -> None:
        self.torch_device = checked_device(name)
        self._side = torch.cuda.Stream(self.torch_device)
        self._latest: torch.cuda.Stream | None = None

    def allocate(self, slots: int, slot_bytes: int) -> torch.Tensor:
        """uint8 [slots, slot_bytes]."""
        try:
            return torch.empty((slots, slot_bytes), dtype=torch.uint8, device=self.torch_device)
        except torch.OutOfMemoryError as error:
            free, total = torch.cuda.mem_get_info(self.torch_device)
            raise ConfigError(
                f"{self.torch_device} has no room for {slots} experts of {slot_bytes} bytes ({free} of its {total} "
                f"bytes are free): give a smaller device budget"
            ) from error

    def page_lock(self, address: int, size: int) -> None:
        """Register host memory; the mapping must be writable, as it is."""
        self._checked("cudaHostRegister", address, size, 0)

    def page_unlock(self, address: int) -> None:
        """Unregister it."""
        self._checked("cudaHostUnregister", address)

    def begin(self) -> None:
        """Order this stream behind the one of the call before, if that was another."""
        stream = torch.cuda.current_stream(self.torch_device)
        if self._latest is not None and self._latest != stream:
            stream.wait_stream(self._latest)
        self._latest = stream

    def mark(self) -> torch.cuda.Event:
        """An event on the current stream."""
        return torch.cuda.current_stream(self.torch_device).record_event()

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: torch.cuda.Event) -> None:
        """Copy contiguous bytes: one cudaMemcpyAsync."""
        self._side.wait_event(after)
        with torch.cuda.stream(self._side):
            target.copy_(source, non_blocking=True)

    def join(self) -> None:
        """Order the current stream behind the side stream."""
        torch.cuda.current_stream(self.torch_device).wait_stream(self._side)

    def finish(self) -> None:
        """Wait for the side stream."""
        self._side.synchronize()

    def synchronize(self) -> None:
        """Wait for all streams."""
        torch.cuda.synchronize(self.torch_device)

    def _checked(self, function: str, *arguments: int) -> None:
        """Call a function of the CUDA runtime, which returns a code instead of raising."""
        with torch.cuda.device(self.torch_device):
            code = int(getattr(torch.cuda.cudart(), function)(*arguments))
        if code != 0:
            raise DeviceError(f"{function} on {self.torch_device} failed: {torch.cuda.CudaError(code)}")


def checked_device(name: str | torch.device) -> torch.device:
    """The GPU of a name, with its index.

    Raises
    ------
    ConfigError
        As `CudaDevice`.
    """
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device must be a GPU such as 'cuda:0', not {name!r}: {error}") from error
    if device.type != "cuda":
        raise ConfigError(f"device must be a GPU such as 'cuda:0', not {name!r}; leave it out to compute on the CPU")
    if not torch.cuda.is_available():
        reason = "it is built without CUDA" if not torch.backends.cuda.is_built() else "it finds no usable GPU"
        raise ConfigError(f"device is {name!r}, but torch {torch.__version__} cannot use one: {reason}")
    count = torch.cuda.device_count()
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= count:
        raise ConfigError(f"device is {name!r}, but torch finds {count} GPUs here: cuda:0 to cuda:{count - 1}")
    return torch.device("cuda", index)
