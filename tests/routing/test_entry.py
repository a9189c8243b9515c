"""The C function in the place of `route_into` does what the method does, and sends to it what it does not know."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from runtimes import Residency, clock_of, small_config, unique_name

from shmroute.config import RouterConfig
from shmroute.errors import RuntimeClosedError
from shmroute.lifecycle import create
from shmroute.routing import entry
from shmroute.routing.router import MemoryAwareRouter
from shmroute.runtime import Runtime
from shmroute.shared.atomic import COMPILED

pytestmark = pytest.mark.skipif(not COMPILED or not entry.fields_are_known(), reason="there is only the method here")

LOGITS = np.random.default_rng(4).normal(size=(40, 8)).astype(np.float32)


def is_c_function(router: MemoryAwareRouter) -> bool:
    return type(router.route_into) is type(len)


def test_the_function_and_the_method_do_the_same(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime(num_layers=2, router=RouterConfig(cache_bonus=0.5))
    for layer in range(2):
        Residency(runtime).load(layer, 1, 5) if layer == 0 else None
    function, method = runtime.router(0), runtime.router(0)
    assert is_c_function(function)
    for logits in (LOGITS, LOGITS[0], LOGITS[:1], LOGITS[:0]):
        shape = (*logits.shape[:-1], 2)
        results = []
        for call in (function.route_into, lambda *given: MemoryAwareRouter.route_into(method, *given)):
            experts, weights = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
            results.append((call(logits, experts, weights), experts.tolist(), weights.tolist()))
        assert results[0] == results[1]


class Subclass(np.ndarray[Any, Any]):
    """Not exactly an ndarray."""


@pytest.mark.parametrize(
    "given",
    [
        LOGITS.view(Subclass),
        LOGITS[::2],
        np.asfortranarray(LOGITS),
        np.lib.stride_tricks.as_strided(LOGITS, (3, 8), (0, 4)),
        LOGITS.astype("<f4").view(np.dtype("<f4", metadata={"own": 1})),
    ],
    ids=["subclass", "strided", "fortran", "broadcast", "another dtype object"],
)
def test_other_arrays_are_routed_by_the_method(make_runtime: Callable[..., Runtime], given: Any) -> None:
    router = make_runtime().router(0)
    experts, weights = np.empty((len(given), 2), np.int32), np.empty((len(given), 2), np.float32)
    router.route_into(given, experts, weights)
    assert experts.tolist() == router.route(np.array(given, subok=False)).experts.tolist()


def test_keywords_and_wrong_counts_are_as_the_method_takes_them(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime()
    router = runtime.router(0)
    experts, weights = np.zeros(2, np.int32), np.zeros(2, np.float32)
    router.route_into(weights=weights, logits=LOGITS[0], experts=experts)
    assert experts.tolist() == router.route(LOGITS[0]).experts.tolist()
    before = clock_of(runtime)
    for wrong in ((), (LOGITS[0],), (LOGITS[0], experts, weights, 1)):
        with pytest.raises(TypeError, match="argument"):
            router.route_into(*wrong)
    with pytest.raises(TypeError, match="nonsense"):
        router.route_into(LOGITS[0], experts, weights, nonsense=1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="logits must be"):
        router.route_into(None, 3, "x")  # type: ignore[arg-type]
    assert clock_of(runtime) == before


def test_the_function_outlives_its_router_and_its_runtime() -> None:
    experts, weights = np.zeros(2, np.int32), np.zeros(2, np.float32)
    with create(unique_name(), small_config(), progress=None) as runtime:
        route_into = runtime.router(0).route_into
        route_into(LOGITS[0], experts, weights)
    del runtime
    gc.collect()
    with pytest.raises(RuntimeClosedError):
        route_into(LOGITS[0], experts, weights)


def test_a_call_leaves_no_reference_behind(make_runtime: Callable[..., Runtime]) -> None:
    route_into = make_runtime().router(0).route_into
    arrays = LOGITS[0].copy(), np.zeros(2, np.int32), np.zeros(2, np.float32)
    route_into(*arrays)
    before = [sys.getrefcount(one) for one in (*arrays, route_into)]
    for _ in range(100):
        route_into(*arrays)
    assert [sys.getrefcount(one) for one in (*arrays, route_into)] == before


def test_without_knowledge_of_the_fields_the_method_stays(
    make_runtime: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entry, "fields_are_known", lambda: False)
    router = make_runtime().router(0)
    assert not is_c_function(router)
    experts, weights = np.zeros((40, 2), np.int32), np.zeros((40, 2), np.float32)
    router.route_into(LOGITS, experts, weights)
    assert experts.tolist() == router.route(LOGITS).experts.tolist()
