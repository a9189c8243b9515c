"""The quality budget: workers that charge one layer's account and steer its bonus, and a user who sets it.

Every change of the bonus line is seen as it happens. Checked:

- what a worker adds to the account was summed up since the last step of the search that it knows of;
- all that was added was taken by one step, or is still there: nothing is charged twice, nothing is wiped out;
- each step counts once, and starts from the state that the last one left;
- each step moves the bonus that is there, by `LEAP` at most: what the user set meanwhile is not undone.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import numpy as np

from shmroute.config import RouterConfig, RuntimeConfig
from shmroute.routing.quality_budget import BLOCK_WORDS, LEAP, PERIOD, fill_block, observe
from shmroute.shared import atomic
from shmroute.shared.layout import BONUS_ACCOUNT, BONUS_CONTROL, BONUS_VALUE
from shmroute.shared.words import (
    BONUS_ONE,
    account_tokens,
    control_adjustments,
    control_jumps,
    pack_bonus,
    unpack_bonus,
)

from ..ground import ground
from ..machine import Memory
from ..simulation import Simulation, require
from ..world import World

SET_BY_USER = 40.0


class Line(Memory):
    """Memory that tells a world of what happens to the words of a bonus line."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(simulation)
        self.world: QualityBudget | None = None

    def _tell(self, address: int, former: int, value: int) -> None:
        if self.world is not None:
            self.world.changed(int(address), int(former), int(value))

    def load(self, address: int) -> int:
        value = super().load(address)
        if self.world is not None:
            self.world.seen(int(address), value)
        return value

    def store(self, address: int, value: int) -> None:
        self._tell(address, super().exchange(address, value), value)

    def cas(self, address: int, expected: int, desired: int) -> bool:
        done = super().cas(address, expected, desired)
        if done:
            self._tell(address, expected, desired)
        return done

    def fetch_add(self, address: int, value: int) -> int:
        former = super().fetch_add(address, value)
        self._tell(address, former, former + int(value))
        return former


class QualityBudget(World):
    """Each worker observes the calls in `programs`: (tokens, amount of each, whether one missed)."""

    title = "three workers that charge one account, and a user who sets the bonus"
    config: ClassVar[RuntimeConfig] = RuntimeConfig(
        num_layers=1, num_experts=4, top_k=1, expert_bytes=64, slots=2, max_workers=4,
        router=RouterConfig(cache_bonus=0.5, quality_budget=0.1, budget_measure="changed", metrics=False),
    )  # fmt: skip
    period: ClassVar[int] = 12
    programs: ClassVar[tuple[tuple[tuple[int, float, bool], ...], ...]] = (
        ((4, 0.0, True), (4, 0.0, True), (4, 0.9, False), (4, 0.1, True)),
        ((8, 0.1, True), (8, 0.0, True)),
        ((6, 0.1, True), (6, 0.2, False)),
    )
    memory = Line
    deaths = 2
    lock_free = True

    def populate(self, simulation: Simulation) -> None:
        segment = self._segment = ground(self.config)
        self._simulation = simulation
        self._line = segment.address + segment.layout.bonus
        self._blocks = [np.zeros(BLOCK_WORDS, np.int64) for _ in self.programs]
        self._added = self._taken = self._steps = 0
        self._knows: dict[str, int] = {}  # the jumps that each worker saw last
        self._began: dict[str, int] = {}  # those that it had seen when it began what it sums up
        self._account: dict[str, int] = {}  # the account as it last was after an addition of each one's
        for number, program in enumerate(self.programs):
            fill_block(self._blocks[number], self._line, self.config)
            self._blocks[number][PERIOD] = self.period
            simulation.process(f"worker {number}", partial(self._work, number, program))
        simulation.process("user", self._set, mortal=False)
        machine = atomic._machine
        assert isinstance(machine, Line)
        machine.world = self

    def _work(self, number: int, program: tuple[tuple[int, float, bool], ...]) -> None:
        for tokens, amount, missed in program:
            observe(self._blocks[number].ctypes.data, tokens, int(amount * tokens * BONUS_ONE), missed)
            self._began[self._here()] = self._knows.get(self._here(), 0)

    def _set(self) -> None:
        self._segment.write(self._segment.layout.bonus, pack_bonus(SET_BY_USER))

    def _here(self) -> str:
        assert self._simulation.current is not None
        return self._simulation.current.letter

    # ------------------------------------------------------ what the memory tells

    def seen(self, address: int, value: int) -> None:
        """A worker looks at the control word before it adds to the account."""
        if address == self._line + BONUS_CONTROL and self._simulation.current is not None:
            self._knows[self._here()] = control_jumps(value)

    def changed(self, address: int, former: int, value: int) -> None:
        """A word became another."""
        if self._simulation.current is None:
            return
        if address == self._line + BONUS_ACCOUNT:
            self._charge(former, value)
        elif address == self._line + BONUS_CONTROL:
            self._steps += 1
            counted = control_adjustments(value)
            require(counted == self._steps, f"step {self._steps} is counted as the {counted}th")
        elif address == self._line + BONUS_VALUE and value != pack_bonus(SET_BY_USER):
            before, after = unpack_bonus(former), unpack_bonus(value)
            require(before / LEAP * 0.999 <= after <= before * LEAP * 1.001, f"one step from {before} to {after}")

    def _charge(self, former: int, value: int) -> None:
        here = self._here()
        if value == 0:  # a step takes what its worker saw when it added
            self._taken += account_tokens(self._account[here])
            return
        self._account[here] = value
        self._added += account_tokens(value) - account_tokens(former)
        began, knows = self._began.get(here, 0), self._knows[here]
        require(began == knows, f"added what was summed up since jump {began}, although there is a jump {knows}")

    # ------------------------------------------------------ the end

    def check(self, simulation: Simulation) -> None:
        left = account_tokens(self._segment.read(self._segment.layout.bonus + BONUS_ACCOUNT))
        require(
            self._added == self._taken + left, f"{self._added} tokens were added, {self._taken} taken, {left} are left"
        )
        if simulation.deaths_left == self.deaths:
            require(left < self.period, f"an account of {left} tokens that nobody takes")


class QualityBudgetBatches(QualityBudget):
    title = "the same with batches that cover several periods"
    programs = (
        ((40, 0.9, True), (8, 0.0, True)),
        ((30, 0.0, True), (30, 0.1, False)),
        ((8, 0.0, True), (70, 0.2, True)),
    )
