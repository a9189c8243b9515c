"""A simulation of workers that route at once on many cores: which lines they wait for, and how long.

SIMULATED, not measured: this machine may have two cores. What is simulated is where each shared line is and who waits
for it; what a token costs a worker that waits for nobody is measured (`shmroute.bench.scaling`).

A worker takes a private time for a token and then publishes it: at once, or with as many others as may be put off
(`shmroute.routing.publication`). A publication changes the line of the layer's clock and the lines that hold its
experts' words (four experts to a line; the experts of a token are drawn uniformly, and all differ). It asks for all of
them at the same moment, some time before it needs them and as many at a time as a core can have under way; then it
makes one change after the other, and waits for each line that it does not have. A line comes from whoever asked for it
before, which takes as long as a transfer between the two cores does; one that was taken away again has to be asked for
once more, and one that several want comes to one after the other.

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

JITTER = 0.25
"""By how much the time between two publications may be longer or shorter: an assumption, lest workers stay in step."""

NOBODY, ASKING, SEED = -1, -1, 42
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
        Nanoseconds that the lines of a publication are asked for before the first is needed.
    changing : float
        Nanoseconds that a publication takes from there, with all of its lines at hand.
    between : float
        Nanoseconds that it does something else after each.
    """

    layers: int
    experts: int
    top_k: int
    together: int
    private: float
    ahead: float
    changing: float
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
        types.int64, types.int64, types.int64, types.int64, types.int64, types.float64, types.float64, types.float64,
        types.int64, types.int64, _FLOATS, _INTS, _FLOATS_2D, _INTS_2D, _FLOATS, _INTS_2D, _INTS, _FLOATS, _FLOATS,
    )
)  # fmt: skip
def run_workers(
    layers: int, experts: int, top_k: int, together: int, rounds: int, rest: float, ahead: float, changing: float,
    chiplet_cores: int, socket_cores: int, latencies: Any, owner: Any, line_times: Any, work: Any, now: Any, order: Any,
    drawn: Any, under_way: Any, out: Any,
) -> None:  # fmt: skip
    """Let workers publish `rounds` times; `out` gets the end, the waiting and the busiest clock's and use's time.

    Parameters
    ----------
    layers, experts, top_k, together : int
        As in `Load`.
    rest, ahead, changing : float
        Nanoseconds of a publication's tokens before its lines are asked for, until the first of them is needed, and
        in which they are changed.
    owner : int64 [layers × lines]
        Who has a line, or will have it next; all `NOBODY`.
    line_times : float64 [2, layers × lines]
        When that one has it, and how long the line was under way in all; zero.
    work : int64 [workers + 1, 4]
        Of each worker: its layer; its next step, all `ASKING`; how many changes its publication makes; and how often it
        published, zero. Of the last row the first word is the state of the random numbers.
    now : float64 [workers]
        When each makes its next step.
    order : int64 [workers, 1 + together × top_k]
        Scratch: the line of each change.
    drawn : int64 [experts]
        Zero: the last token, counted over all workers, that chose an expert of this publication.
    under_way, out : float64 [UNDER_WAY], float64 [4]
        Scratch; zero.
    """
    workers = len(now)
    width = 1 + (experts + EXPERTS_PER_LINE - 1) // EXPERTS_PER_LINE
    arrival, busy, state = line_times[0], line_times[1], work[workers]
    waited, token, published = 0.0, 0, 0
    while published < workers * rounds:
        worker = -1
        for other in range(workers):
            if work[other, 3] < rounds and (worker < 0 or now[other] < now[worker]):
                worker = other
        moment, step, first = now[worker], work[worker, 1], work[worker, 0] * width
        if step == ASKING:
            oldest = token + 1
            count = 1
            order[worker, 0] = 0
            for _ in range(together):
                token += 1
                left = top_k
                while left > 0:
                    expert = _random(state, experts)
                    if drawn[expert] == token:
                        continue  # experts of a token differ
                    if drawn[expert] < oldest:  # the publication's first of it
                        order[worker, count] = 1 + expert // EXPERTS_PER_LINE
                        count += 1
                    drawn[expert] = token
                    left -= 1
            work[worker, 2] = count
            asked = 0
            for i in range(UNDER_WAY):
                under_way[i] = moment
            for i in range(count):
                at = first + order[worker, i]
                if owner[at] != worker:
                    latency = _latency(owner[at], worker, chiplet_cores, socket_cores, latencies)
                    owner[at] = worker
                    arrival[at] = max(under_way[asked % UNDER_WAY], arrival[at]) + latency
                    under_way[asked % UNDER_WAY] = arrival[at]
                    busy[at] += latency
                    asked += 1
            work[worker, 1] = 0
            now[worker] = moment + ahead
            continue
        at = first + order[worker, step]
        if owner[at] != worker:  # it was taken away again
            latency = _latency(owner[at], worker, chiplet_cores, socket_cores, latencies)
            owner[at] = worker
            arrival[at] = max(moment, arrival[at]) + latency
            busy[at] += latency
        have = max(moment, arrival[at])
        waited += have - moment
        work[worker, 1] += 1
        now[worker] = have + changing / work[worker, 2]
        if work[worker, 1] == work[worker, 2]:
            published += 1
            work[worker, 0] = (work[worker, 0] + 1) % layers
            work[worker, 1] = ASKING
            work[worker, 3] += 1
            out[0] = max(out[0], now[worker])
            now[worker] += rest * (1 + JITTER * (_random(state, 2001) - 1000) / 1000)
    out[1] = waited
    for layer in range(layers):
        out[2] = max(out[2], busy[layer * width])
        for line in range(1, width):
            out[3] = max(out[3], busy[layer * width + line])


@inner
def _latency(former: int, worker: int, chiplet_cores: int, socket_cores: int, latencies: Any) -> float:
    """What it costs a worker to take a line from another one, or from nobody."""
    if former == NOBODY:
        return 0.0
    if former // chiplet_cores == worker // chiplet_cores:
        return float(latencies[0])
    if former // socket_cores == worker // socket_cores:
        return float(latencies[1])
    return float(latencies[2])


def simulate(machine: Machine, workers: int, load: Load, tokens: int = 2048) -> Outcome:
    """Let as many workers, each on a core of its own, route so many tokens each."""
    lines = load.layers * (1 + -(-load.experts // EXPERTS_PER_LINE))
    rounds = -(-tokens // load.together)
    total = (load.private + load.between) * load.together
    rest = max(total - load.ahead - load.changing, 0.0)
    work = np.zeros((workers + 1, 4), np.int64)
    work[:workers, 0] = np.arange(workers) * load.layers // workers
    work[:workers, 1] = ASKING
    work[workers, 0] = SEED
    now = rest + total * np.random.default_rng(SEED).random(workers)  # not all at the same moment
    out = np.zeros(4)
    run: Any = run_workers.compiled()
    run(
        load.layers, load.experts, load.top_k, load.together, rounds, rest, load.ahead, load.changing,
        machine.cores_per_chiplet, machine.cores_per_socket,
        np.array([machine.chiplet, machine.socket, machine.across]),
        np.full(lines, NOBODY, np.int64), np.zeros((2, lines)), work, now,
        np.zeros((workers, 1 + load.together * load.top_k), np.int64), np.zeros(load.experts, np.int64),
        np.zeros(UNDER_WAY), out,
    )  # fmt: skip
    end, waited, clock, use = out.tolist()
    routed = workers * rounds * load.together
    return Outcome(routed * 1e6 / end, waited / routed, clock / end, use / end)
