"""`Loader`: threads that read experts into buffers, whatever the source does."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from shmroute.pager.loader import AT_HAND, Checksum, Load, Loader
from shmroute.pager.queue import AWAITED, QueueEntry
from shmroute.shared.words import NORMAL, URGENT
from shmroute.sources.synthetic import SyntheticSource

PATIENCE = 30.0


class Source(SyntheticSource):
    """Two layers of four experts; reads of expert 3 raise, those of expert 2 wait for a gate."""

    def __init__(self, error: BaseException | None = None) -> None:
        super().__init__(2, 4, 16, 16)
        self.error = error
        self.opened = threading.Event()
        self.dropped: list[tuple[int, int]] = []

    def read_into(
        self, layer: int, expert: int, buffer: memoryview, filled: Callable[[int, int], object] | None = None
    ) -> None:
        if expert == 2:
            assert self.opened.wait(PATIENCE)
        if expert == 3 and self.error is not None:
            raise self.error
        super().read_into(layer, expert, buffer, filled)

    def drop_page_cache(self, layer: int, expert: int) -> None:
        self.dropped.append((layer, expert))


def load_of(source: Source, layer: int, expert: int, priority: int = URGENT) -> Load:
    buffer = memoryview(bytearray(source.geometry.expert_bytes))
    return Load(4 * layer + expert, layer, expert, 0, priority, buffer, QueueEntry(priority, 0.0, 0))


def loader_of(
    source: Source,
    threads: int = 1,
    *,
    most: int = 0,
    drop: bool = True,
    begin: Callable[[Load], bool] = lambda load: True,
    publish: Callable[[Load], None] = lambda load: None,
    when_done: Callable[[Load], None] = lambda load: None,
) -> Loader:
    return Loader(source, threads, most, drop, begin, publish, when_done)


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def collect(loader: Loader, count: int) -> list[Load]:
    deadline = time.monotonic() + PATIENCE
    loads: list[Load] = []
    while len(loads) < count:
        assert time.monotonic() < deadline
        loads += loader.completed()
        time.sleep(0.001)
    return loads


def test_a_load_brings_the_bytes_their_checksum_and_its_times() -> None:
    source = Source()
    called: list[Load] = []
    loader = loader_of(source, when_done=called.append)
    loader.submit(load_of(source, 1, 0))
    assert loader.in_flight == 1
    (load,) = collect(loader, 1)
    expected = bytearray(source.geometry.expert_bytes)
    source.read_into(1, 0, memoryview(expected))
    assert bytes(load.buffer) == bytes(expected)
    assert load.error is None
    assert load.checksum == word_of(expected)
    assert 0 < load.began_ns <= load.ended_ns
    loader.close()
    assert source.dropped == [(1, 0)]
    assert called == [load]


def test_a_load_is_published_by_its_thread_before_anybody_is_told_that_it_ended() -> None:
    events: list[str] = []
    loader = loader_of(
        Source(OSError(5, "disk")),
        publish=lambda load: events.append(f"{load.expert} published in {threading.current_thread().name}"),
        when_done=lambda load: events.append(f"{load.expert} done"),
    )
    for expert in (0, 3):
        loader.submit(load_of(loader._source, 0, expert))  # type: ignore[arg-type]
        collect(loader, 1)
    loader.close()
    assert events == ["0 published in shmroute-io-0", "0 done", "3 done"]


def test_what_fails_in_publishing_is_raised_in_the_main_thread() -> None:
    def publish(load: Load) -> None:
        raise RuntimeError("no such semaphore")

    source = Source()
    loader = loader_of(source, publish=publish)
    loader.submit(load_of(source, 0, 0))
    wait_until(lambda: loader._fault)
    with pytest.raises(RuntimeError, match="no such semaphore"):
        loader.completed()
    loader.close()


def test_a_load_that_failed_is_told_from_one_that_was_published() -> None:
    source = Source(OSError(5, "disk"))
    loader = loader_of(source)
    for expert, unpublished in ((0, False), (3, True)):
        loader.submit(load_of(source, 0, expert))
        wait_until(lambda: loader.has_completed)
        assert loader.has_unpublished == unpublished
        loader.completed()
    loader.close()


def test_pages_are_dropped_only_if_asked() -> None:
    source = Source()
    loader = loader_of(source, drop=False)
    loader.submit(load_of(source, 0, 0))
    collect(loader, 1)
    loader.close()
    assert source.dropped == []


def test_a_load_does_not_fail_for_advice_that_the_kernel_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source()

    def refuse(layer: int, expert: int) -> None:
        raise OSError(29, "Illegal seek")

    monkeypatch.setattr(source, "drop_page_cache", refuse)
    loader = loader_of(source)
    loader.submit(load_of(source, 0, 0))
    assert [load.error for load in collect(loader, 1)] == [None]
    loader.close()


def test_a_load_is_under_way_until_it_is_collected() -> None:
    source = Source()
    loader = loader_of(source, 2)
    loader.submit(load_of(source, 0, 0))
    wait_until(lambda: loader.has_completed)
    assert (loader.idle, loader.in_flight) == (1, 1)
    assert len(loader.completed()) == 1
    assert (loader.idle, loader.in_flight, loader.has_completed) == (2, 0, False)
    loader.close()


def test_a_slow_load_does_not_hold_up_the_other_thread() -> None:
    source = Source()
    loader = loader_of(source, 2)
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
    loader = loader_of(source)
    loader.submit(load_of(source, 0, 3))
    assert [load.error for load in collect(loader, 1)] == [error]
    loader.submit(load_of(source, 0, 1))
    assert [load.error for load in collect(loader, 1)] == [None]
    loader.close()


def test_closing_waits_for_the_load_under_way_and_for_no_other() -> None:
    source = Source()
    loader, order = blocked(source)
    loader.submit(load_of(source, 0, 1))
    closer = threading.Thread(target=loader.close)
    closer.start()
    closer.join(0.05)
    assert closer.is_alive()
    source.opened.set()
    closer.join(PATIENCE)
    assert [load.error for load in loader.completed()] == [None]
    assert order == [2]
    assert not any(thread.is_alive() for thread in loader._threads)


def blocked(source: Source, **settings: Any) -> tuple[Loader, list[int]]:
    """A loader of one thread that has come to expert 2 of layer 0 and waits there, and the order of its loads."""
    order: list[int] = []

    def begin(load: Load) -> bool:
        order.append(load.expert)
        return True

    loader = loader_of(source, begin=begin, **settings)
    loader.submit(load_of(source, 0, 2))
    wait_until(lambda: order)
    return loader, order


def test_a_thread_has_a_load_at_hand() -> None:
    source = Source()
    loader, _ = blocked(source)
    assert (loader.idle, loader.room) == (0, 1)
    loader.submit(load_of(source, 0, 0))
    assert (loader.idle, loader.room) == (0, 0)
    source.opened.set()
    assert [load.expert for load in collect(loader, 2)] == [2, 0]
    loader.close()


def test_quick_loads_are_at_hand_in_numbers() -> None:
    loader = loader_of(Source(), 2, most=24)
    rooms = []
    for pace in (0.0, 2 * AT_HAND, AT_HAND / 4, AT_HAND / 8, AT_HAND / 1000):
        loader._pace(pace)
        rooms.append(loader.room)
    assert rooms == [4, 4, 10, 18, 24]
    loader.close()


def test_the_more_wanted_overtakes_what_no_thread_has_come_to() -> None:
    source = Source()
    loader, order = blocked(source, most=9)
    for layer, expert, priority in ((1, 0, NORMAL), (1, 1, URGENT), (0, 0, NORMAL), (0, 1, URGENT)):
        loader.submit(load_of(source, layer, expert, priority))
    assert loader.promote(0, AWAITED)
    assert not loader.promote(0, AWAITED), "it has that priority"
    assert not loader.promote(2, AWAITED), "it is under way"
    source.opened.set()
    loads = collect(loader, 5)
    assert order == [2, 0, 1, 1, 0]
    assert [load.followed_by for load in loads] == [*loads[1:], None]
    loader.close()


def test_what_is_promoted_while_a_thread_looks_for_it_is_loaded_all_the_same() -> None:
    source = Source()
    loader, _ = blocked(source)

    class Pausing(deque[Load]):
        def remove(self, load: Load) -> None:
            super().remove(load)
            source.opened.set()
            wait_until(lambda: loader.has_completed and loader._calls.empty())  # a thread has come, and found nothing

    loader._waiting = Pausing()
    loader.submit(load_of(source, 0, 0, NORMAL))
    assert loader.promote(0, URGENT)
    assert [load.key for load in collect(loader, 2)] == [2, 0]
    loader.close()


def test_the_least_wanted_is_taken_back_and_not_loaded() -> None:
    source = Source()
    loader, order = blocked(source)
    assert loader.take_back(AWAITED + 1) is None, "a thread has come to the only one"
    load = load_of(source, 1, 0, NORMAL)
    loader.submit(load)
    assert loader.take_back(NORMAL) is None
    assert loader.take_back(URGENT) is load
    assert (loader.in_flight, load.key in loader) == (1, False)
    loader.submit(load_of(source, 1, 1))
    source.opened.set()
    collect(loader, 2)
    loader.close()
    assert order == [2, 1]
    assert bytes(load.buffer) == bytes(len(load.buffer))


def test_what_is_not_wanted_any_more_is_not_read() -> None:
    source = Source()
    loader = loader_of(source, begin=lambda load: False)
    load = load_of(source, 0, 0)
    loader.submit(load)
    assert collect(loader, 1) == [load]
    loader.close()
    assert load.refused
    assert bytes(load.buffer) == bytes(len(load.buffer))
    assert source.dropped == []


def word_of(data: bytes | bytearray) -> int:
    checksum = Checksum(memoryview(data))
    checksum.add(0, len(data))
    return checksum.word()


@given(st.binary(max_size=64), st.integers(0, 64))
def test_a_checksum_is_a_signed_word_with_the_digests_bits_and_never_zero(data: bytes, cut: int) -> None:
    checksum = Checksum(memoryview(data))
    checksum.add(0, min(cut, len(data)))
    checksum.add(min(cut, len(data)), len(data))
    word = checksum.word()
    assert -(1 << 63) <= word < 1 << 63
    assert word != 0
    assert word & (1 << 64) - 1 == (xxhash.xxh3_64_intdigest(data) or 1)


def test_a_digest_of_zero_is_not_mistaken_for_no_digest(monkeypatch: pytest.MonkeyPatch) -> None:
    class Zero:
        def update(self, data: memoryview) -> None: ...

        def intdigest(self) -> int:
            return 0

    monkeypatch.setattr(xxhash, "xxh3_64", Zero)
    assert word_of(b"") == 1


def test_a_source_that_does_not_tell_of_all_that_it_filled_fails_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source()
    whole = SyntheticSource.read_into

    def silent(layer: int, expert: int, buffer: memoryview, filled: Callable[[int, int], object] | None = None) -> None:
        whole(source, layer, expert, buffer)

    monkeypatch.setattr(source, "read_into", silent)
    loader = loader_of(source)
    loader.submit(load_of(source, 0, 0))
    (load,) = collect(loader, 1)
    loader.close()
    assert isinstance(load.error, ValueError)
    assert "told of 0 bytes of the" in str(load.error)
