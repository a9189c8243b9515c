"""`Loader`: threads that read experts into buffers, whatever the source does."""

from __future__ import annotations

import threading
import time

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from shmroute.pager.loader import Load, Loader, checksum_word
from shmroute.shared.words import URGENT
from shmroute.sources.synthetic import SyntheticSource

PATIENCE = 30.0


class Source(SyntheticSource):
    """Two layers of four experts; reads of expert 3 raise, those of expert 2 wait for a gate."""

    def __init__(self, error: BaseException | None = None) -> None:
        super().__init__(2, 4, 16, 16)
        self.error = error
        self.opened = threading.Event()
        self.dropped: list[tuple[int, int]] = []

    def read_into(self, layer: int, expert: int, buffer: memoryview) -> None:
        if expert == 2:
            assert self.opened.wait(PATIENCE)
        if expert == 3 and self.error is not None:
            raise self.error
        super().read_into(layer, expert, buffer)

    def drop_page_cache(self, layer: int, expert: int) -> None:
        self.dropped.append((layer, expert))


def load_of(source: Source, layer: int, expert: int) -> Load:
    return Load(layer, expert, 0, URGENT, memoryview(bytearray(source.geometry.expert_bytes)))


def collect(loader: Loader, count: int) -> list[Load]:
    deadline = time.monotonic() + PATIENCE
    loads: list[Load] = []
    while len(loads) < count:
        assert time.monotonic() < deadline
        loads += loader.completed()
        time.sleep(0.001)
    return loads


def test_a_load_brings_the_bytes_their_checksum_and_its_times() -> None:
    source, called = Source(), []
    loader = Loader(source, 1, True, lambda: called.append(1))
    loader.submit(load_of(source, 1, 0))
    assert loader.in_flight == 1
    (load,) = collect(loader, 1)
    expected = bytearray(source.geometry.expert_bytes)
    source.read_into(1, 0, memoryview(expected))
    assert bytes(load.buffer) == bytes(expected)
    assert load.error is None
    assert load.checksum == checksum_word(memoryview(expected))
    assert 0 < load.began_ns <= load.ended_ns
    assert source.dropped == [(1, 0)]
    loader.close()
    assert called == [1]


def test_pages_are_dropped_only_if_asked() -> None:
    source = Source()
    loader = Loader(source, 1, False, lambda: None)
    loader.submit(load_of(source, 0, 0))
    collect(loader, 1)
    loader.close()
    assert source.dropped == []


def test_a_load_does_not_fail_for_advice_that_the_kernel_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source()

    def refuse(layer: int, expert: int) -> None:
        raise OSError(29, "Illegal seek")

    monkeypatch.setattr(source, "drop_page_cache", refuse)
    loader = Loader(source, 1, True, lambda: None)
    loader.submit(load_of(source, 0, 0))
    assert [load.error for load in collect(loader, 1)] == [None]
    loader.close()


def test_a_load_is_under_way_until_it_is_collected() -> None:
    source = Source()
    loader = Loader(source, 2, True, lambda: None)
    loader.submit(load_of(source, 0, 0))
    deadline = time.monotonic() + PATIENCE
    while not loader.has_completed:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert (loader.idle, loader.in_flight) == (1, 1)
    assert len(loader.completed()) == 1
    assert (loader.idle, loader.in_flight, loader.has_completed) == (2, 0, False)
    loader.close()


def test_a_slow_load_does_not_hold_up_the_other_thread() -> None:
    source = Source()
    loader = Loader(source, 2, True, lambda: None)
    for expert in (2, 0):
        loader.submit(load_of(source, 0, expert))
    assert [load.expert for load in collect(loader, 1)] == [0]
    source.opened.set()
    assert [load.expert for load in collect(loader, 1)] == [2]
    loader.close()


@pytest.mark.parametrize(
    "error", [OSError(5, "disk"), RuntimeError("?"), SystemExit(1), KeyboardInterrupt(), GeneratorExit(), MemoryError()]
)
def test_whatever_the_source_raises_ends_the_load_and_not_the_thread(error: BaseException) -> None:
    source = Source(error)
    loader = Loader(source, 1, True, lambda: None)
    loader.submit(load_of(source, 0, 3))
    assert [load.error for load in collect(loader, 1)] == [error]
    loader.submit(load_of(source, 0, 1))
    assert [load.error for load in collect(loader, 1)] == [None]
    loader.close()


def test_closing_waits_for_the_load_under_way() -> None:
    source = Source()
    loader = Loader(source, 1, True, lambda: None)
    loader.submit(load_of(source, 0, 2))
    closer = threading.Thread(target=loader.close)
    closer.start()
    closer.join(0.05)
    assert closer.is_alive()
    source.opened.set()
    closer.join(PATIENCE)
    assert [load.error for load in loader.completed()] == [None]
    assert not any(thread.is_alive() for thread in loader._threads)


@given(st.binary(max_size=64))
def test_a_checksum_is_a_signed_word_with_the_digests_bits_and_never_zero(data: bytes) -> None:
    word = checksum_word(memoryview(data))
    assert -(1 << 63) <= word < 1 << 63
    assert word != 0
    assert word & (1 << 64) - 1 == (xxhash.xxh3_64_intdigest(data) or 1)


def test_a_digest_of_zero_is_not_mistaken_for_no_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xxhash, "xxh3_64_intdigest", lambda data: 0)
    assert checksum_word(memoryview(b"")) == 1
