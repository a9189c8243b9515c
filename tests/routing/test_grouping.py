"""A batch's choices, by expert."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from shmroute.routing.grouping import group_by_expert

EXPERTS = 20


def by_definition(choices: Any) -> dict[int, tuple[list[int], list[int]]]:
    """Rows and ranks of each expert, in order of first appearance."""
    found: dict[int, tuple[list[int], list[int]]] = {}
    for row, chosen in enumerate(np.atleast_2d(choices).tolist()):
        for rank, expert in enumerate(chosen):
            rows, ranks = found.setdefault(expert, ([], []))
            rows.append(row)
            ranks.append(rank)
    return found


@given(
    arrays.arrays(
        st.sampled_from([np.int64, np.int32, np.uint8, np.dtype(">i4")]),
        arrays.array_shapes(min_dims=1, max_dims=2, min_side=0, max_side=9),
        elements=st.integers(0, EXPERTS - 1),
    ),
    st.booleans(),
)
def test_groups_are_as_by_definition(choices: Any, fortran: bool) -> None:
    given_choices = np.asfortranarray(choices) if fortran else choices
    given_choices.flags.writeable = False
    ids, groups = group_by_expert(given_choices, EXPERTS)
    expected = by_definition(choices)
    assert ids.tolist() == list(groups) == list(expected)
    for expert, (rows, ranks) in groups.items():
        assert (rows.tolist(), ranks.tolist()) == expected[expert]
        assert rows.dtype == ranks.dtype == np.int64


def test_lists_will_do() -> None:
    assert group_by_expert([3, 1], EXPERTS)[0].tolist() == [3, 1]
    assert group_by_expert([[3, 1], [1, 0]], EXPERTS)[0].tolist() == [3, 1, 0]
    assert group_by_expert([], EXPERTS)[0].tolist() == []


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([0, EXPERTS], f"expert id {EXPERTS} is outside 0 … {EXPERTS - 1}"),
        ([[0, 1], [-1, 2]], "expert id -1 is outside"),
        (np.array([2**64 - 1], np.uint64), "expert id 18446744073709551615 is outside"),
        ([0.5], "must be integers, not float64"),
        ([True], "must be integers, not bool"),
        (3, r"must be \[k\] or \[T, k\], not \[\]"),
        ([[[1]]], r"must be \[k\] or \[T, k\], not \[1, 1, 1\]"),
    ],
)
def test_what_names_no_expert_is_an_error(choices: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_by_expert(choices, EXPERTS)
