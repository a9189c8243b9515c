"""Worker lanes: one for each worker process, named by one identity word that changes hands by CAS.

A lane holds its worker's identity, the layer it routed last, the one expert it waits for, its own bell and its metrics
shard. Its number is its bit in every lease mask.

| who | calls | progress |
|---|---|---|
| any process | `claim` | lock-free |
| the lane's worker | `vacate`, its wait word | wait-free |
| holder of the pager's lock | `reap` | wait-free per word |

A lane is free when its identity word says NOBODY, and then it is clean: no bit in any mask, no wait word, and its
baseline is its shard, so that the next worker begins with counts of 0. Both ways out keep that order: clear first, free
last. So a death during either leaves a lane with a dead identity, and the next reaper does it over. Only the holder of
the pager's lock reaps: a second reaper could clear the bits of the lane's *next* worker, after the first has freed it.

(lane claim / header state): a worker claims its lane, then loads the header's state; whoever removes a segment because
nobody uses it stores the state, then loads the lanes once more (`claim_if_unused`). One sees the other.
"""

from __future__ import annotations

from numba import types

from shmroute.shared.atomic import WORD, cas, load, store
from shmroute.shared.experts import clear_lane
from shmroute.shared.identity import is_dead, same_process
from shmroute.shared.kernel import inner, kernel
from shmroute.shared.layout import LANE_BASELINE, LANE_IDENTITY, LANE_SHARD, LANE_WAIT
from shmroute.shared.metrics import LANE_SHARD_WORDS
from shmroute.shared.segment import Segment
from shmroute.shared.words import (
    NOBODY,
    identity_generation,
    identity_pid,
    identity_start,
    identity_state,
    pack_identity,
)


@kernel(types.int64(types.int64, types.int64, types.int64, types.int64))
def claim(lanes: int, lane_bytes: int, count: int, identity: int) -> int:
    """Take a free lane for an identity (its generation is the lane's own): the lane, or -1."""
    for lane in range(count):
        address = lanes + lane * lane_bytes + LANE_IDENTITY
        word = load(address)
        if identity_state(word) != NOBODY:
            continue
        mine = pack_identity(
            identity_state(identity), identity_generation(word), identity_start(identity), identity_pid(identity)
        )
        if cas(address, word, mine):  # linearization point
            return lane
    return -1


@inner
def _free(address: int) -> None:
    """Name nobody, in the next generation. The caller owns the word."""
    word = load(address)
    store(address, pack_identity(NOBODY, identity_generation(word) + 1, 0, 0))


@inner
def _copy_words(source: int, target: int, count: int) -> None:
    """Copy shared words whose target has one writer."""
    for i in range(count):
        store(target + i * WORD, load(source + i * WORD))


@kernel(types.void(types.int64, types.int64, types.int64, types.int64, types.int64))
def vacate(lane_address: int, experts: int, row_bytes: int, num_layers: int, bit: int) -> None:
    """Clear everything that a lane holds, then free it.

    Only its own worker, or the holder of the pager's lock once that worker is dead, may call this.
    """
    clear_lane(experts, row_bytes, num_layers, bit)
    store(lane_address + LANE_WAIT, 0)
    _copy_words(lane_address + LANE_SHARD, lane_address + LANE_BASELINE, LANE_SHARD_WORDS)
    _free(lane_address + LANE_IDENTITY)


def lane_identities(segment: Segment) -> dict[int, int]:
    """The identity word of each lane that names somebody, dead or alive."""
    found = {}
    for lane in range(segment.config.max_workers):
        word = segment.read(segment.layout.lane(lane) + LANE_IDENTITY)
        if identity_state(word) != NOBODY:
            found[lane] = word
    return found


def free_lane(segment: Segment, lane: int, identity: int) -> bool:
    """`vacate` a lane if it still bears this very identity word, generation included; whether it did.

    Between finding out that a worker has ended and this call, the worker may have left its lane itself (before it
    ended), and another may have taken it. If the word is still that of a dead process it cannot change any more: the
    dead do not vacate, and only the holder of the pager's lock frees for them.
    """
    layout = segment.layout
    if segment.read(layout.lane(lane) + LANE_IDENTITY) != identity:
        return False
    vacate(
        segment.address + layout.lane(lane),
        segment.address + layout.experts,
        layout.row_bytes,
        layout.num_layers,
        1 << lane,
    )
    return True


def reap(segment: Segment) -> int:
    """Free the lanes of all dead workers. The caller holds the pager's lock.

    Returns
    -------
    int
        How many were freed.
    """
    dead = {lane: identity for lane, identity in lane_identities(segment).items() if is_dead(identity)}
    return sum(free_lane(segment, lane, identity) for lane, identity in dead.items())


def free_own_leftovers(segment: Segment, identity: int) -> None:
    """Free a lane that bears this process's own identity from before an ``execv``."""
    for lane, holder in lane_identities(segment).items():
        if same_process(holder, identity):
            free_lane(segment, lane, holder)


def live_lanes(segment: Segment) -> list[int]:
    """The lanes whose worker is alive."""
    return [lane for lane, identity in lane_identities(segment).items() if not is_dead(identity)]
