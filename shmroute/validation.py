"""Checks of settings: each raises `ConfigError` with a message that says what is allowed."""

from __future__ import annotations

from shmroute.errors import ConfigError


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError` with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def require_int(name: str, value: object, low: int, high: int) -> None:
    """Raise `ConfigError` unless `value` is an int (not a bool) in [low, high]."""
    require(
        isinstance(value, int) and not isinstance(value, bool) and low <= value <= high,
        f"{name} must be an integer from {low} to {high}, not {value!r}",
    )


def require_float(name: str, value: object, low: float, high: float, *, above: bool = False) -> None:
    """Raise `ConfigError` unless `value` is a finite number in [low, high], or in (low, high] with `above`."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    require(
        number and (low < value if above else low <= value) and value <= high,  # type: ignore[operator]
        f"{name} must be a number in {'(' if above else '['}{low:g}, {high:g}], not {value!r}",
    )
