"""A model of time: how long workers wait, given which accesses hit and what was loaded when.

Loads share one channel and run one after the other. What a layer misses is asked for when its token is routed, and runs
in the order of asking. A worker computes a layer's experts one after the other, those that are there first, and waits
for the others in turn. So a load may end in time although it was a miss, and an access may hit an expert that another
worker is still waiting for. `player` is the same model with loads ahead of demand, which it decides as it goes.

Left out: that a load must wait for its victim's lease to end, transfers that slow each other down, and all of a layer
that is not experts (count it with their computation).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import types

from shmroute.replay.accesses import Accesses
from shmroute.replay.serving import LOAD_KEY, LOAD_STEP, Served
from shmroute.shared.kernel import inner, kernel, load_kernels


@dataclass(frozen=True)
class Machine:
    """What a replay assumes.

    Attributes
    ----------
    expert_bytes : int
    bandwidth : float
        Bytes a second of loads.
    compute : float
        Seconds that a worker computes for one token in one layer.
    """

    expert_bytes: int
    bandwidth: float
    compute: float

    @property
    def load_time(self) -> float:
        """Seconds of one load."""
        return self.expert_bytes / self.bandwidth


_ARRAY = types.int64[::1]
_FLOATS = types.float64[::1]


# Of a run's totals, float64 [2].
IN_TIME, WAITED = range(2)


@inner
def compute_layer(
    keys: npt.NDArray[np.int64],
    first: int,
    last: int,
    ready: npt.NDArray[np.float64],
    routed: float,
    compute: float,
    totals: npt.NDArray[np.float64],
) -> float:
    """Compute ``keys[first:last]`` from when they were routed; when that ends.

    Parameters
    ----------
    keys : ndarray
        int64.
    first, last : int
    ready : ndarray
        float64 [experts of all layers]: when the load of each ends, or ended.
    routed, compute : float
        Seconds: when, and how long without waiting.
    totals : ndarray
        float64 [2]: accesses in time, and seconds waited, are added.
    """
    each = compute / max(last - first, 1)
    time = routed
    for i in range(first, last):
        if ready[keys[i]] <= routed:
            totals[IN_TIME] += 1
            time += each
    for i in range(first, last):
        due = ready[keys[i]]
        if due > routed:
            if due <= time:
                totals[IN_TIME] += 1
            else:
                totals[WAITED] += due - time
                time = due
            time += each
    return time


@kernel(
    types.void(
        _ARRAY, _ARRAY, _ARRAY, types.int64[:, ::1], _FLOATS, _FLOATS, _FLOATS, types.float64, types.float64
    )
)  # fmt: skip
def run_clocks(
    keys: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    workers: npt.NDArray[np.int64],
    loads: npt.NDArray[np.int64],
    ready: npt.NDArray[np.float64],
    now: npt.NDArray[np.float64],
    totals: npt.NDArray[np.float64],
    load_time: float,
    compute: float,
) -> None:
    """Play all steps.

    Parameters
    ----------
    keys, starts, workers, loads : ndarray
        As in `Accesses` and `Served`.
    ready : ndarray
        float64 [experts of all layers]: when the latest load of each ends; 0 at first.
    now : ndarray
        float64 [workers]: each one's clock; 0 at first.
    totals : ndarray
        As of `compute_layer`; 0 at first.
    load_time, compute : float
        Of one expert and of one step, in seconds.
    """
    channel, logged = 0.0, 0
    for step in range(len(workers)):
        routed = now[workers[step]]
        while logged < len(loads) and loads[logged, LOAD_STEP] == step:
            channel = max(channel, routed) + load_time
            ready[loads[logged, LOAD_KEY]] = channel
            logged += 1
        now[workers[step]] = compute_layer(keys, starts[step], starts[step + 1], ready, routed, compute, totals)


def waiting(accesses: Accesses, served: Served, machine: Machine) -> tuple[float, float]:
    """The share of accesses that find their expert in time, and the seconds that a token waits on average."""
    load_kernels()
    ready = np.zeros(accesses.num_layers * accesses.num_experts)
    totals = np.zeros(2)
    run_clocks(
        accesses.keys, accesses.starts, accesses.workers, served.loads, ready, np.zeros(accesses.num_workers), totals,
        machine.load_time, machine.compute,
    )  # fmt: skip
    return shares(accesses, totals)


def shares(accesses: Accesses, totals: npt.NDArray[np.float64]) -> tuple[float, float]:
    """A run's totals as the share of accesses in time, and the seconds that a token waits on average."""
    return float(totals[IN_TIME]) / max(len(accesses.keys), 1), float(totals[WAITED]) / accesses.num_tokens
