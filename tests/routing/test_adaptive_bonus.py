"""`AdaptiveCacheBonus`: fixed steps towards a hit rate."""

from __future__ import annotations

import pytest

from shmroute import AdaptiveCacheBonus
from shmroute.errors import ConfigError


def test_it_steps_up_below_the_target_and_down_well_above_it() -> None:
    controller = AdaptiveCacheBonus(0.15, target_hit_rate=0.70, learning_rate=2.0)
    assert controller.adjust(0.69) == pytest.approx(0.17)
    assert controller.adjust(0.70) == pytest.approx(0.17)
    assert controller.adjust(0.75) == pytest.approx(0.17)
    assert controller.adjust(0.76) == pytest.approx(0.15)
    assert controller.bonus == pytest.approx(0.15)


def test_the_target_is_seventy_percent_and_a_step_one_hundredth_unless_said() -> None:
    controller = AdaptiveCacheBonus(0.5)
    assert controller.adjust(0.699) == pytest.approx(0.51)
    assert controller.adjust(0.751) == pytest.approx(0.50)


@pytest.mark.parametrize(("hit_rate", "limit"), [(0.0, 1.0), (1.0, 0.0)])
def test_it_stops_at_the_limits(hit_rate: float, limit: float) -> None:
    controller = AdaptiveCacheBonus(0.5, learning_rate=9.0)
    values = [controller.adjust(hit_rate) for _ in range(20)]
    assert values[-1] == limit
    assert all(0.0 <= value <= 1.0 for value in values)


def test_no_measurement_changes_nothing() -> None:
    controller = AdaptiveCacheBonus(0.25)
    assert controller.adjust(None) == 0.25


@pytest.mark.parametrize("bad", [-0.01, 1.01, 70, float("nan"), "0.7", True])
def test_what_is_no_hit_rate_is_refused_and_changes_nothing(bad: object) -> None:
    controller = AdaptiveCacheBonus(0.25)
    with pytest.raises(ConfigError, match=r"hit_rate must be a number in \[0, 1\].*not a percentage"):
        controller.adjust(bad)  # type: ignore[arg-type]
    assert controller.bonus == 0.25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bonus": 1.5}, r"bonus must be a number in \[0, 1\]"),
        ({"bonus": 0.1, "target_hit_rate": 70}, r"target_hit_rate must be a number in \[0, 1\]"),
        ({"bonus": 0.1, "learning_rate": 0}, r"learning_rate must be a number in \(0, 100\]"),
    ],
)
def test_settings_are_checked(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AdaptiveCacheBonus(**arguments)
