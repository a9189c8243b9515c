"""The ring and the bell: in a kernel, from Python, and between two processes, beside other ways to pass a message."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np

from shmroute.bench import kernels
from shmroute.bench.concurrency import cpus_of
from shmroute.bench.measuring import Contestant, Loop, contest, tail
from shmroute.bench.partners import Partner
from shmroute.bench.report import Table, table
from shmroute.bench.ring_peers import PEERS, Endpoint, RingAndBell
from shmroute.bench.stage import Bench, routing_runtime, segment_of
from shmroute.errors import ShmrouteError
from shmroute.runtime import Runtime
from shmroute.shared.layout import HEADER_BELL
from shmroute.shared.ring import ring_pop, ring_push

SUBJECT = "ring + bell"

PAUSE = 0.0004
"""Seconds between messages, for the receiver to fall asleep again."""

MESSAGES = 20
"""Handed over in one sample."""

TIMEOUT = 5.0


def measure(bench: Bench) -> Iterator[Table]:
    """All tables of the ring."""
    with routing_runtime(64, 6) as runtime:  # its ring is as large as its table of experts
        yield _in_a_kernel(bench, runtime)
    with ExitStack() as stack:
        runtime = stack.enter_context(routing_runtime(64, 6))
        endpoints: dict[str, Endpoint] = {SUBJECT: RingAndBell(runtime)}
        stack.callback(endpoints[SUBJECT].remove)
        for name, make in PEERS.items():
            try:
                endpoints[name] = make(runtime.name)
            except (ImportError, OSError) as error:
                bench.absent[name] = str(error)
            else:
                stack.callback(endpoints[name].remove)
        yield _by_oneself(bench, endpoints)
    with ExitStack() as stack:
        runtime = stack.enter_context(routing_runtime(64, 6))
        endpoints = {SUBJECT: RingAndBell(runtime)}
        stack.callback(endpoints[SUBJECT].remove)
        for name, make in PEERS.items():
            if name not in bench.absent:
                endpoints[name] = make(f"{runtime.name}-two")
                stack.callback(endpoints[name].remove)
        yield _handed_over(bench, endpoints)


def _in_a_kernel(bench: Bench, runtime: Runtime) -> Table:
    segment = segment_of(runtime)
    ring, bits, bell = segment.address + segment.layout.ring, segment.layout.ring_bits, segment.address + HEADER_BELL
    pair, fill, empty = (loop.compiled() for loop in (kernels.push_and_pop, kernels.fill, kernels.empty))
    listen, load = kernels.listen_many.compiled(), kernels.load_many.compiled()
    size = 1 << bits

    def push_alone(count: int) -> None:
        for _ in range(count):
            fill(ring, bits, size)
            empty(ring, bits, size)

    def from_python(count: int) -> None:
        for _ in range(count):
            ring_push(ring, bits, 7)
            ring_pop(ring, bits)

    seconds = bench.scale.loop_seconds
    contestants = [
        Contestant("push and pop, in a kernel", Loop(lambda count: pair(ring, bits, count), seconds)),
        Contestant(f"… {size} pushes, then {size} pops", Loop(push_alone, seconds, per=size)),
        Contestant("… from Python: ring_push, ring_pop", Loop(from_python, seconds)),
        Contestant("look whether the bell wants ringing", Loop(lambda count: listen(bell, count), seconds)),
        Contestant("one atomic load, the least there is", Loop(lambda count: load(bell, count), seconds)),
        Contestant("collections.deque, in one process", Loop(_deque_loop(), seconds)),
    ]
    return table("ring/kernel", "one request in and out of the ring", "ns", contest(contestants, bench.scale.rounds))


def _deque_loop() -> Callable[[int], None]:
    queue: deque[int] = deque()

    def run(count: int) -> None:
        for _ in range(count):
            queue.append(7)
            queue.popleft()

    return run


def _by_oneself(bench: Bench, endpoints: dict[str, Endpoint]) -> Table:
    contestants = []
    for name, endpoint in endpoints.items():
        receive = endpoint.receiver()  # first: some senders need somebody to connect to
        contestants.append(
            Contestant(name, Loop(_send_and_receive(endpoint.sender(), receive), bench.scale.loop_seconds, waits=True))
        )
    return table(
        "ring/message", "one message, sent and received by one process from Python", "ns",
        contest(contestants, bench.scale.rounds), note="nobody has to be woken",
    )  # fmt: skip


def _send_and_receive(send: Callable[[int], object], receive: Callable[[float], bool]) -> Callable[[int], None]:
    def run(count: int) -> None:
        for _ in range(count):
            send(7)
            while not receive(TIMEOUT):
                pass

    return run


# ---------------------------------------------------------- between two processes


def _handed_over(bench: Bench, endpoints: dict[str, Endpoint]) -> Table:
    cores = cpus_of(bench)
    with Partner(cores[1 % len(cores)], {"endpoints": endpoints}) as partner:
        opened, contestants = {}, []
        for name, endpoint in endpoints.items():
            try:
                partner.call(open_receiver, name)
                opened[name] = endpoint.sender()
            except (ShmrouteError, OSError) as error:
                bench.absent[f"{name}, between processes"] = str(error)
                continue
            delays: list[np.ndarray[Any, np.dtype[np.int64]]] = []
            contestants.append(
                Contestant(name, partial(_hand_over, partner, name, opened[name], delays), partial(_tail, delays))
            )
        results = contest(contestants, bench.scale.rounds)
        partner.call(close_receivers)
    return table(
        "ring/handover", "one message to a process that sleeps until it comes", "µs", results,
        note=f"from before the send to after the receive, one clock for both; {MESSAGES} messages in a sample",
    )  # fmt: skip


def _hand_over(
    partner: Partner, name: str, send: Callable[[int], object], delays: list[np.ndarray[Any, np.dtype[np.int64]]]
) -> float:
    partner.begin(receive_times, name, MESSAGES)
    sent = []
    for number in range(MESSAGES):
        time.sleep(PAUSE)
        sent.append(time.monotonic_ns())
        send(number)
    delays.append(np.array(partner.result()) - np.array(sent))
    return float(np.median(delays[-1])) / 1000


def _tail(delays: list[np.ndarray[Any, np.dtype[np.int64]]]) -> dict[str, float]:
    return tail(np.concatenate(delays[1:] or delays) / 1000)


_receivers: dict[str, Callable[[float], bool]] = {}
"""Of the partner process."""


def open_receiver(inherited: dict[str, Any], name: str) -> None:
    """Be the one who receives from an endpoint."""
    _receivers[name] = inherited["endpoints"][name].receiver()


def receive_times(inherited: dict[str, Any], name: str, count: int) -> list[int]:
    """Receive so many messages; the moment of each (CLOCK_MONOTONIC)."""
    receive, clock = _receivers[name], time.monotonic_ns
    deadline = clock() + int(TIMEOUT * 1e9) * 4
    times: list[int] = []
    while len(times) < count:
        if receive(TIMEOUT):
            times.append(clock())
        elif clock() > deadline:
            raise TimeoutError(f"{len(times)} of {count} messages came over {name}")
    return times


def close_receivers(inherited: dict[str, Any]) -> None:
    """Let go of all endpoints."""
    _receivers.clear()
    for endpoint in inherited["endpoints"].values():
        endpoint.remove()
