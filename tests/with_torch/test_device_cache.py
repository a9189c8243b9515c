"""A worker's cache in a GPU, on a stand-in that is late wherever it may be: right bytes, and no lease too short."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from late_device import LateDevice

import shmroute
from shmroute import PagerConfig, RouterConfig, RuntimeConfig
from shmroute.cli.stat import snapshot
from shmroute.errors import ConfigError, ExpertTimeout, RuntimeClosedError
from shmroute.integrations.transformers.device_cache import DeviceCache
from shmroute.sources.synthetic import SyntheticSource

LAYERS, EXPERTS, TOP_K = 3, 8, 2
RAW: Any = SimpleNamespace(of_bytes=lambda slot: slot)
"""In the place of `ExpertViews`: the bytes as they are."""


@pytest.fixture(scope="module")
def truth() -> dict[tuple[int, int], bytes]:
    """The bytes of every expert."""
    source = source_of_all()
    truth = {}
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            buffer = bytearray(source.geometry.expert_bytes)
            source.read_into(layer, expert, memoryview(buffer))
            truth[layer, expert] = bytes(buffer)
    return truth


def source_of_all() -> SyntheticSource:
    return SyntheticSource(LAYERS, EXPERTS, 16, 24, top_k=TOP_K)


def config_of(slots: int = 3, **pager: Any) -> RuntimeConfig:
    """Few slots in host memory, so that what is given back is soon overwritten."""
    source = source_of_all()
    one = RuntimeConfig.from_checkpoint(source, "100%").slot_bytes
    return RuntimeConfig.from_checkpoint(
        source, slots * one, router=RouterConfig(cache_bonus=0), pager=PagerConfig(**pager)
    )


@pytest.fixture
def opened() -> Iterator[Callable[..., tuple[shmroute.Runtime, DeviceCache]]]:
    """``opened(device, slots=3, host=3)``: a runtime with a pager, and its cache on a device."""
    made: list[shmroute.Runtime] = []

    def open_cache(
        device: LateDevice, slots: int = 3, host: int = 3, **pager: Any
    ) -> tuple[shmroute.Runtime, DeviceCache]:
        made.append(shmroute.create(f"test-device-{os.getpid()}-{len(made)}", config_of(host, **pager), pager=True))
        cache = made[-1].one(DeviceCache)
        cache.open(device, slots, RAW)
        return made[-1], cache

    yield open_cache
    for runtime in made:
        runtime.close()


def choices_of(source: np.random.Generator, tokens: int) -> npt.NDArray[np.int64]:
    return np.stack([source.permutation(EXPERTS)[:TOP_K] for _ in range(tokens)])


class Reader:
    """Queues products that look at the bytes when the device comes to them."""

    def __init__(self, device: LateDevice, truth: dict[tuple[int, int], bytes]) -> None:
        self.device, self._truth = device, truth
        self.seen: list[bool] = []

    def read(self, layer: int, expert: int, slot: torch.Tensor) -> None:
        def look() -> None:
            wanted = self._truth[layer, expert]
            self.seen.append(slot[: len(wanted)].numpy().tobytes() == wanted)

        self.device.compute(look)

    def call(self, cache: DeviceCache, runtime: shmroute.Runtime, layer: int, choices: Any) -> list[int]:
        """One layer's computations; the experts in the order in which they were lent."""
        order = []
        with closing(cache.lend(runtime, layer, choices, 5.0)) as lent:
            for expert, slot in lent:
                self.read(layer, expert, slot)
                order.append(expert)
        return order


def play(reader: Reader, cache: DeviceCache, runtime: shmroute.Runtime, calls: int, seed: int = 0) -> None:
    """Pass through the layers with one token or a few."""
    source = np.random.default_rng(seed)
    for call in range(calls):
        choices = choices_of(source, int(source.choice([1, 1, 1, 6])))
        order = reader.call(cache, runtime, call % LAYERS, choices)
        assert sorted(order) == np.unique(choices).tolist()
    reader.device.synchronize()


@pytest.mark.parametrize("seed", range(4))
def test_every_product_reads_the_right_bytes(seed: int, opened: Any, truth: Any) -> None:
    """Also of a batch that wants more experts than the device holds."""
    device = LateDevice(seed)
    runtime, cache = opened(device)
    reader = Reader(device, truth)
    play(reader, cache, runtime, 90, seed)
    assert len(reader.seen) > 200
    assert all(reader.seen)
    counters = runtime.metrics().total.counters
    assert 0 < counters["device_copies"] == device.copies < len(reader.seen)


@pytest.mark.parametrize("deaf", ["join", "finish", "after"])
def test_each_order_is_needed(deaf: str, opened: Any, truth: Any) -> None:
    """What the stand-in shows if one of them were not asked for: else the test above would say nothing of it."""
    device = LateDevice(1, deaf=deaf)
    runtime, cache = opened(device)
    reader = Reader(device, truth)
    play(reader, cache, runtime, 90)
    assert not all(reader.seen)


@pytest.mark.parametrize("eviction", ["lru", "expected-next-use"])
def test_a_policy_of_the_pager_serves_the_device(eviction: str, opened: Any, truth: Any) -> None:
    device = LateDevice()
    runtime, cache = opened(device, slots=8, eviction=eviction)
    reader = Reader(device, truth)
    play(reader, cache, runtime, 60)
    assert all(reader.seen)
    assert device.copies < len(reader.seen)


def test_what_is_there_comes_first_and_needs_no_lease(opened: Any, truth: Any) -> None:
    device = LateDevice()
    runtime, cache = opened(device, slots=4, prefetch=0)
    reader = Reader(device, truth)
    assert reader.call(cache, runtime, 0, np.array([[5, 6]])) in ([5, 6], [6, 5])
    leases = runtime.metrics().total.counters["leases"]
    assert reader.call(cache, runtime, 0, np.array([[6, 5]])) == [6, 5]
    assert runtime.metrics().total.counters["leases"] == leases
    assert reader.call(cache, runtime, 0, np.array([[1, 6], [6, 5]])) == [6, 5, 1]
    assert device.copies == 3


def test_a_token_s_experts_stay_while_others_can_go(opened: Any, truth: Any) -> None:
    device = LateDevice()
    runtime, cache = opened(device, slots=3, eviction="lru")
    reader = Reader(device, truth)
    for expert in range(EXPERTS):
        reader.call(cache, runtime, 0, np.array([[expert, (expert + 1) % EXPERTS]]))
        router = runtime.router(0)
        assert router.is_on_device(expert)
        assert router.is_on_device((expert + 1) % EXPERTS)
    assert device.copies == EXPERTS + 1
    assert sum(runtime.router(0).is_on_device(expert) for expert in range(EXPERTS)) == 3


def test_routers_know_what_is_there(opened: Any, truth: Any) -> None:
    device = LateDevice()
    runtime, cache = opened(device, slots=3)
    Reader(device, truth).call(cache, runtime, 1, np.array([[2, 7]]))
    assert [[e for e in range(EXPERTS) if runtime.router(layer).is_on_device(e)] for layer in range(LAYERS)] == [
        [], [2, 7], [],
    ]  # fmt: skip
    row = np.array([1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.95], np.float32)
    runtime.router(1).cache_bonus = 0.15
    assert runtime.router(1).route(row).experts.tolist() == [7, 0]


# ------------------------------------------------------------------ what goes wrong in between


@pytest.mark.parametrize("failing", range(5))
def test_no_lease_and_no_slot_is_lost_to_an_error_in_between(failing: int, opened: Any, truth: Any) -> None:
    device = LateDevice(failing)
    runtime, cache = opened(device, slots=3)
    reader = Reader(device, truth)
    for _ in range(4):
        with pytest.raises(KeyError), closing(cache.lend(runtime, 0, np.array([[0, 1], [2, 3], [4, 5]]), 5.0)) as lent:
            for number, (expert, slot) in enumerate(lent):
                reader.read(0, expert, slot)
                if number == failing:
                    raise KeyError(expert)
        assert leased(runtime) == 0
    play(reader, cache, runtime, 30)
    assert all(reader.seen)


@pytest.mark.parametrize("method", ["copy", "join", "mark"])
def test_a_device_that_refuses_once(method: str, opened: Any, truth: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    device = LateDevice()
    runtime, cache = opened(device, slots=3)
    reader = Reader(device, truth)
    play(reader, cache, runtime, 6)
    for _ in range(4):
        with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="CUDA error"):
            patched.setattr(device, method, refuse)
            reader.call(cache, runtime, 0, np.array([[0, 1], [2, 3], [4, 5]]))
        assert leased(runtime) == 0
    play(reader, cache, runtime, 30)
    assert all(reader.seen)


def refuse(*_: Any) -> None:
    raise RuntimeError("CUDA error: out of sorts")


def leased(runtime: shmroute.Runtime) -> int:
    """Experts under a lease."""
    return sum(layer["leased"] for layer in snapshot(runtime._attachment.segment)["layers"])


def test_an_expert_that_does_not_come_leaves_all_as_it_was(opened: Any, truth: Any) -> None:
    device = LateDevice()
    runtime, cache = opened(device, slots=3)
    reader = Reader(device, truth)
    play(reader, cache, runtime, 6)
    os.kill(runtime.metrics().pager.pid, signal.SIGSTOP)
    try:
        absent = [e for e in range(EXPERTS) if not runtime.is_resident(0, e) and not runtime.router(0).is_on_device(e)]
        with pytest.raises((ExpertTimeout, shmroute.errors.PagerUnavailable)):
            list(cache.lend(runtime, 0, np.array([absent[:2]]), 0.2))
        assert leased(runtime) == 0
    finally:
        os.kill(runtime.metrics().pager.pid, signal.SIGCONT)
    play(reader, cache, runtime, 30)
    assert all(reader.seen)


def test_a_worker_that_dies_in_the_middle_of_a_copy_leaves_no_lease(opened: Any, truth: Any) -> None:
    device = LateDevice()
    runtime, cache = opened(device)
    program = Path(__file__).with_name("dying_device_program.py")
    with subprocess.Popen([sys.executable, program, runtime.name], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "copying\n"
        assert leased(runtime) == 1
        process.kill()
    deadline = time.monotonic() + 10
    while leased(runtime):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    reader = Reader(device, truth)
    play(reader, cache, runtime, 30)
    assert all(reader.seen)


def test_threads_take_turns(opened: Any, truth: Any) -> None:
    device = LateDevice()
    runtime, cache = opened(device, slots=4)
    readers = [Reader(device, truth) for _ in range(3)]
    threads = [
        threading.Thread(target=partial(play, reader, cache, runtime, 30, seed)) for seed, reader in enumerate(readers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    device.synchronize()
    assert all(len(reader.seen) > 50 and all(reader.seen) for reader in readers)


def test_a_thread_waits_for_its_turn_no_longer_than_for_an_expert(opened: Any) -> None:
    runtime, cache = opened(LateDevice())
    with closing(cache.lend(runtime, 0, np.array([[0, 1]]), 5.0)) as lent:
        next(lent)
        with pytest.raises(
            ExpertTimeout, match=r"another thread's layer call has the GPU's cache for longer than 0\.1"
        ):
            list(cache.lend(runtime, 0, np.array([[0, 1]]), 0.1))
    assert len(list(cache.lend(runtime, 0, np.array([[0, 1]]), 0.1))) == 2


# ------------------------------------------------------------------ opening and closing


def test_the_pool_is_locked_while_the_runtime_is_open(opened: Any) -> None:
    device = LateDevice()
    runtime, cache = opened(device)
    segment = runtime._attachment.segment
    assert device.locked == {segment.address + segment.layout.pool: runtime.config.budget_bytes}
    router = runtime.router(0)
    runtime.close()
    assert device.locked == {}
    assert not router.is_on_device(0)
    with pytest.raises(RuntimeClosedError):
        list(cache.lend(runtime, 0, np.array([[0, 1]]), 0.1))


def test_a_process_has_one_cache_for_a_runtime(opened: Any) -> None:
    device = LateDevice()
    runtime, cache = opened(device, slots=3)
    with shmroute.attach(runtime.name) as again:
        assert again.one(DeviceCache) is cache
        cache.open(LateDevice(), 3, RAW)
        with pytest.raises(ConfigError, match=r"has a cache of 3 experts in cpu for the runtime .* already"):
            cache.open(LateDevice(), 4, RAW)


@pytest.mark.parametrize("method", ["allocate", "page_lock"])
def test_a_device_that_cannot_be_had_changes_nothing(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    device = LateDevice()
    with shmroute.create(f"test-device-{os.getpid()}-none", config_of(), pager=True) as runtime:
        cache = runtime.one(DeviceCache)
        with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="CUDA error"):
            patched.setattr(device, method, refuse)
            cache.open(device, 3, RAW)
        assert runtime.router(0).route(np.zeros(8, np.float32)).hits == 0
        cache.open(device, 3, RAW)
        assert len(list(cache.lend(runtime, 0, np.array([[0, 1]]), 5.0))) == 2


def test_a_device_that_will_not_let_go_does_not_keep_the_segment(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    device = LateDevice()
    runtime, _ = opened(device)
    monkeypatch.setattr(device, "page_unlock", refuse)
    with pytest.warns(ResourceWarning, match="did not let go of the shared pool: CUDA error"):
        runtime.close()
