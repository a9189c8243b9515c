"""The classic controller of the cache bonus: fixed steps towards a hit rate, whatever they cost in quality.

When to use it: to reproduce work that steers by hit rate. When not: a hit rate says nothing about what the bonus does
to the model's choices, and a target that the cache cannot reach drives the bonus to its limit. `RouterConfig`'s
``quality_budget`` holds the cost instead, and buys as many hits as that pays for (`shmroute.routing.quality_budget`).
"""

from __future__ import annotations

from typing import Final

from shmroute.errors import ConfigError
from shmroute.validation import require_float

STEP: Final = 0.01
"""What one adjustment moves the bonus by, times the learning rate."""

DEAD_BAND: Final = 0.05
"""The bonus rests while the hit rate is at most so much above the target."""


class AdaptiveCacheBonus:
    """Steers one cache bonus by a hit rate.

    Below the target an adjustment raises the bonus by ``learning_rate * 0.01``; more than 0.05 above it, it lowers the
    bonus by as much; in between the bonus rests. It is always in [0, 1].

    Parameters
    ----------
    bonus : float
        To start with, in [0, 1].
    target_hit_rate : float
        In [0, 1].
    learning_rate : float
        In (0, 100]; at 1 a step is 0.01.

    Raises
    ------
    ConfigError
        If a value is outside its range.

    Examples
    --------
    >>> controller = AdaptiveCacheBonus(0.15, target_hit_rate=0.9)
    >>> round(controller.adjust(0.5), 2)
    0.16
    """

    def __init__(self, bonus: float, target_hit_rate: float = 0.70, learning_rate: float = 1.0) -> None:
        require_float("bonus", bonus, 0, 1)
        require_float("target_hit_rate", target_hit_rate, 0, 1)
        require_float("learning_rate", learning_rate, 0, 100, above=True)
        self._bonus = float(bonus)
        self.target_hit_rate = float(target_hit_rate)
        self.learning_rate = float(learning_rate)

    @property
    def bonus(self) -> float:
        """The bonus as it is now."""
        return self._bonus

    def adjust(self, hit_rate: float | None) -> float:
        """Take one step, and return the new bonus: to be set as a router's `cache_bonus`.

        Parameters
        ----------
        hit_rate : float or None
            In [0, 1], of the time since the last adjustment. None, as metrics have it before the first token, is no
            measurement: nothing changes.

        Raises
        ------
        ConfigError
            If it is anything else; nothing has changed.
        """
        if hit_rate is None:
            return self._bonus
        try:
            require_float("hit_rate", hit_rate, 0, 1)
        except ConfigError as error:
            raise ConfigError(f"{error}; a hit rate is a share of choices, not a percentage") from None
        step = STEP * self.learning_rate
        if hit_rate < self.target_hit_rate:
            self._bonus = min(self._bonus + step, 1.0)
        elif hit_rate > self.target_hit_rate + DEAD_BAND:
            self._bonus = max(self._bonus - step, 0.0)
        return self._bonus
