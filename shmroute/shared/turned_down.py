"""Which predictors the pager has turned down, so that workers neither think nor ask in vain.

One word in the header, beside the pager's identity; 0 at first:

    63          5  4  3  2  1  0
    |     0     |h |g |t |p |a |       bit p: the pager has turned down `Predictor` p

A worker that would ask ahead by predictor p looks at its bit first. While that is set it neither computes what it would
ask for nor asks, but for one time in `PROBE`, which each worker counts for itself: by these probes p can win trust
back, so the pager takes them all.

| who | calls | progress |
|---|---|---|
| the pager's main thread, at its sweeps | `tell` | wait-free: one store |
| any worker | `withholds` | wait-free: one load, and one fetch_add if it withholds |
| anybody | `is_turned_down`, of a word that was read | |

It is a hint, and nothing depends on it: a speculation that is made all the same is a request like any other, and what
one that is withheld would have asked for is demanded later. Linearization points: the pager's store, the worker's load.
Death windows: a dead pager leaves the word as it was, and workers go by it; its successor's first sweep, before it
serves, makes the word anew. A worker that dies between the load and the fetch_add has withheld one that no counter
shows.
"""

from __future__ import annotations

from typing import Final

from numba import types

from shmroute.shared.atomic import WORD, fetch_add, i64_array, load, store
from shmroute.shared.kernel import inner, kernel
from shmroute.shared.metrics import LaneCounter

PROBE: Final = 128
"""Of what a predictor that is turned down would propose, one in so many is tried."""

_WITHHELD: Final = int(LaneCounter.WITHHELD) * WORD


@inner
def is_turned_down(word: int, predictor: int) -> int:
    """1 if a predictor is turned down, else 0."""
    return (word >> predictor) & 1


@kernel(types.void(types.int64, types.int64))
def tell(address: int, word: int) -> None:
    """Make the word say which predictors are turned down."""
    store(address, word)


@kernel(types.boolean(types.int64, types.int64, types.int64, types.int64))
def withholds(address: int, predictor: int, counters: int, turn_at: int) -> bool:
    """Whether a worker leaves a speculation out, which it then counts.

    Parameters
    ----------
    address : int
        Of the word.
    predictor : int
    counters : int
        Address of the worker's shard.
    turn_at : int
        Address of an int64 of this process's own: how many there were while it was turned down. Threads share it
        without a lock: what they make of each other's counts is a probe more or less.
    """
    if is_turned_down(load(address), predictor) == 0:
        return False
    turn = i64_array(turn_at, 1)
    turn[0] += 1
    if turn[0] % PROBE == 0:
        return False
    fetch_add(counters + _WITHHELD, 1)
    return True
