"""`Waiters`: the longest waiters come first, whatever their lanes."""

from __future__ import annotations

from shmroute.pager.waiters import Waiters, each_lane
from shmroute.shared.layout import LANE_WAIT
from shmroute.shared.segment import Segment
from shmroute.shared.words import pack_wait


def test_waiters_are_served_in_the_order_of_their_arrival(segment: Segment) -> None:
    waiters = Waiters(segment)

    def wait(lane: int, expert: int | None) -> None:
        word = 0 if expert is None else pack_wait(1, expert)
        segment.write(segment.layout.lane(lane) + LANE_WAIT, word)

    wait(3, 5)
    assert waiters.in_turn() == {13: 3}
    wait(0, 2)
    assert list(waiters.in_turn()) == [13, 10]
    wait(3, None)
    wait(1, 7)
    assert list(waiters.in_turn()) == [10, 15]
    wait(0, 3)  # served, and waiting for another: at the end again
    wait(3, 5)
    assert list(waiters.in_turn()) == [15, 11, 13]
    assert list(each_lane(waiters.lanes_in(1))) == [0, 1, 3]
    assert waiters.lanes_in(0) == 0
    assert sorted(waiters.keys().tolist()) == [11, 13, 15]
