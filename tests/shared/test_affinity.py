"""Affinity: lazy decay is the eager rule, whatever the clock says and whoever comes late."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence

import numba
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import types
from runtimes import Memory, clock_of, logits_choosing, small_config, start_clock, unique_name

from shmroute.config import AffinityConfig
from shmroute.lifecycle import create
from shmroute.runtime import Runtime
from shmroute.shared.affinity import activate, decay_power, power_table, score_of
from shmroute.shared.atomic import load, store
from shmroute.shared.words import LOW32, SCORE_ONE, high32, pack_affinity

BOOSTS = (1.0, 0.3, 0.05)
NEAR_WRAPS = (0, 2**28 - 40, 2**31 - 40, 2**32 - 40, 2**33 + 2**28 - 40)
ULP = 2**-32


def eager(
    ticks: Sequence[Sequence[int]], num_experts: int, decay: float, boost: float, max_score: float = 1.0
) -> npt.NDArray[np.float64]:
    """The rule, written plainly: at every tick all scores decay, then the activated ones grow."""
    scores = np.zeros(num_experts)
    for experts in ticks:
        scores *= decay
        chosen = list(experts)
        scores[chosen] = np.minimum(scores[chosen] + boost, max_score)
    return scores


def random_sets(seed: int, count: int, num_experts: int, size: int) -> list[list[int]]:
    """Random activations."""
    source = random.Random(seed)
    return [source.sample(range(num_experts), size) for _ in range(count)]


@contextlib.contextmanager
def routing_with(**affinity: float) -> Iterator[Runtime]:
    """A runtime of two layers with 8 experts each, with its own affinity settings."""
    config = small_config(num_layers=2, affinity=AffinityConfig(**affinity))
    with create(unique_name(), config, progress=None) as runtime:
        yield runtime


# ------------------------------------------------------------------ the rule


@pytest.mark.parametrize("boost", BOOSTS)
@pytest.mark.parametrize("decay", [0.99, 0.5, 1.0])
def test_a_hundred_updates_of_three_experts_follow_the_rule(boost: float, decay: float) -> None:
    with routing_with(decay=decay, activation_boost=boost) as runtime:
        affinity = runtime.affinity(0)
        for _ in range(100):
            affinity.update([0, 2, 5])
        assert affinity.scores() == pytest.approx(eager([[0, 2, 5]] * 100, 8, decay, boost), abs=0.01)
        assert affinity.activations().tolist() == [100, 0, 100, 0, 0, 100, 0, 0]
        assert affinity.top(3) == [0, 2, 5]
        assert affinity.score(2) == affinity.scores()[2]


@pytest.mark.parametrize("boost", BOOSTS)
@pytest.mark.parametrize("start", NEAR_WRAPS)
def test_a_hundred_random_updates_follow_the_rule_across_every_wrap(boost: float, start: int) -> None:
    updates = random_sets(start, 100, 8, 3)
    with routing_with(activation_boost=boost) as runtime:
        start_clock(runtime, 0, start)
        affinity = runtime.affinity(0)
        for experts in updates:
            affinity.update(experts)
        assert affinity.scores() == pytest.approx(eager(updates, 8, 0.99, boost), abs=1e-6)
        assert clock_of(runtime) == start + 100


@pytest.mark.parametrize("boost", BOOSTS)
def test_scores_stay_under_the_configured_maximum(boost: float) -> None:
    updates = random_sets(1, 100, 8, 4)
    with routing_with(activation_boost=boost, max_score=0.4) as runtime:
        for experts in updates:
            runtime.affinity(0).update(experts)
        assert runtime.affinity(0).scores() == pytest.approx(eager(updates, 8, 0.99, boost, 0.4), abs=1e-6)
        assert runtime.affinity(0).scores().max() <= np.float32(0.4)


@pytest.mark.parametrize("boost", BOOSTS)
@settings(max_examples=25)
@given(data=st.data())
def test_a_batch_is_its_tokens_one_by_one(boost: float, data: st.DataObject) -> None:
    decay = data.draw(st.sampled_from([0.99, 0.9, 0.999, 0.3]))
    pairs = st.lists(st.integers(0, 7), min_size=2, max_size=2, unique=True)
    batches = data.draw(st.lists(st.lists(pairs, min_size=1, max_size=40), min_size=1, max_size=3))
    start = data.draw(st.sampled_from(NEAR_WRAPS))
    with routing_with(decay=decay, activation_boost=boost) as runtime:
        for layer in range(2):
            start_clock(runtime, layer, start)
        for batch in batches:
            logits = logits_choosing(batch, 8)
            runtime.router(0).route(logits)
            for row in logits:
                runtime.router(1).route(row)
        whole, single = runtime.affinity(0), runtime.affinity(1)
        assert whole.scores() == pytest.approx(single.scores(), abs=2**-20)
        tokens = [choice for batch in batches for choice in batch]
        assert whole.scores() == pytest.approx(eager(tokens, 8, decay, boost), abs=2**-20)
        assert whole.activations().tolist() == single.activations().tolist()
        assert clock_of(runtime, 0) == clock_of(runtime, 1) == start + len(tokens)


# ------------------------------------------------------------------ decay


@settings(max_examples=50)
@given(
    decay=st.floats(0.001, 1.0),
    now=st.integers(0, 2**40),
    words=st.lists(st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**20)), min_size=8, max_size=8),
)
def test_decay_of_all_experts_is_the_scalar_decay_of_each(
    shared_runtime: Runtime, decay: float, now: int, words: list[tuple[int, int]]
) -> None:
    segment = shared_runtime._attachment.segment
    start_clock(shared_runtime, 0, now)
    packed = [pack_affinity((now - age) & LOW32, score) for score, age in words]
    for expert, word in enumerate(packed):
        segment.write(segment.layout.affinity(0, expert), word)
    affinity = shared_runtime.affinity(0)
    table = power_table(decay)
    affinity._powers = table.ctypes.data
    scalar = [score_of(word) * decay_power(table.ctypes.data, (now - high32(word)) & LOW32) for word in packed]
    assert affinity.scores().tolist() == np.array(scalar, np.float32).tolist()


@given(decay=st.floats(1e-6, 1.0), age=st.integers(0, 2**32 - 1))
def test_the_power_table_holds_every_age(decay: float, age: int) -> None:
    table = power_table(decay)
    assert decay_power(table.ctypes.data, age) == pytest.approx(decay**age, rel=1e-9, abs=1e-300)


@pytest.fixture(scope="module")
def shared_runtime() -> Iterator[Runtime]:
    """One runtime for many examples."""
    with routing_with(activation_boost=0.3) as runtime:
        yield runtime


@pytest.mark.parametrize("boost", BOOSTS)
@settings(max_examples=20)
@given(data=st.data())
def test_without_activation_a_score_never_rises(boost: float, data: st.DataObject) -> None:
    """INV-2, over restamps and wraps too."""
    decay = data.draw(st.sampled_from([0.5, 0.99, 0.9999999, 1.0]))
    scores = data.draw(st.lists(st.floats(0, 1), min_size=8, max_size=8))
    with routing_with(decay=decay, activation_boost=boost) as runtime:
        start_clock(runtime, 0, data.draw(st.sampled_from([2**28 - 10, 2**32 - 10])), scores)
        affinity = runtime.affinity(0)
        before = affinity.scores()
        for _ in range(20):
            affinity.update([7])
            after = affinity.scores()
            assert (after[:7] <= before[:7]).all()
            before = after


@pytest.mark.parametrize("boundary", [2**28, 5 * 2**28, 2**31, 2**32])
def test_crossing_a_multiple_of_two_to_the_28_restamps_every_word(boundary: int) -> None:
    with routing_with(activation_boost=0.3) as runtime:
        segment = runtime._attachment.segment
        start_clock(runtime, 0, boundary - 100, [0.5] * 8)
        segment.write(segment.layout.clock, boundary - 3)

        def stamps() -> list[int]:
            words = [segment.read(segment.layout.affinity(0, expert)) for expert in range(1, 8)]
            return [high32(word) for word in words]

        runtime.affinity(0).update([0])
        assert stamps() == [(boundary - 100) & LOW32] * 7
        runtime.router(0).route(logits_choosing([[0, 1]] * 5, 8))
        assert stamps() == [(boundary + 3) & LOW32] * 7
        assert runtime.affinity(0).scores()[2:] == pytest.approx([0.5 * 0.99**103] * 6, abs=1e-7)


# ------------------------------------------------------------------ late batches


@numba.njit(
    types.void(
        types.int64, types.int64, types.int64, types.int64, types.int64, types.float64, types.float64, types.float64
    ),
    _nrt=False,
)
def activate_compiled(
    word: int, clock: int, table: int, start: int, end: int, b: float, c: float, max_score: float
) -> None:
    activate(word, clock, table, start, end, b, c, max_score)


@pytest.mark.parametrize("apply", [activate, activate_compiled], ids=["interpreted", "compiled"])
@pytest.mark.parametrize("boost", BOOSTS)
@settings(max_examples=60)
@given(data=st.data())
def test_a_late_batch_is_within_its_bounds(apply: Callable[..., None], boost: float, data: st.DataObject) -> None:
    decay, max_score = 0.99, data.draw(st.sampled_from([1.0, 0.6]))
    start = data.draw(st.sampled_from([1000, 2**31 - 5, 2**32 - 5]))
    length, ahead = data.draw(st.integers(1, 50)), data.draw(st.integers(1, 200))
    score = data.draw(st.floats(0, max_score))
    end, stamped = start + length, start + ahead
    now = max(end, stamped) + data.draw(st.integers(0, 10))
    # One activation at a tick of the batch: x -> min(max d^r, x d^T + boost d^r), with r ticks after it.
    left = data.draw(st.integers(0, length - 1))
    b, c = boost * decay**left, max_score * decay**left

    table, block = power_table(decay), Memory(16)
    store(block.address, pack_affinity(stamped & LOW32, round(score * SCORE_ONE)))
    store(block.address + 8, now)
    apply(block.address, block.address + 8, table.ctypes.data, start, end, b, c, max_score)
    word = load(block.address)
    block.close()

    tick = max(stamped, end)
    assert high32(word) == tick & LOW32
    decayed = score * decay ** (tick - stamped)
    worth = min(b, c) * decay ** (tick - end)
    assert score_of(word) >= min(decayed, max_score) - 2 * ULP
    assert score_of(word) >= worth - 2 * ULP
    assert score_of(word) == pytest.approx(min(max_score, decayed + worth), abs=2 * ULP)


@pytest.mark.parametrize("boost", BOOSTS)
@given(data=st.data())
@settings(max_examples=30)
def test_a_batch_in_clock_order_is_exact(boost: float, data: st.DataObject) -> None:
    decay, start, length = 0.9, data.draw(st.integers(100, 2**33)), data.draw(st.integers(1, 20))
    age, score = data.draw(st.integers(0, 50)), data.draw(st.floats(0, 1))
    table, block = power_table(decay), Memory(16)
    store(block.address, pack_affinity((start - age) & LOW32, round(score * SCORE_ONE)))
    store(block.address + 8, start + length)
    activate(block.address, block.address + 8, table.ctypes.data, start, start + length, boost, 1.0, 1.0)
    word = load(block.address)
    block.close()
    assert score_of(word) == pytest.approx(min(1.0, score * decay ** (age + length) + boost), abs=2 * ULP)
    assert high32(word) == (start + length) & LOW32


# ------------------------------------------------------------------ many at once


def test_threads_lose_no_activation_and_no_tick(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime(num_experts=16, affinity=AffinityConfig(activation_boost=0.05))
    batches, tokens = 150, 7

    def work(seed: int) -> None:
        source = np.random.default_rng(seed)
        experts, weights = np.empty((tokens, 2), np.int32), np.empty((tokens, 2), np.float32)
        for _ in range(batches):
            runtime.router(0).route_into(source.normal(size=(tokens, 16)).astype(np.float32), experts, weights)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    routed = 4 * batches * tokens
    assert runtime.affinity(0).activations().sum() == routed * 2
    assert clock_of(runtime) == routed
    assert runtime.metrics().total.counters["tokens"] == routed
    scores = runtime.affinity(0).scores()
    assert (scores >= 0).all()
    assert (scores <= 1).all()


WORKER = """
import sys
import numpy as np
import shmroute
source = np.random.default_rng(int(sys.argv[2]))
with shmroute.attach(sys.argv[1], progress=None) as runtime:
    router = runtime.router(0)
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(400):
        router.route(source.normal(size=(5, 8)).astype(np.float32))
"""


def test_processes_lose_no_activation_and_no_tick(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime(affinity=AffinityConfig(activation_boost=0.3))
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, runtime.name, str(seed)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for seed in range(3)
    ]  # fmt: skip
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    assert len(runtime.metrics().workers) == 3
    for worker in workers:
        worker.communicate("go\n")
        assert worker.returncode == 0
    assert runtime.affinity(0).activations().sum() == 3 * 400 * 5 * 2
    assert clock_of(runtime) == 3 * 400 * 5


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("experts", "complaint"),
    [
        ([8], "expert id 8 is outside 0 … 7"),
        ([0, -1], "expert id -1 is outside"),
        ([1.5], "must be integers, not float64"),
        ([3, 3], "names one twice"),
        (np.array([2**63], np.uint64), "outside"),
    ],
)
def test_impossible_experts_are_refused_and_change_nothing(
    shared_runtime: Runtime, experts: list[int], complaint: str
) -> None:
    affinity, clock = shared_runtime.affinity(0), clock_of(shared_runtime)
    before = affinity.activations().tolist()
    with pytest.raises(ValueError, match=complaint):
        affinity.update(experts)
    assert clock_of(shared_runtime) == clock
    assert affinity.activations().tolist() == before


def test_a_tick_without_activations_only_decays(make_runtime: Callable[..., Runtime]) -> None:
    affinity = make_runtime().affinity(0)
    affinity.update([1])
    affinity.update([])
    assert affinity.score(1) == pytest.approx(0.99)


def test_the_top_experts_are_in_order_and_ties_go_to_the_lower_id(make_runtime: Callable[..., Runtime]) -> None:
    affinity = make_runtime().affinity(0)
    affinity.update([6, 1])
    affinity.update([3])
    assert affinity.top(4) == [3, 1, 6, 0]
