"""Schedules drawn by Hypothesis: a failure shrinks to few deviations, and prints a schedule to replay."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .conftest import STRESS
from .mutants import MUTANTS
from .schedules import decode, encode
from .search import replay
from .strategies import Replay, Scripted
from .world import run
from .worlds import WORLDS

deviations = st.lists(st.tuples(st.integers(0, 40), st.integers(1, 6)), max_size=8)
"""Points to let pass, then which of the alternatives."""


@pytest.mark.parametrize(
    "name", ["ring-two-producers", "ring-of-one", "bell", "leases", "affinity", "one-slot", "takeover"]
)
@settings(max_examples=2000 if STRESS else 120, suppress_health_check=list(HealthCheck))
@given(script=deviations)
def test_everything_holds(name: str, script: list[tuple[int, int]]) -> None:
    outcome = run(WORLDS[name], Scripted(script))
    assert outcome.failure is None, f"{outcome.details}\nreplay {name} '{outcome.schedule}'"


def test_a_failure_shrinks_and_its_schedule_is_replayed() -> None:
    broken = next(mutant for mutant in MUTANTS if mutant.name == "tail before entry")
    shortest: list[list[tuple[int, int]]] = []
    schedules: list[str] = []

    @settings(max_examples=500, database=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(script=deviations)
    def search(script: list[tuple[int, int]]) -> None:
        outcome = run(WORLDS["ring-two-producers"], Scripted(script))
        if outcome.failure is not None:
            shortest.append(script)
            schedules.append(outcome.schedule)
            raise outcome.failure

    with broken.applied():
        with pytest.raises(AssertionError):
            search()
        assert len(shortest[-1]) == 1  # the other producer comes in between, once
        assert replay(WORLDS["ring-two-producers"], schedules[-1]).failure is not None
    assert run(WORLDS["ring-two-producers"], Replay(decode(schedules[-1]), strict=False)).failure is None


@given(decisions=st.lists(st.sampled_from(["a", "b", "c", "A", "B", "~a", "~b"])))
def test_a_schedule_says_what_was_decided(decisions: list[str]) -> None:
    assert decode(encode(decisions)) == decisions


@pytest.mark.parametrize("text", ["1a", "a-", "aé", "~A", "a b"])
def test_what_is_no_schedule_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no schedule"):
        decode(text)
