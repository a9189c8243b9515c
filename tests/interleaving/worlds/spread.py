"""The spread of a layer: whatever workers add to the running mean at once is in it, each call whole or not at all."""

from __future__ import annotations

import itertools
from functools import partial
from typing import ClassVar

from shmroute.routing.spread import add_spreads
from shmroute.shared.layout import BONUS_SPREAD
from shmroute.shared.words import SPREAD_ONE_BITS, spread_count, spread_mean

from ..ground import ground
from ..simulation import Simulation, require
from ..world import World
from .affinity import settings

Call = tuple[int, float]
"""Tokens, and the sum of their spreads."""


class Spread(World):
    """Each process adds the calls of one of `programs`, one after the other."""

    title = "three workers that add to the mean spread of one layer"
    programs: ClassVar[tuple[tuple[Call, ...], ...]] = (((1, 3.0), (2, 1.0)), ((4, 20.0),), ((8, 2.0), (16, 64.0)))
    deaths = 2
    lock_free = True

    def populate(self, simulation: Simulation) -> None:
        segment = self._segment = ground(settings(0.75, 0.0625, 0.875))
        self._address = segment.address + segment.layout.bonus + BONUS_SPREAD
        self._begun: list[Call] = []
        self._done: list[Call] = []
        for number, program in enumerate(self.programs):
            simulation.process(f"worker {number}", partial(self._follow, program))

    def _follow(self, program: tuple[Call, ...]) -> None:
        for tokens, total in program:
            self._begun.append((tokens, total))
            add_spreads(self._address, total, tokens)
            self._done.append((tokens, total))

    def check(self, simulation: Simulation) -> None:
        word = self._segment.read(self._address - self._segment.address)
        doubtful = [call for call in self._begun if call not in self._done]
        rounding = len(self._begun) * 2.0**-SPREAD_ONE_BITS
        for count in range(len(doubtful) + 1):
            for more in itertools.combinations(doubtful, count):
                calls = [*self._done, *more]
                tokens = sum(call[0] for call in calls)
                mean = sum(call[1] for call in calls) / max(tokens, 1)
                if spread_count(word) == tokens and abs(spread_mean(word) - mean) <= rounding:
                    return
        require(False, f"{spread_count(word)} tokens of mean {spread_mean(word)}, after {self._done} and {doubtful}")
