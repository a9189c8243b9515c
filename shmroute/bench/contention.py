"""A simulation of workers that route at once on many cores: which lines they wait for, and how long.

SIMULATED, not measured: this machine may have two cores. What is simulated is where each shared line is and who waits
for it; what a token costs a worker that waits for nobody is measured (`shmroute.bench.scaling`).

A worker takes a private time for a token and then publishes it: at once, or with as many others as may be put off
(`shmroute.routing.publication`). A publication changes the line of the layer's clock and the lines that hold its
experts' words (four experts to a line; the experts of a token are drawn uniformly, and all differ). It asks for all of
them at the same moment, some time before it needs them and as many at a time as a core can have under way, and goes on
when it has the last. A line comes from whoever changed it last, which takes as long as a transfer between the two cores
does; one that somebody else has changed in between has to be asked for once more, and one that several wait for comes
to one after the other.

Left out: compare-and-swaps that fail and are tried again; traffic between chiplets beyond its latency; choices that
prefer some experts, whose lines are then busier; whatever else a worker's core and caches are busy with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import types

from shmroute.bench.kernels import on_demand
from shmroute.shared.kernel import inner
from shmroute.shared.layout import LINE, USE_BYTES

EXPERTS_PER_LINE = LINE // USE_BYTES
UNDER_WAY = 16
"""Lines that a core can wait for at a time: an assumption, in the middle of what server processors of today have."""

NOBODY, SEED = -1, 42
_FLOATS, _INTS, _FLOATS_2D, _INTS_2D = types.float64[::1], types.int64[::1], types.float64[:, ::1], types.int64[:, ::1]


@dataclass(frozen=True)
class Machine:
    """Cores, and what it costs to take a line that another one has changed.

    Attributes
    ----------
    name : str
    cores_per_chiplet, cores_per_socket : int
        Cores are numbered through chiplets and sockets.
    chiplet, socket, across : float
        Nanoseconds between two cores of one chiplet, of one socket, of two sockets.
    """

    name: str
    cores_per_chiplet: int
    cores_per_socket: int
    chiplet: float
    socket: float
    across: float


@dataclass(frozen=True)
class Load:
    """What the workers do.

    Attributes
    ----------
    layers, experts, top_k : int
        They go through the layers in turn, each from one of its own.
    together : int
        Tokens in a publication: 1 if none are put off, which in several layers none are.
    private : float
        Nanoseconds that a token costs a worker that waits for nobody, its publication with it.
    ahead : float
        Nanoseconds that the lines of a publication are asked for before they are needed.
    between : float
        Nanoseconds that it does something else after each.
    """

    layers: int
    experts: int
    top_k: int
    together: int
    private: float
    ahead: float
    between: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What a simulation came to.

    Attributes
    ----------
    routes_per_ms : float
        Of all workers together.
    wait : float
        Nanoseconds that a token waited for lines, on average.
    clock, use : float
        Share of the time, 0 … 1, that the busiest clock's line and the busiest line of uses were under way.
    """

    routes_per_ms: float
    wait: float
    clock: float
    use: float


@inner
def _random(state: npt.NDArray[np.int64], below: int) -> int:
    """The next number of a 48-bit linear congruential generator (drand48's), from 0 to before `below`."""
    state[0] = (state[0] * 0x5DEECE66D + 0xB) & 0xFFFFFFFFFFFF
    return int(((state[0] >> 17) * below) >> 31)


@on_demand(
    types.void(
        types.int64, types.int64, types.int64, types.int64, types.float64, types.float64, types.float64, types.int64,
        types.int64, _FLOATS, _INTS, _FLOATS_2D, _INTS_2D, _FLOATS, _INTS_2D, _INTS, _FLOATS, _FLOATS,
    )
)  # fmt: skip
def run_workers(
    layers: int, experts: int, together: int, tokens: int, private: float, ahead: float, between: float,
    chiplet_cores: int, socket_cores: int, latencies: Any, owner: Any, line_times: Any, work: Any, now: Any,
    touched: Any, chosen: Any, under_way: Any, out: Any,
) -> None:  # fmt: skip
    """Let workers route `tokens` tokens each; `out` gets the end, the waiting and the busiest clock's and use's time.

    Parameters
    ----------
    owner : int64 [layers × lines]
        Who changed a line last; all `NOBODY`.
    line_times : float64 [2, layers × lines]
        When a line is free again, and how long it was under way in all; zero.
    work : int64 [workers + 1, 3]
        Of each worker: its layer, the tokens that it put off, zero, and those that it routed, zero. Of the last row
        the first word is the state of the random numbers.
    now : float64 [workers]
        When each needs the lines of its first token.
    touched : int64 [workers, lines]
        Zero.
    chosen, under_way : int64 [top_k], float64 [UNDER_WAY]
        Scratch.
    """
    workers, width, top_k = len(now), touched.shape[1], len(chosen)
    free, busy, state = line_times[0], line_times[1], work[workers]
    waited = 0.0
    for _ in range(workers * tokens):
        worker = -1
        for other in range(workers):  # whose token is next
            if work[other, 2] < tokens and (worker < 0 or now[other] < now[worker]):
                worker = other
        for i in range(top_k):
            again = True
            while again:
                chosen[i] = _random(state, experts)
                again = False
                for j in range(i):
                    again = again or chosen[j] == chosen[i]
            touched[worker, 1 + chosen[i] // EXPERTS_PER_LINE] = 1
        touched[worker, 0] = 1
        work[worker, 1] += 1
        moment = now[worker]
        if work[worker, 1] == together:
            work[worker, 1] = 0
            asked, last = 0, moment
            for i in range(UNDER_WAY):
                under_way[i] = moment - ahead
            for line in range(width):
                if touched[worker, line] == 0:
                    continue
                touched[worker, line] = 0
                at = work[worker, 0] * width + line
                former = owner[at]
                if former == worker:
                    continue
                owner[at] = worker
                if former == NOBODY:
                    continue
                latency = latencies[2]
                if former // chiplet_cores == worker // chiplet_cores:
                    latency = latencies[0]
                elif former // socket_cores == worker // socket_cores:
                    latency = latencies[1]
                begun = under_way[asked % UNDER_WAY]
                if free[at] > moment - ahead:  # it was asked for, and then taken away again
                    begun = max(begun, moment, free[at])
                free[at] = begun + latency
                under_way[asked % UNDER_WAY] = free[at]
                busy[at] += latency
                last = max(last, free[at])
                asked += 1
            waited += last - moment
            moment = last
        now[worker] = moment + private + between
        work[worker, 0] = (work[worker, 0] + 1) % layers
        work[worker, 2] += 1
    out[1] = waited
    for worker in range(workers):
        out[0] = max(out[0], now[worker])
    for layer in range(layers):
        out[2] = max(out[2], busy[layer * width])
        for line in range(1, width):
            out[3] = max(out[3], busy[layer * width + line])


def simulate(machine: Machine, workers: int, load: Load, tokens: int = 2000) -> Outcome:
    """Let as many workers, each on a core of its own, route so many tokens each."""
    width = 1 + -(-load.experts // EXPERTS_PER_LINE)
    work = np.zeros((workers + 1, 3), np.int64)
    work[:workers, 0] = np.arange(workers) * load.layers // workers
    work[workers, 0] = SEED
    began = (load.private + load.between) * np.arange(workers) / workers  # not all at the same moment
    out = np.zeros(4)
    run: Any = run_workers.compiled()
    run(
        load.layers, load.experts, load.together, tokens, load.private, load.ahead, load.between,
        machine.cores_per_chiplet, machine.cores_per_socket,
        np.array([machine.chiplet, machine.socket, machine.across]),
        np.full(load.layers * width, NOBODY, np.int64), np.zeros((2, load.layers * width)),
        work, began, np.zeros((workers, width), np.int64), np.zeros(load.top_k, np.int64), np.zeros(UNDER_WAY), out,
    )  # fmt: skip
    end, waited, clock, use = out.tolist()
    routed = workers * tokens
    return Outcome(routed * 1e6 / end, waited / routed, clock / end, use / end)
