"""A worker that stops in the middle of a copy to its device, for a test that kills it: ``NAME``."""

from __future__ import annotations

import sys
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
from late_device import LateDevice

import shmroute
from shmroute.integrations.transformers.device_cache import DeviceCache


def stop(*_: Any) -> None:
    print("copying", flush=True)
    time.sleep(60)


runtime = shmroute.attach(sys.argv[1])
cache, device = runtime.one(DeviceCache), LateDevice()
cache.open(device, 3, SimpleNamespace(of_bytes=lambda slot: slot))  # type: ignore[arg-type]
device.join = stop  # type: ignore[method-assign]
list(cache.lend(runtime, 0, np.array([[0, 1]]), 5.0))
