"""Every world, under random schedules, PCT, single preemptions and single deaths."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .search import thorough
from .worlds import WORLDS

SHORT = {name for name, world in WORLDS.items() if world.lock_free}
"""Worlds of kernels alone: their runs take a fraction of the others' time."""


@pytest.mark.parametrize("name", WORLDS)
@pytest.mark.timeout(3600)
def test_everything_holds(name: str, scaled: Callable[[int], int], tell: Callable[[str, str, str, str], None]) -> None:
    runs = scaled(2000 if name in SHORT else 500)
    done = deaths = 0
    for report in thorough(name, WORLDS[name], runs=runs):
        assert report.found is None, str(report.found)
        done += report.runs
        deaths += report.deaths
    assert deaths > 0 or WORLDS[name].deaths == 0, "nobody ever died"
    tell(WORLDS[name].title[:52], name, f"{done:,}", f"{deaths:,} deaths")
