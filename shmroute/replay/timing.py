"""A model of time: how long workers wait, given which accesses hit and what was loaded when.

Loads share one channel and run one after the other. What a layer misses is asked for when its token is routed, and runs
in the order of asking; what was asked for ahead of demand runs when the channel has nothing else to do, and moves to
the front once it is wanted. A worker computes a layer's experts one after the other, those that are there first, and
waits for the others as they arrive. So a load may end in time although it was a miss, and an access may hit an expert
that another worker is still waiting for.

Left out: that a load must wait for its victim's lease to end, transfers that slow each other down, and all of a layer
that is not experts (count it with their computation).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import types

from shmroute.replay.accesses import Accesses
from shmroute.replay.serving import LOAD_AHEAD, LOAD_KEY, LOAD_STEP, Served
from shmroute.shared.kernel import kernel, load_kernels


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


_ARRAY = types.int64[::1]
_FLOATS = types.float64[::1]


@kernel(
    types.int64(
        _ARRAY, _ARRAY, _ARRAY, types.int64[:, ::1], _FLOATS, _FLOATS, _ARRAY, _FLOATS, types.float64, types.float64
    )
)
def run_clocks(
    keys: npt.NDArray[np.int64],
    starts: npt.NDArray[np.int64],
    workers: npt.NDArray[np.int64],
    loads: npt.NDArray[np.int64],
    ready: npt.NDArray[np.float64],
    now: npt.NDArray[np.float64],
    queued: npt.NDArray[np.int64],
    asked: npt.NDArray[np.float64],
    load_time: float,
    compute: float,
) -> int:
    """Play all steps; how many accesses were in time.

    Parameters
    ----------
    keys, starts, workers, loads : ndarray
        As in `Accesses` and `Served`.
    ready : ndarray
        float64 [experts of all layers]: when each was loaded last, inf while it is queued ahead of demand; 0 at first.
    now : ndarray
        float64 [workers + 1]: each one's clock, and in the end the time waited for loads in all; 0 at first.
    queued, asked : ndarray
        int64 and float64 [loads]: scratch space.
    load_time, compute : float
        Of one expert and of one step, in seconds.
    """
    in_time, channel, waited = 0, 0.0, 0.0
    logged = head = tail = 0  # of `loads`, what was read; of `queued`, what is still to be run
    for step in range(len(workers)):
        first, last = starts[step], starts[step + 1]
        worker, each = workers[step], compute / max(last - first, 1)
        routed = now[worker]
        while head < tail:  # what was asked for ahead has used the time until now
            key = queued[head]
            begin = max(channel, asked[head])
            if ready[key] == math.inf:
                if begin >= routed:
                    break
                channel = begin + load_time
                ready[key] = channel
            head += 1
        for i in range(first, last):
            key = keys[i]
            missed = logged < len(loads) and loads[logged, LOAD_STEP] == step and loads[logged, LOAD_AHEAD] == 0
            if missed and loads[logged, LOAD_KEY] == key:
                logged += 1
            elif ready[key] < math.inf:
                continue
            channel = max(channel, routed) + load_time
            ready[key] = channel
        while logged < len(loads) and loads[logged, LOAD_STEP] == step:
            queued[tail], asked[tail] = loads[logged, LOAD_KEY], routed
            ready[loads[logged, LOAD_KEY]] = math.inf
            tail += 1
            logged += 1
        time = routed
        for i in range(first, last):
            if ready[keys[i]] <= routed:
                in_time += 1
                time += each
        for i in range(first, last):
            due = ready[keys[i]]
            if due > routed:
                if due <= time:
                    in_time += 1
                else:
                    waited += due - time
                    time = due
                time += each
        now[worker] = time
    now[len(now) - 1] = waited
    return in_time


def waiting(accesses: Accesses, served: Served, machine: Machine) -> tuple[float, float]:
    """The share of accesses that find their expert in time, and the seconds that a token waits on average."""
    load_kernels()
    ready = np.zeros(accesses.num_layers * accesses.num_experts)
    now = np.zeros(accesses.num_workers + 1)
    count = len(served.loads)
    in_time = run_clocks(
        accesses.keys, accesses.starts, accesses.workers, served.loads, ready, now, np.zeros(count, np.int64),
        np.zeros(count), machine.expert_bytes / machine.bandwidth, machine.compute,
    )  # fmt: skip
    return in_time / max(len(accesses.keys), 1), float(now[-1]) / accesses.num_tokens
