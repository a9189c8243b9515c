"""The atomic operations: the compiled body and the interpreted one do the same."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numba
import pytest
from numba import types

from shmroute.shared import atomic
from shmroute.shared.atomic import cas, exchange, fetch_add, fetch_and, fetch_or, load, signed, store

EDGES = (0, 1, -1, 2**31, -(2**31), 2**63 - 1, -(2**63))
Operation = Callable[[int, int], int]


def compiled(*signature: types.Type) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Compile a test's own kernel, without the package's cache."""
    return numba.njit(types.int64(*signature), nogil=True, _nrt=False)  # type: ignore[no-any-return]


@compiled(types.int64)
def do_load(address: int) -> int:
    return load(address)


@compiled(types.int64, types.int64)
def do_store(address: int, value: int) -> int:
    store(address, value)
    return 0


@compiled(types.int64, types.int64)
def do_exchange(address: int, value: int) -> int:
    return exchange(address, value)


@compiled(types.int64, types.int64, types.int64)
def do_cas(address: int, expected: int, desired: int) -> int:
    return 1 if cas(address, expected, desired) else 0


@compiled(types.int64, types.int64)
def do_fetch_add(address: int, value: int) -> int:
    return fetch_add(address, value)


@compiled(types.int64, types.int64)
def do_fetch_and(address: int, value: int) -> int:
    return fetch_and(address, value)


@compiled(types.int64, types.int64)
def do_fetch_or(address: int, value: int) -> int:
    return fetch_or(address, value)


@compiled(types.int64, types.int64)
def add_many(address: int, times: int) -> int:
    for _ in range(times):
        fetch_add(address, 1)
    return 0


@compiled(types.int64, types.int64)
def increment_many(address: int, times: int) -> int:
    done = 0
    while done < times:
        word = load(address)
        if cas(address, word, word + 1):
            done += 1
    return 0


@pytest.mark.parametrize("value", EDGES)
def test_what_one_form_stores_the_other_loads(memory: Callable[[int], int], value: int) -> None:
    address = memory(8)
    do_store(address, value)
    assert load(address) == value
    store(address, 0)
    store(address, value)
    assert do_load(address) == value


@pytest.mark.parametrize("operand", EDGES)
@pytest.mark.parametrize("word", EDGES)
@pytest.mark.parametrize(
    ("interpreted_form", "compiled_form", "meaning"),
    [
        (exchange, do_exchange, lambda word, operand: operand),
        (fetch_add, do_fetch_add, lambda word, operand: word + operand),
        (fetch_and, do_fetch_and, lambda word, operand: word & operand),
        (fetch_or, do_fetch_or, lambda word, operand: word | operand),
    ],
    ids=["exchange", "fetch_add", "fetch_and", "fetch_or"],
)
def test_both_forms_return_the_former_word_and_leave_the_same(
    memory: Callable[[int], int],
    interpreted_form: Operation,
    compiled_form: Operation,
    meaning: Operation,
    word: int,
    operand: int,
) -> None:
    address = memory(8)
    for form in (interpreted_form, compiled_form):
        store(address, word)
        assert form(address, operand) == word
        assert load(address) == signed(meaning(word, operand))


@pytest.mark.parametrize("word", EDGES)
@pytest.mark.parametrize("expected", EDGES)
def test_cas_replaces_exactly_the_expected_word(memory: Callable[[int], int], word: int, expected: int) -> None:
    address = memory(8)
    for form in (cas, do_cas):
        store(address, word)
        assert bool(form(address, expected, 42)) == (word == expected)
        assert load(address) == (42 if word == expected else word)


@pytest.mark.parametrize("kernel", [add_many, increment_many])
def test_threads_in_kernels_lose_no_addition(memory: Callable[[int], int], kernel: Operation) -> None:
    address, times = memory(8), 200_000 if atomic.COMPILED else 300
    threads = [threading.Thread(target=kernel, args=(address, times)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert load(address) == 2 * times


@pytest.mark.parametrize(("value", "same_bits"), [(2**63, -(2**63)), (2**64 - 1, -1), (-1, -1), (2**64 + 5, 5)])
def test_signed_keeps_the_low_64_bits(value: int, same_bits: int) -> None:
    assert signed(value) == same_bits


def test_the_compiled_clock_is_the_interpreted_one() -> None:
    @compiled()
    def now() -> int:
        return atomic.monotonic_ns()

    before = atomic.monotonic_ns()
    between = now()
    assert before <= between <= atomic.monotonic_ns()


def test_arrays_at_addresses_are_the_memory_there(memory: Callable[[int], int]) -> None:
    @compiled(types.int64)
    def fill(address: int) -> int:
        floats = atomic.f32_array(address, 2)
        doubles = atomic.f64_array(address + 8, 1)
        small = atomic.i32_array(address + 16, 2)
        large = atomic.i64_array(address + 24, 1)
        floats[1], doubles[0], small[1], large[0] = 1.5, -2.5, -3, -4
        return len(floats) + len(doubles) + len(small) + len(large)

    address = memory(32)
    assert fill(address) == 6
    assert atomic.f32_array(address, 2).tolist() == [0, 1.5]
    assert atomic.f64_array(address + 8, 1).tolist() == [-2.5]
    assert atomic.i32_array(address + 16, 2).tolist() == [0, -3]
    assert atomic.i64_array(address + 24, 1).tolist() == [-4]
