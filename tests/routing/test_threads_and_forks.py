"""Routers in several threads, after the end, and in a forked child."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from runtimes import clock_of, small_config

from shmroute.errors import NonFiniteLogitsError, RuntimeClosedError, SegmentExistsError
from shmroute.lifecycle import attach, create
from shmroute.routing.route import route
from shmroute.runtime import Runtime
from shmroute.shared.atomic import COMPILED

LOGITS = np.random.default_rng(2).normal(size=(64, 8)).astype(np.float32)
EXPECTED = np.argsort(-LOGITS, axis=1, kind="stable")[:, :2]


def in_threads(*work: Callable[[], None]) -> None:
    """Run each in a thread; an exception in one is raised here."""
    failures: list[BaseException] = []

    def guarded(one: Callable[[], None]) -> None:
        try:
            one()
        except BaseException as error:  # noqa: BLE001
            failures.append(error)

    threads = [threading.Thread(target=guarded, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def test_threads_on_one_router_get_their_own_answers(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime()
    router = runtime.router(0)

    def on_the_hot_path(offset: int) -> Callable[[], None]:
        rows, expected = np.roll(LOGITS, offset, axis=0), np.roll(EXPECTED, offset, axis=0)

        def work() -> None:
            experts, weights = np.empty((64, 2), np.int32), np.empty((64, 2), np.float32)
            for _ in range(300):
                router.route_into(rows, experts, weights)
                assert np.array_equal(experts, expected)

        return work

    def with_decisions() -> None:
        for _ in range(300):
            assert np.array_equal(router.route(LOGITS).experts, EXPECTED)

    in_threads(on_the_hot_path(0), on_the_hot_path(17), with_decisions)
    assert clock_of(runtime) == 900 * 64
    assert runtime.affinity(0).activations().sum() == 900 * 128
    assert runtime.metrics().total.counters["misses"] + runtime.metrics().total.counters["hits"] == 900 * 128


def test_threads_are_told_of_their_own_bad_rows(make_runtime: Callable[..., Runtime]) -> None:
    router = make_runtime().router(0)

    def bad_at(row: int) -> Callable[[], None]:
        logits = LOGITS.copy()
        logits[row] = np.nan

        def work() -> None:
            experts, weights = np.empty((64, 2), np.int32), np.empty((64, 2), np.float32)
            for _ in range(300):
                with pytest.raises(NonFiniteLogitsError) as error:
                    router.route_into(logits, experts, weights)
                assert error.value.row == row

        return work

    in_threads(bad_at(3), bad_at(60))


def test_a_plan_in_use_sends_the_caller_to_the_second(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime()
    router = runtime.router(0)
    experts, weights = np.empty((64, 2), np.int32), np.empty((64, 2), np.float32)
    router._hot.words[0] = 1  # as if a thread were in the kernel
    router.route_into(LOGITS, experts, weights)
    router._hot.words[0] = 0
    assert np.array_equal(experts, EXPECTED)
    assert clock_of(runtime) == 64


def calls(runtime: Runtime, router_call: Callable[[], object]) -> list[Callable[[], object]]:
    """Everything that routes or looks at routing."""
    affinity = runtime.affinity(0)
    return [
        router_call,
        lambda: runtime.router(0),
        lambda: runtime.affinity(0),
        affinity.scores,
        affinity.activations,
        lambda: affinity.update([1]),
        runtime.metrics,
        lambda: runtime.resident(0),
        lambda: runtime.is_resident(0, 0),
    ]


Output = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]


@pytest.fixture
def output() -> Output:
    """Arrays for one token."""
    return np.empty(2, np.int32), np.empty(2, np.float32)


def test_nothing_works_once_the_runtime_is_closed(name: str, output: Output) -> None:
    runtime = create(name, small_config(), progress=None)
    router = runtime.router(0)
    all_calls = [
        *calls(runtime, lambda: router.route(LOGITS)),
        lambda: router.route_into(LOGITS[0], *output),
        lambda: router.cache_bonus,
    ]
    runtime.close()
    runtime.close()
    for call in all_calls:
        with pytest.raises(RuntimeClosedError, match="was closed"):
            call()


def test_closing_while_threads_route_ends_them_with_an_error(name: str) -> None:
    runtime = create(name, small_config(), progress=None)
    router = runtime.router(0)
    at_work = threading.Barrier(3)

    def route_until_closed() -> None:
        experts, weights = np.empty((64, 2), np.int32), np.empty((64, 2), np.float32)
        at_work.wait()
        with pytest.raises(RuntimeClosedError):
            while True:
                router.route_into(LOGITS, experts, weights)

    def close() -> None:
        at_work.wait()
        threading.Event().wait(0.05)
        runtime.close()

    in_threads(route_until_closed, route_until_closed, close)


def in_child(work: Callable[[], None]) -> int:
    """Run in a forked child; its exit status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def test_a_forked_child_cannot_use_the_parents_runtime_and_does_not_harm_it(
    make_runtime: Callable[..., Runtime], output: Output
) -> None:
    runtime = make_runtime()
    router = runtime.router(0)
    router.route(LOGITS)
    all_calls = [*calls(runtime, lambda: router.route(LOGITS)), lambda: router.route_into(LOGITS[0], *output)]

    def child() -> None:
        for call in all_calls:
            with pytest.raises(RuntimeClosedError, match="belongs to the process that forked this one"):
                call()
        runtime.close()

    assert in_child(child) == 0
    router.route(LOGITS)
    metrics = runtime.metrics()
    assert [worker.pid for worker in metrics.workers] == [os.getpid()]
    assert metrics.workers[0].counters["tokens"] == clock_of(runtime) == 128


def test_a_child_forked_while_threads_route_is_detached_too(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime()
    router = runtime.router(0)
    done = threading.Event()

    def route_on() -> None:
        while not done.is_set():
            router.route(LOGITS)

    def fork() -> None:
        try:
            for _ in range(5):
                assert in_child(refused) == 0
        finally:
            done.set()

    def refused() -> None:
        with pytest.raises(RuntimeClosedError):
            router.route(LOGITS)

    in_threads(route_on, fork)


def test_a_forked_child_attaches_anew_with_a_lane_of_its_own(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime()
    runtime.router(0).route(LOGITS)

    def child() -> None:
        with attach(runtime.name, progress=None) as own:
            own.router(0).route(LOGITS)
            assert sorted(worker.pid or 0 for worker in own.metrics().workers) == sorted([os.getpid(), os.getppid()])

    assert in_child(child) == 0
    assert runtime.metrics().total.counters["tokens"] == 128
    assert [worker.pid for worker in runtime.metrics().workers] == [os.getpid()]


def test_a_live_runtimes_name_is_taken(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime()
    with pytest.raises(SegmentExistsError):
        create(runtime.name, runtime.config, progress=None)


@pytest.mark.skipif(not COMPILED, reason="there is nothing compiled")
def test_an_argument_of_another_type_never_compiles_anything(make_runtime: Callable[..., Runtime]) -> None:
    router = make_runtime().router(0)
    with pytest.raises(ValueError, match="logits must be"):
        router.route_into(np.zeros((3, 8), np.float64), np.empty((3, 2), np.int32), np.empty((3, 2), np.float32))
    assert len(route.signatures) == 1
