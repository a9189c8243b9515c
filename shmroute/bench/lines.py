"""What it costs to take a cache line that another core has changed: two pinned partners play ping-pong with a word.

Half of the time of an exchange is what one core waits for a line that the other has just written. It depends on where
the two cores are (the same chiplet, another one, another socket), and in a virtual machine on where its host happens to
run them, which may change at any time: so whatever is compared with it is measured in the same round.
"""

from __future__ import annotations

import time
from typing import Any

from shmroute.bench import kernels
from shmroute.bench.partners import Partner, held
from shmroute.bench.stage import segment_of
from shmroute.runtime import Runtime

EXCHANGES = 10_000


def line_transfer(partners: list[Partner], runtime: Runtime) -> float:
    """Nanoseconds; two partners, on cores of their own, that have joined the runtime (`concurrency.join`)."""
    segment = segment_of(runtime)
    word = segment.layout.pool  # of a slot: nobody uses them where nothing is paged
    segment.write(word, 0)
    pair = partners[:2]
    for side, partner in enumerate(pair):
        partner.begin(exchange, word, side)
    return max(float(partner.result()) for partner in pair)


def exchange(inherited: dict[str, Any], word: int, side: int) -> float:
    """One side of the game; nanoseconds for one way."""
    play, address = kernels.play_ping_pong.compiled(), segment_of(held["runtime"]).address + word
    play(address, side, 0, 1)  # now both are there
    began = time.perf_counter_ns()
    play(address, side, 1, EXCHANGES)
    return (time.perf_counter_ns() - began) / (2 * (EXCHANGES - 1))
