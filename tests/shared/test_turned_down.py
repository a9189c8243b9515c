"""The word by which the pager tells workers which predictors it has turned down."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmroute.shared.atomic import WORD
from shmroute.shared.kernel import load_kernels
from shmroute.shared.metrics import LANE_COUNTERS, LaneCounter, Predictor, snapshot_words
from shmroute.shared.turned_down import PROBE, is_turned_down, tell, withholds

WORDS = st.integers(-(2**63), 2**63 - 1)


class Worker:
    """Its lane's counters, and the word."""

    def __init__(self, address: int) -> None:
        load_kernels()
        self.word, self._counters = address, address + WORD
        self._turn = np.zeros(1, np.int64)

    def withholds(self, predictor: Predictor) -> bool:
        return bool(withholds(self.word, predictor, self._counters, self._turn.ctypes.data))

    @property
    def counted(self) -> dict[str, int]:
        words = snapshot_words(self._counters, LANE_COUNTERS)
        return {counter.name: int(words[counter]) for counter in LaneCounter if words[counter]}


@pytest.fixture
def worker(memory: Callable[[int], int]) -> Worker:
    return Worker(memory((1 + LANE_COUNTERS) * WORD))


def test_nothing_is_withheld_until_somebody_is_turned_down(worker: Worker) -> None:
    assert not any(worker.withholds(predictor) for predictor in Predictor for _ in range(2 * PROBE))
    assert worker.counted == {}


def test_of_what_is_turned_down_all_but_probes_are_withheld_and_counted(worker: Worker) -> None:
    tell(worker.word, 1 << Predictor.GATE)
    assert [worker.withholds(Predictor.GATE) for _ in range(3 * PROBE)].count(False) == 3
    assert worker.counted == {"WITHHELD": 3 * PROBE - 3}
    assert not any(worker.withholds(Predictor.TRANSITIONS) for _ in range(PROBE))
    tell(worker.word, 0)
    assert not any(worker.withholds(Predictor.GATE) for _ in range(PROBE))
    assert worker.counted == {"WITHHELD": 3 * PROBE - 3}


def test_each_worker_counts_its_own_probes(worker: Worker, memory: Callable[[int], int]) -> None:
    tell(worker.word, 1 << Predictor.GATE)
    other = Worker(memory((1 + LANE_COUNTERS) * WORD))
    tell(other.word, 1 << Predictor.GATE)
    for _ in range(PROBE - 1):
        assert worker.withholds(Predictor.GATE)
    assert other.withholds(Predictor.GATE)
    assert not worker.withholds(Predictor.GATE)


@given(word=WORDS)
def test_each_predictor_has_a_bit_in_any_word(word: int) -> None:
    bits = [is_turned_down(word, predictor) for predictor in Predictor]
    assert bits == [(word % 2**64) >> predictor & 1 for predictor in Predictor]
