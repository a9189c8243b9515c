"""`Runtime.smart_prefetch`: the best absent experts by affinity."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from runtimes import Residency, start_clock

from shmroute import PagingDirection, PagingPriority, PagingRequest
from shmroute.errors import RuntimeClosedError
from shmroute.runtime import Runtime
from shmroute.shared.words import ABSENT, PREFETCH, REQUESTED, expert_priority

SCORES = (0.1, 0.9, 0.3, 0.8, 0.5, 0.7, 0.2, 0.5)


def prefetched(*experts: int) -> list[PagingRequest]:
    return [PagingRequest(0, expert, PagingDirection.IN, PagingPriority.PREFETCH) for expert in experts]


@pytest.fixture
def runtime(make_runtime: Callable[..., Runtime]) -> Runtime:
    """Eight experts of one layer, of which 1 and 5 are resident; no pager."""
    runtime = make_runtime(num_layers=1, num_experts=8, slots=4)
    start_clock(runtime, 0, 100, SCORES)
    Residency(runtime).load(0, 1, 5)
    return runtime


def test_the_best_absent_experts_are_requested_best_first(runtime: Runtime) -> None:
    assert runtime.smart_prefetch(0, 3) == prefetched(3, 4, 7)
    residency = Residency(runtime)
    for expert in (3, 4, 7):
        assert residency.state(0, expert) == REQUESTED
        assert expert_priority(residency.word(0, expert)) == PREFETCH
    assert [residency.state(0, expert) for expert in (0, 2, 6)] == [ABSENT] * 3


def test_what_is_requested_already_is_not_requested_again(runtime: Runtime) -> None:
    runtime.prefetch(0, [4])
    assert runtime.smart_prefetch(0, 2) == prefetched(3)
    assert runtime.smart_prefetch(0, 2) == []


def test_more_than_there_are_asks_for_all(runtime: Runtime) -> None:
    assert runtime.smart_prefetch(0, 99) == prefetched(3, 4, 7, 2, 6, 0)


def test_a_lookahead_of_nothing_asks_for_nothing(runtime: Runtime) -> None:
    assert runtime.smart_prefetch(0, 0) == []


@pytest.mark.parametrize("bad", [-1, 1.5, True, None])
def test_what_is_no_lookahead_is_refused(runtime: Runtime, bad: object) -> None:
    with pytest.raises(ValueError, match="lookahead must be an integer, 0 or more"):
        runtime.smart_prefetch(0, bad)  # type: ignore[arg-type]


def test_a_layer_that_is_not_there_is_refused(runtime: Runtime) -> None:
    with pytest.raises(ValueError, match="layer must be an integer from 0 to 0"):
        runtime.smart_prefetch(1, 1)


def test_a_closed_runtime_refuses(runtime: Runtime) -> None:
    runtime.close()
    with pytest.raises(RuntimeClosedError):
        runtime.smart_prefetch(0, 1)
