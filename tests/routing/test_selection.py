"""The selection against a sort, for every number of experts and of choices, with ties, gaps and a bonus."""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import types

from shmroute.routing.selection import (
    count_after,
    count_before_by_logit,
    count_resident,
    last_by_logit,
    scratch_length,
    select_raised,
    select_top_k,
)
from shmroute.shared.atomic import COMPILED
from shmroute.shared.kernel import inlined

Row = npt.NDArray[np.float32]
COUNTS = [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 64, 65, 128, 256, 300]
LARGEST = float(np.finfo(np.float32).max)


@inlined
def select(
    logits: int, num_experts: int, bonus: float, snapshot: int, scores: int, ids: int, chosen: int, k: int
) -> int:
    """As the router does it."""
    if bonus != 0.0:
        return select_raised(logits, num_experts, bonus, snapshot, scores, ids, chosen, k)
    return select_top_k(logits, num_experts, scores, ids, chosen, k)


@numba.njit(types.int64(*[types.int64] * 2, types.float64, *[types.int64] * 5), _nrt=False)
def compiled_select(
    logits: int, num_experts: int, bonus: float, snapshot: int, scores: int, ids: int, chosen: int, k: int
) -> int:
    return select(logits, num_experts, bonus, snapshot, scores, ids, chosen, k)


def bitmap(resident: set[int], num_experts: int) -> npt.NDArray[np.int64]:
    """The residency of some experts, as the router sees it."""
    words = np.zeros(-(-num_experts // 64), np.uint64)
    for expert in resident:
        words[expert >> 6] |= np.uint64(1 << (expert & 63))
    return words.view(np.int64)


def choose(logits: Row, k: int, resident: set[int], bonus: float) -> tuple[list[int], int]:
    """What the kernel chooses, and how many logits it found finite."""
    length = scratch_length(len(logits))
    snapshot, scores = bitmap(resident, len(logits)), np.full(length, np.nan)
    ids, chosen = np.full(length, -1, np.int32), np.full(length, -1, np.int32)
    addresses = (array.ctypes.data for array in (snapshot, scores, ids, chosen))
    finite = compiled_select(logits.ctypes.data, len(logits), bonus, *addresses, k)
    return chosen[: min(k, finite)].tolist(), finite


def by_sorting(logits: Row, k: int, resident: set[int], bonus: float) -> tuple[list[int], int]:
    """The same by definition, in float64: best score first, ties to the lower id."""
    finite = [expert for expert in range(len(logits)) if np.isfinite(logits[expert])]
    scores = {expert: float(logits[expert]) + bonus * (expert in resident) for expert in finite}
    return sorted(finite, key=lambda expert: (-scores[expert], expert))[:k], len(finite)


def row_of_kind(kind: str, num_experts: int, source: np.random.Generator) -> Row:
    """Logits that differ, tie, have gaps, or are as close or as large as can be."""
    row = source.normal(size=num_experts).astype(np.float32)
    if kind == "ties":
        row = np.round(row).astype(np.float32)
    elif kind == "equal":
        row[:] = 0.25
    elif kind == "gaps":
        row[source.random(num_experts) < 0.3] = source.choice([np.nan, np.inf, -np.inf])
    elif kind == "none finite":
        row[:] = np.nan
    elif kind == "neighbours":
        row = np.float32(1) + source.integers(0, 3, num_experts).astype(np.float32) * np.float32(2**-23)
    elif kind == "tiny":
        row *= np.float32(1e-30)
    elif kind == "extreme":
        row = source.choice(np.array([LARGEST, -LARGEST, 0.0, -0.0, 1.0], np.float32), num_experts)
    elif kind == "ascending":
        row = np.sort(row)
    return row


KINDS = ["random", "ties", "equal", "gaps", "none finite", "neighbours", "tiny", "extreme", "ascending"]


@pytest.mark.skipif(not COMPILED, reason="the same in Python, by the thousand")
@pytest.mark.parametrize("num_experts", COUNTS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_chosen_are_the_first_of_a_sort_for_every_k(num_experts: int, kind: str) -> None:
    source = np.random.default_rng([num_experts, KINDS.index(kind)])
    for k in range(1, num_experts + 1):
        row = row_of_kind(kind, num_experts, source)
        resident = set(np.flatnonzero(source.random(num_experts) < 0.4).tolist())
        for bonus in (0.0, 0.15, 2.0**-24, 1e6):
            assert choose(row, k, resident, bonus) == by_sorting(row, k, resident, bonus), (k, bonus)


ANY_FLOAT = st.floats(width=32) | st.sampled_from([0.0, -0.0, 1.0, LARGEST, -LARGEST, 1e-45])


@settings(max_examples=300 if COMPILED else 20)
@given(data=st.data(), bonus=st.sampled_from([0.0, 0.5]) | st.floats(0, 1e6))
def test_any_row_is_chosen_from_as_a_sort_would(data: st.DataObject, bonus: float) -> None:
    num_experts = data.draw(st.sampled_from(COUNTS[:14]))
    few = data.draw(st.lists(ANY_FLOAT, min_size=1, max_size=num_experts))
    positions = data.draw(st.lists(st.integers(0, len(few) - 1), min_size=num_experts, max_size=num_experts))
    row = np.array(few, np.float32)[positions]
    k, resident = data.draw(st.integers(1, num_experts)), data.draw(st.sets(st.integers(0, num_experts - 1)))
    assert choose(row, k, resident, bonus) == by_sorting(row, k, resident, bonus)


@settings(max_examples=30)
@given(data=st.data())
def test_interpreted_it_chooses_the_same(data: st.DataObject) -> None:
    num_experts = data.draw(st.sampled_from([3, 16, 17, 70]))
    row = np.array(data.draw(st.lists(ANY_FLOAT, min_size=num_experts, max_size=num_experts)), np.float32)
    k, resident = data.draw(st.integers(1, min(num_experts, 20))), data.draw(st.sets(st.integers(0, num_experts - 1)))
    length, snapshot = scratch_length(num_experts), bitmap(resident, num_experts)
    scores, ids, chosen = np.zeros(length), np.zeros(length, np.int32), np.zeros(length, np.int32)
    addresses = [array.ctypes.data for array in (snapshot, scores, ids, chosen)]
    for bonus in (0.0, 0.15):
        finite = select(row.ctypes.data, num_experts, bonus, *addresses, k)
        assert (chosen[: min(k, finite)].tolist(), finite) == by_sorting(row, k, resident, bonus)


@given(data=st.data())
def test_what_the_bonus_changed_is_what_logits_alone_would_not_have_chosen(data: st.DataObject) -> None:
    count = data.draw(st.sampled_from([9, 16, 20]))
    values = st.lists(st.sampled_from([0.0, -0.0, 1.0, 1.5, 2.0]), min_size=count, max_size=count)
    row = np.array(data.draw(values), np.float32)
    k, resident = data.draw(st.integers(1, count)), data.draw(st.sets(st.integers(0, count - 1)))
    (plain, _), (chosen, _) = by_sorting(row, k, set(), 0.0), by_sorting(row, k, resident, 0.75)
    ids, snapshot = np.array(chosen, np.int32), bitmap(resident, count)
    replaced = len(set(chosen) - set(plain))
    assert count_after(row.ctypes.data, ids.ctypes.data, k, plain[-1]) == replaced
    assert count_resident(snapshot.ctypes.data, ids.ctypes.data, k) == len(set(chosen) & resident)
    order = by_sorting(row, count, set(), 0.0)[0]
    last = last_by_logit(row.ctypes.data, ids.ctypes.data, k)
    assert last == max(chosen, key=order.index)
    before = count_before_by_logit(row.ctypes.data, count, last)
    assert before == order.index(last)
    assert (before == k - 1) == (replaced == 0)
    assert replaced == 1 or before != k


@pytest.mark.skipif(not COMPILED, reason="the same in Python, by the thousand")
@pytest.mark.parametrize("bonus", [2.0**-32, 1e-3, 0.15, 1e3, 1e6])
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e4, 1e30])
def test_rounding_to_float32_hides_no_candidate(bonus: float, scale: float) -> None:
    source = np.random.default_rng(5)
    for _ in range(50):
        row = (source.normal(size=70) * scale).astype(np.float32)
        half = source.random(70) < 0.5
        row[half] = (row[half].astype(np.float64) - bonus).astype(np.float32)  # raised, they are as high as the rest
        resident = set(np.flatnonzero(half).tolist())
        for k in (1, 8, 16):
            assert choose(row, k, resident, bonus) == by_sorting(row, k, resident, bonus)
