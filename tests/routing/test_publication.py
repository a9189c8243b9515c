"""What others see of routed tokens, and when: `shmroute.routing.publication`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from runtimes import clock_of, logits_choosing

import shmroute
from shmroute.config import AffinityConfig
from shmroute.routing.plan_words import TOKENS_PUT_OFF
from shmroute.runtime import Runtime
from shmroute.shared.layout import LINE
from shmroute.shared.segment import Segment

LIMIT = TOKENS_PUT_OFF
EXPERTS = 8


@pytest.fixture
def runtime(make_runtime: Callable[..., Runtime]) -> Runtime:
    """Two layers of 8 experts, two for a token."""
    return make_runtime(num_layers=2, affinity=AffinityConfig(decay=0.9, activation_boost=0.3))


def segment_of(runtime: Runtime) -> Segment:
    return runtime._attachment.segment


def seen_by_others(runtime: Runtime, layer: int = 0) -> int:
    """Tokens whose activations are in shared memory, read as another process would."""
    segment = segment_of(runtime)
    total = sum(segment.read(segment.layout.activations(layer, expert)) for expert in range(EXPERTS))
    return total // runtime.config.top_k


def somebody_routes(runtime: Runtime, layer: int = 0) -> None:
    """Move a layer's clock as another worker's token does."""
    segment = segment_of(runtime)
    offset = segment.layout.clock + layer * LINE
    segment.write(offset, segment.read(offset) + 1)


def router_of(runtime: Runtime, layer: int = 0) -> Callable[[int], None]:
    """Routes some tokens in one call, by the hot path."""
    k = runtime.config.top_k

    def route(tokens: int) -> None:
        logits = logits_choosing([[(i + r) % EXPERTS for r in range(k)] for i in range(tokens)], EXPERTS)
        experts, weights = np.empty((tokens, k), np.int32), np.empty((tokens, k), np.float32)
        runtime.router(layer).route_into(logits, experts, weights)

    return route


def share(runtime: Runtime, layer: int = 0) -> Callable[[int], None]:
    """A router whose layer somebody else uses too, as its last call has found out."""
    route = router_of(runtime, layer)
    route(1)
    somebody_routes(runtime, layer)
    route(1)
    return route


def deferred(runtime: Runtime) -> int:
    return runtime.metrics().total.counters["deferred"]


def test_alone_on_a_layer_every_token_is_seen_at_once(runtime: Runtime) -> None:
    route = router_of(runtime)
    for token in range(2 * LIMIT):
        route(1)
        assert seen_by_others(runtime) == token + 1
    assert deferred(runtime) == 0


def test_on_a_shared_layer_tokens_are_put_off_until_there_are_enough(runtime: Runtime) -> None:
    route = share(runtime)
    for _ in range(LIMIT - 1):
        route(1)
        assert seen_by_others(runtime) == 2
    route(1)
    assert seen_by_others(runtime) == 2 + LIMIT
    assert deferred(runtime) == LIMIT - 1  # the last was published by its own call


def test_whoever_is_alone_again_publishes_at_once_again(runtime: Runtime) -> None:
    route = share(runtime)
    for _ in range(LIMIT):
        route(1)
    route(1)
    assert seen_by_others(runtime) == 2 + LIMIT + 1


def test_tokens_and_hits_are_counted_at_once(runtime: Runtime) -> None:
    route = share(runtime)
    route(1)
    counters = runtime.metrics().total.counters
    assert counters["tokens"] == counters["calls"] == 3
    assert counters["hits"] + counters["misses"] == 3 * runtime.config.top_k


@pytest.mark.parametrize("read", ["scores", "activations", "top"])
def test_this_process_never_reads_an_affinity_that_lags(runtime: Runtime, read: str) -> None:
    route = share(runtime)
    route(1)
    affinity = runtime.affinity(0)
    affinity.top(1) if read == "top" else getattr(affinity, read)()
    assert seen_by_others(runtime) == 3
    assert deferred(runtime) == 1


def test_an_update_comes_after_what_was_routed_before_it(runtime: Runtime) -> None:
    route = share(runtime)
    route(1)
    runtime.affinity(0).update([0])
    assert clock_of(runtime) == 5  # three tokens, somebody else's and the update
    assert seen_by_others(runtime) * runtime.config.top_k + 1 == int(runtime.affinity(0).activations().sum())


def test_routing_on_another_layer_publishes(runtime: Runtime) -> None:
    route = share(runtime)
    route(1)
    assert seen_by_others(runtime) == 2
    router_of(runtime, 1)(1)
    assert seen_by_others(runtime) == 3


def test_who_goes_through_the_layers_puts_nothing_off(runtime: Runtime) -> None:
    routes = [router_of(runtime, layer) for layer in range(2)]
    for token in range(LIMIT):
        for layer, route in enumerate(routes):
            somebody_routes(runtime, layer)
            route(1)
            assert seen_by_others(runtime, layer) == token + 1
    assert deferred(runtime) == 0


def test_a_batch_of_as_many_tokens_is_published_at_once_with_what_was_put_off_before_it(runtime: Runtime) -> None:
    route = share(runtime)
    route(3)
    assert seen_by_others(runtime) == 2
    route(LIMIT)
    assert seen_by_others(runtime) == 5 + LIMIT
    assert deferred(runtime) == 3


def test_a_batch_that_would_be_too_much_publishes_what_was_put_off(runtime: Runtime) -> None:
    route = share(runtime)
    route(LIMIT - 2)
    route(5)
    assert seen_by_others(runtime) == LIMIT
    assert deferred(runtime) == LIMIT - 2


def test_both_ways_to_route_put_off_and_publish_in_order(runtime: Runtime) -> None:
    route = share(runtime)
    route(1)
    runtime.router(0).route(logits_choosing([range(runtime.config.top_k)], EXPERTS))  # by the router's other plan
    assert seen_by_others(runtime) == 4


def test_close_publishes(runtime: Runtime) -> None:
    with shmroute.attach(runtime.name, progress=None) as mine:
        route = share(mine)
        route(1)
    # One process has one attachment: it is closed with the last of its runtimes.
    assert seen_by_others(runtime) == 2
    router = runtime.router(0)
    router._close()
    assert seen_by_others(runtime) == 3


@pytest.mark.parametrize("calls", [[1] * LIMIT, [5, 1, 7, 30, 2, LIMIT, 1, LIMIT + 40, 3]], ids=["ones", "mixed"])
def test_what_is_put_off_scores_as_if_it_was_not(runtime: Runtime, calls: list[int]) -> None:
    """On a layer that nobody else uses, whose clock this router takes for moved."""
    other = router_of(runtime, 1)
    for tokens in calls:
        other(tokens)
    expected = runtime.affinity(1)
    route = router_of(runtime, 0)
    plan = runtime.router(0)._hot
    for tokens in calls:
        plan._turns._seen[0, 1] = 1
        route(tokens)
    assert runtime.affinity(0).scores() == pytest.approx(expected.scores(), abs=1e-6)
    assert runtime.affinity(0).activations().tolist() == expected.activations().tolist()
    assert clock_of(runtime, 0) == clock_of(runtime, 1) == sum(calls)
    assert deferred(runtime) > 0


def test_a_crossing_of_the_restamp_by_what_was_put_off_restamps(runtime: Runtime) -> None:
    segment = segment_of(runtime)
    route = share(runtime)
    segment.write(segment.layout.clock, 2**28 - 2)
    route(4)
    runtime.affinity(0).scores()
    ticks = {(segment.read(segment.layout.affinity(0, expert)) >> 32) & 0xFFFFFFFF for expert in range(EXPERTS)}
    assert min(ticks) >= 2**28 - 2


def test_a_refused_batch_leaves_what_was_put_off_as_it_is(runtime: Runtime) -> None:
    route = share(runtime)
    route(2)
    bad = np.full((1, EXPERTS), np.nan, np.float32)
    with pytest.raises(shmroute.errors.NonFiniteLogitsError):
        runtime.router(0).route_into(
            bad, np.empty((1, runtime.config.top_k), np.int32), np.empty((1, runtime.config.top_k), np.float32)
        )
    assert int(runtime.affinity(0).activations().sum()) == 4 * runtime.config.top_k
