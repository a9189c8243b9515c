"""Bits of words, compiled and interpreted."""

from __future__ import annotations

import numba
from hypothesis import given
from hypothesis import strategies as st

from shmroute.shared.bits import bit_length, count_bits, lowest_bit

compiled_count_bits = numba.njit("int64(int64)")(lambda word: count_bits(word))
compiled_lowest_bit = numba.njit("int64(int64)")(lambda word: lowest_bit(word))
compiled_bit_length = numba.njit("int64(int64)")(lambda word: bit_length(word))


@given(st.integers(-(2**63), 2**63 - 1))
def test_bits_of_any_word_are_counted(word: int) -> None:
    assert count_bits(word) == compiled_count_bits(word) == f"{word & (1 << 64) - 1:b}".count("1")


@given(st.integers(0, 63), st.integers(-(2**63), 2**63 - 1))
def test_the_lowest_bit_is_found(position: int, above: int) -> None:
    word = (above << position + 1 | 1 << position) & (1 << 64) - 1
    word -= (1 << 64) if word >> 63 else 0
    assert lowest_bit(word) == compiled_lowest_bit(word) == position


@given(st.integers(1, 2**63 - 1))
def test_the_length_of_a_positive_number_is_pythons(number: int) -> None:
    assert bit_length(number) == compiled_bit_length(number) == number.bit_length()
