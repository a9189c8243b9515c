"""All schedules of small worlds within a bound on preemptions and deaths."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .conftest import STRESS
from .search import exhaust
from .worlds import WORLDS

MANY = 2_000_000


@pytest.mark.parametrize(
    ("name", "preemptions", "deaths", "stress_only"),
    [
        ("ring-pair", 3, 0, False),
        ("ring-pair", 3, 1, False),
        ("ring-two-producers", 2, 0, False),
        ("ring-two-producers", 1, 1, False),
        ("ring-two-producers", 3, 1, True),
        ("ring-two-consumers", 2, 0, False),
        ("ring-two-consumers", 3, 1, True),
        ("ring-of-one", 1, 1, False),
        ("ring-of-one", 3, 0, True),
        ("leases", 2, 0, False),
        ("leases", 1, 1, False),
        ("leases", 3, 1, True),
        ("cancellation", 3, 1, False),
        ("residency", 2, 0, False),
        ("residency", 1, 1, False),
        ("residency", 3, 1, True),
        ("bell", 1, 0, False),
        ("bell", 0, 1, False),
        ("bell", 3, 1, True),
        ("bell-buffered", 1, 0, False),
    ],
)
@pytest.mark.timeout(36_000)
def test_no_schedule_within_the_bound_breaks_anything(
    name: str, preemptions: int, deaths: int, stress_only: bool, tell: Callable[[str, str, str, str], None]
) -> None:
    if stress_only and not STRESS:
        return
    report = exhaust(name, WORLDS[name], preemptions=preemptions, deaths=deaths, runs=MANY)
    assert report.found is None, str(report.found)
    assert report.complete or report.runs == MANY
    shown = f"all with ≤ {preemptions} preemptions and ≤ {deaths} deaths"
    tell(shown if report.complete else f"of {shown}", name, f"{report.runs:,}", "")


@pytest.mark.parametrize("name", ["takeover", "takeover-of-one-slot", "one-slot", "shared", "owners-end", "removal"])
def test_whoever_dies_at_whichever_step_everything_holds(name: str, tell: Callable[[str, str, str, str], None]) -> None:
    report = exhaust(name, WORLDS[name], preemptions=0, deaths=1, delays=True, runs=MANY)
    assert report.found is None, str(report.found)
    assert report.complete
    tell("one death at every step", name, f"{report.runs:,}", "")
