"""Each protocol rule, broken: the search finds every one. The table at the end says where, and how soon."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .mutants import MUTANTS
from .mutation import Mutant
from .schedules import decode
from .search import hunt, replay
from .simulation import NOT_DONE
from .strategies import Replay
from .world import run
from .worlds import WORLDS


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
@pytest.mark.timeout(1200)
def test_a_broken_rule_is_found(mutant: Mutant, tell: Callable[[str, str, str, str], None]) -> None:
    kill = hunt(mutant, WORLDS, runs=40_000)
    assert kill.world is not None, f"{mutant.name} survived {kill.runs} schedules: {mutant.rule}"
    tell(mutant.name, kill.world, f"{kill.runs:,}", kill.shown)
    with mutant.applied():
        assert replay(WORLDS[kill.world], kill.schedule).failure is not None, "the schedule does not show it again"
    if not kill.failure.startswith(NOT_DONE):  # that many steps of one thread are too much for any protocol
        assert _stands(kill.world, kill.schedule), "the schedule breaks the unbroken protocol too"


def _stands(world: str, schedule: str) -> bool:
    """Whether the unbroken protocol stands a schedule, as far as it fits: its steps are not all the same."""
    return run(WORLDS[world], Replay(decode(schedule), strict=False, timeouts=False)).failure is None


def test_no_two_mutants_have_one_name() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
