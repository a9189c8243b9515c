"""Successors: what follows an expert's choice in the next layer, learnt by lessons that may be lost."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from shmroute.shared.atomic import WORD
from shmroute.shared.kernel import load_kernels
from shmroute.shared.metrics import snapshot_words
from shmroute.shared.successors import FIRST, LESSON, RATE, TRAIL_LAYER, learn_choice, new_trail
from shmroute.shared.words import FOLLOW_ONE, SUCCESSORS, follow_expert, follow_share, pack_follow

LAYERS, EXPERTS = 3, 8
ROW = EXPERTS * SUCCESSORS * WORD


class Table:
    """A table of successors, and a worker that learns."""

    def __init__(self, address: int) -> None:
        load_kernels()
        self.address = address
        self.trail = new_trail()

    def choose(self, layer: int, *experts: int, trail: np.ndarray | None = None) -> None:
        chosen = np.array(experts, np.int32)
        memory = self.trail if trail is None else trail
        learn_choice(self.address, ROW, LAYERS, EXPERTS, memory.ctypes.data, layer, chosen.ctypes.data, len(experts))

    def words(self, layer: int, expert: int) -> np.ndarray:
        return np.asarray(snapshot_words(self.address + layer * ROW + expert * SUCCESSORS * WORD, SUCCESSORS))

    def shares(self, layer: int, expert: int) -> dict[int, float]:
        """What follows an expert, and how often."""
        return {
            follow_expert(word) - 1: follow_share(word) / FOLLOW_ONE
            for word in self.words(layer, expert).tolist()
            if word
        }


@pytest.fixture
def table(memory: Callable[[int], int]) -> Table:
    return Table(memory(LAYERS * ROW))


def test_what_always_follows_has_a_share_near_one(table: Table) -> None:
    for _ in range(400 * LESSON):
        table.choose(0, 1, 2)
        table.choose(1, 5, 6)
    for expert in (1, 2):
        assert table.shares(0, expert) == pytest.approx({5: 1.0, 6: 1.0}, abs=0.02)
    assert table.shares(0, 3) == {}


def test_a_share_is_how_often_the_other_follows(table: Table) -> None:
    random = np.random.default_rng(0)
    for _ in range(400 * LESSON):
        table.choose(0, 1)
        table.choose(1, 5 if random.random() < 0.75 else 6)
    shares = table.shares(0, 1)
    assert shares[5] == pytest.approx(0.75, abs=0.3)
    assert shares[5] > shares[6]
    assert shares[5] + shares[6] == pytest.approx(1.0, abs=0.02)


def test_the_last_layer_is_followed_by_the_first_of_the_next_token(table: Table) -> None:
    for _ in range(400 * LESSON):
        table.choose(2, 3)
        table.choose(0, 4)
    assert table.shares(2, 3) == pytest.approx({4: 1.0}, abs=0.02)


def test_a_layer_left_out_teaches_nothing(table: Table) -> None:
    for _ in range(20 * LESSON):
        table.choose(0, 1)
        table.choose(2, 5)
    assert all(not table.words(layer, expert).any() for layer in (0, 1) for expert in range(EXPERTS))


def test_only_so_many_are_remembered_and_newcomers_replace_the_least(table: Table) -> None:
    for follower in (0, 1, 2, 3, 4):
        for _ in range(50 * LESSON):
            table.choose(0, 7)
            table.choose(1, follower)
        shares = table.shares(0, 7)
        assert shares[follower] == pytest.approx(1.0, abs=0.1)
        assert len(shares) == min(follower + 1, SUCCESSORS)


def test_a_newcomer_does_not_displace_what_still_counts(table: Table) -> None:
    for _ in range(200 * LESSON):
        table.choose(0, 7)
        table.choose(1, 0, 1, 2, 3)
    before = set(table.shares(0, 7))
    for _ in range(LESSON):
        table.choose(0, 7)
        table.choose(1, 5)
    assert set(table.shares(0, 7)) == before
    assert FIRST > RATE


def test_workers_learn_one_table_together(table: Table) -> None:
    other = new_trail()
    for _ in range(200 * LESSON):
        table.choose(0, 1)
        table.choose(0, 2, trail=other)
        table.choose(1, 5)
        table.choose(1, 6, trail=other)
    assert set(table.shares(0, 1)) == {5}
    assert set(table.shares(0, 2)) == {6}


@pytest.mark.parametrize("word", [-1, -(1 << 63), pack_follow(EXPERTS + 1, FOLLOW_ONE), pack_follow(1, (1 << 32) - 1)])
def test_damaged_words_are_replaced(table: Table, word: int) -> None:
    words = np.ctypeslib.as_array(
        (np.ctypeslib.ctypes.c_int64 * SUCCESSORS).from_address(table.address + ROW // EXPERTS)
    )
    words[:] = word
    for _ in range(200 * LESSON):
        table.choose(0, 1)
        table.choose(1, 5)
    assert table.shares(0, 1)[5] == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("place", [TRAIL_LAYER, 1, 3])
def test_a_damaged_memory_teaches_no_expert_that_is_none(table: Table, place: int) -> None:
    for value in (-(2**62), -1, 2**62, EXPERTS):
        for _ in range(4 * LESSON):
            table.choose(0, 1)
            table.trail[place] = value
            table.choose(1, 5)
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            assert set(table.shares(layer, expert)) <= {5, 1}
