"""The request ring: bounded, many producers, many consumers, one 64-bit entry each, no gap after any death.

An entry's word is (cycle, request); the cycle is the lap in which it was written. The **same CAS** claims an entry
and publishes it, so a producer can never die between the two. Two cursors run ahead of the entries:

- `tail` is the next position to write. It may lag by one behind an entry that is already published: the next
  producer helps it along, so nobody waits for a producer that died after publishing.
- `head` is the next position to read; advancing it is what takes the entry.

With 2^n entries, position p lies in entry ``p mod 2^n`` in lap ``p >> n``, compared modulo 2^32. Both cursors start at
2^n, so entries of lap 0 (all zero) are empty. `head` may pass a lagging `tail` by one, so ``tail - head`` can be -1:
the comparison for FULL is signed. "The ring has work" is `pop`'s own test, never ``head != tail``.

| who | calls | progress |
|---|---|---|
| any worker | `push` | lock-free |
| any pager | `pop` | lock-free |

A full ring refuses the push and loses nothing: what a request stands for is in the expert words, and the sweep finds
it there. The same holds for a damaged ring: a cursor that stays put over an entry of neither of its two possible laps
makes `push` say FULL and `pop` EMPTY, so that no kernel loops for ever.
"""

from __future__ import annotations

from typing import Final

from numba import types

from shmroute.shared.atomic import WORD, cas, load, signed
from shmroute.shared.kernel import inner, kernel
from shmroute.shared.layout import RING_ENTRIES, RING_HEAD, RING_TAIL
from shmroute.shared.words import CYCLE_SHIFT, LOW32, high32, low32

PUSHED: Final = 0
FULL: Final = 1
EMPTY: Final = -1


@inner
def _entry(ring: int, bits: int, position: int) -> int:
    """Address of the entry of a position."""
    return ring + RING_ENTRIES + (position & ((1 << bits) - 1)) * WORD


@inner
def push(ring: int, bits: int, request: int) -> int:
    """Append a request: PUSHED, or FULL if 2^bits are queued."""
    while True:
        tail = load(ring + RING_TAIL)
        address = _entry(ring, bits, tail)
        entry = load(address)
        cycle = (tail >> bits) & LOW32
        if high32(entry) == cycle:
            # Published already, by somebody dead or slow: help the cursor and try the next.
            cas(ring + RING_TAIL, tail, tail + 1)
            continue
        if ((high32(entry) + 1) & LOW32) != cycle:
            if load(ring + RING_TAIL) == tail:
                return FULL  # of no lap that it can be of: damaged. The sweep finds what is not pushed.
            continue  # tail moved on since it was read
        if tail - load(ring + RING_HEAD) >= (1 << bits):
            if load(ring + RING_TAIL) == tail:
                return FULL
            continue
        if cas(address, entry, signed((cycle << CYCLE_SHIFT) | int(request))):  # linearization point
            cas(ring + RING_TAIL, tail, tail + 1)  # whoever fails here was helped
            return PUSHED


@inner
def pop(ring: int, bits: int) -> int:
    """Take the oldest request, or EMPTY."""
    while True:
        head = load(ring + RING_HEAD)
        entry = load(_entry(ring, bits, head))
        cycle = (head >> bits) & LOW32
        if high32(entry) == cycle:
            if cas(ring + RING_HEAD, head, head + 1):  # linearization point
                return low32(entry)
        elif ((high32(entry) + 1) & LOW32) == cycle:
            return EMPTY  # linearization point: the load of the entry
        elif load(ring + RING_HEAD) == head:
            return EMPTY  # of no lap that it can be of: damaged. The sweep finds what is not popped.


@kernel(types.int64(types.int64, types.int64, types.int64))
def ring_push(ring: int, bits: int, request: int) -> int:
    """`push`, from Python."""
    return push(ring, bits, request)


@kernel(types.int64(types.int64, types.int64))
def ring_pop(ring: int, bits: int) -> int:
    """`pop`, from Python."""
    return pop(ring, bits)


@kernel(types.boolean(types.int64, types.int64))
def ring_has_work(ring: int, bits: int) -> bool:
    """Whether a `pop` at this moment would find a request."""
    while True:
        head = load(ring + RING_HEAD)
        entry = load(_entry(ring, bits, head))
        if high32(entry) == ((head >> bits) & LOW32):
            return True
        if load(ring + RING_HEAD) == head:
            return False
