"""What is done to a run, from a seed: the same seed gives the same acts in the same order, with the same draws.

When each act happens, and what it hits, also depends on the machine: an act waits until it can be done (a pager is
killed only when a standby waits), and a victim is drawn among those who live.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum


class Lever(Enum):
    """What can be done."""

    KILL_WORKER = "workers killed"
    STOP_WORKER = "workers stopped"
    KILL_PAGER = "pagers killed"
    KILL_STANDBY = "standbys killed"
    HAND_OVER = "pagers told to hand over"
    STOP_PAGER = "rings filled under a stopped pager"
    CORRUPT = "later reads corrupted"
    UNREADABLE = "experts made unreadable"
    DAMAGE = "files cut short"
    HIDE = "files hidden at a takeover"


SHARES = {
    Lever.KILL_WORKER: 12,
    Lever.STOP_WORKER: 2,
    Lever.KILL_PAGER: 2,
    Lever.KILL_STANDBY: 1,
    Lever.HAND_OVER: 1,
    Lever.STOP_PAGER: 1,
    Lever.CORRUPT: 1,
    Lever.UNREADABLE: 1,
    Lever.DAMAGE: 1,
    Lever.HIDE: 1,
}
"""How often each is in a round. Rounds are shuffled, so that none is long in coming."""

LONGEST_PAUSE = 0.5


@dataclass(frozen=True)
class Act:
    """One thing to do.

    Attributes
    ----------
    lever : Lever
    pause : float
        Seconds after the act before it.
    length : float
        Seconds that it lasts, if it is of the kind that lasts.
    draw : float
        0 … 1, for whatever must be chosen.
    round : int
        Counted from 0.
    """

    lever: Lever
    pause: float
    length: float
    draw: float
    round: int


def acts(seed: int) -> Iterator[Act]:
    """All acts of a seed, without end."""
    chance = random.Random(seed)
    number = 0
    while True:
        levers = [lever for lever, share in SHARES.items() for _ in range(share)]
        chance.shuffle(levers)
        for lever in levers:
            yield Act(lever, chance.uniform(0, LONGEST_PAUSE), chance.uniform(0.1, 0.6), chance.random(), number)
        number += 1
