"""The names and the behaviour that the README promises, used as a user would, with a real pager."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from runtimes import run_python, unique_name

import shmroute
from shmroute import (
    AffinityConfig,
    ExpertAffinity,
    MemoryAwareRouter,
    PagingDirection,
    PagingPriority,
    PagingRequest,
    RouterConfig,
    RuntimeConfig,
)
from shmroute.demo.reference import dense_reference
from shmroute.errors import CheckpointError, ConfigError, RuntimeClosedError
from shmroute.shared.segment import segment_path
from shmroute.sources import HuggingFaceSource, SyntheticSource

CHECKPOINT = Path(__file__).resolve().parents[1] / "examples" / "tiny-mixtral"


@pytest.fixture(scope="module")
def runtime() -> Iterator[shmroute.Runtime]:
    config = RuntimeConfig.from_checkpoint(CHECKPOINT, budget="50%")
    with shmroute.create(unique_name(), config, checkpoint=CHECKPOINT, pager=True) as rt:
        yield rt


@pytest.fixture
def hidden() -> np.ndarray:
    with np.load(CHECKPOINT / "activations.npz") as file:
        return file["h"][:6].astype(np.float32)


def test_defaults_are_those_of_the_reference() -> None:
    router, affinity = RouterConfig(), AffinityConfig()
    assert (router.cache_bonus, router.bonus_on, router.memory_aware) == (0.15, "logits", True)
    assert (router.renormalize, router.metrics) == (True, True)
    assert (affinity.decay, affinity.activation_boost, affinity.max_score) == (0.99, 1.0, 1.0)


def test_geometry_comes_from_the_checkpoint_and_slots_from_the_budget() -> None:
    config = RuntimeConfig.from_checkpoint(str(CHECKPOINT), budget="50%")
    assert (config.num_layers, config.num_experts, config.top_k) == (6, 8, 2)
    assert (config.expert_bytes, config.slots, config.max_workers) == (196_608, 24, 32)
    assert config.layer_numbers == (0, 1, 2, 3, 4, 5)
    assert RuntimeConfig.from_checkpoint(CHECKPOINT, budget="4.5MiB").slots == 24
    assert RuntimeConfig.from_checkpoint(CHECKPOINT, budget=5 * 2**20).slots == 26


def test_a_decision_leads_to_the_layers_output(runtime: shmroute.Runtime, hidden: np.ndarray) -> None:
    reference, choices = dense_reference(CHECKPOINT, hidden, 2)
    with shmroute.attach(runtime.name) as rt:
        router = rt.router(layer=3)
        assert isinstance(router, MemoryAwareRouter)
        router.cache_bonus = 0.0
        x = hidden[:, 3]
        decision = router.route(x @ rt.gate(layer=3).T)
        assert decision.experts.dtype == np.int32
        assert decision.weights.dtype == np.float32
        assert (decision.experts == choices[:, 3]).all()
        for request in decision.requests:
            assert request == PagingRequest(3, request.expert, PagingDirection.IN, PagingPriority.NORMAL)
        out = np.zeros_like(x)
        for _, rows, ranks, w in rt.experts(layer=3, experts=decision.experts, timeout=5.0):
            gate = x[rows] @ w["gate"].astype(np.float32).T
            inner = gate / (1 + np.exp(-gate)) * (x[rows] @ w["up"].astype(np.float32).T)
            out[rows] += decision.weights[rows, ranks, None] * (inner @ w["down"].astype(np.float32).T)
        np.testing.assert_allclose(out, reference[:, 3], atol=1e-4)


def test_weights_are_the_checkpoints_read_only_and_zero_copy(runtime: shmroute.Runtime) -> None:
    source = HuggingFaceSource(CHECKPOINT)
    truth = bytearray(196_608)
    source.read_into(3, 5, memoryview(truth))
    source.close()
    with runtime.expert(layer=3, expert=5, timeout=5.0) as w:
        assert w.raw.tobytes() == bytes(truth)
        assert {name: tensor.shape for name, tensor in w.items()} == {
            "gate": (256, 128), "up": (256, 128), "down": (128, 256),
        }  # fmt: skip
        assert str(w["gate"].dtype) == "bfloat16"
        assert np.shares_memory(w["gate"], w.raw)
        with pytest.raises(ValueError, match="read-only"):
            w["gate"][0, 0] = 0
    assert 5 in runtime.resident(layer=3)


def test_hints_and_looking(runtime: shmroute.Runtime) -> None:
    affinity = runtime.affinity(layer=0)
    assert isinstance(affinity, ExpertAffinity)
    affinity.update([1, 4])
    assert affinity.scores()[[1, 4]] == pytest.approx([1.0, 1.0])
    assert affinity.score(4) == pytest.approx(1.0)
    assert affinity.activations()[[1, 4]].tolist() == [1, 1]
    assert affinity.top(2) == [1, 4]
    assert runtime.prefetch(layer=5, experts=[7]) in (0, 1)
    with runtime.expert(layer=5, expert=7):
        pass
    assert runtime.page_out(layer=5, expert=7)
    metrics = runtime.metrics()
    assert metrics.pool_bytes == 24 * 196_608
    assert metrics.as_dict()["pager"]["loads"] >= 1


def test_ids_that_cannot_be_are_refused(runtime: shmroute.Runtime) -> None:
    for use in (
        lambda: runtime.router(layer=6),
        lambda: runtime.gate(layer=-1),
        lambda: runtime.gate_bias(layer=6),
        lambda: runtime.expert(layer=0, expert=8),
        lambda: runtime.experts(layer=0, experts=[0, 8]),
        lambda: runtime.prefetch(layer=0, experts=[-1]),
        lambda: runtime.page_out(layer=0, expert=8),
        lambda: runtime.is_resident(layer=0, expert=8),
        lambda: runtime.is_resident(layer=6, expert=0),
        lambda: runtime.affinity(layer=0).update([1, 1]),
        lambda: runtime.expert(layer=0, expert=0, timeout=-1),
    ):
        with pytest.raises(ValueError, match=r"\d"):
            use()


def test_without_a_checkpoint_routing_works_and_nothing_is_paged() -> None:
    config = RuntimeConfig(num_layers=2, num_experts=64, top_k=6, expert_bytes=4096, slots=32)
    with shmroute.create(unique_name(), config) as rt:
        decision = rt.router(layer=1).route(np.arange(64, dtype=np.float32))
        assert decision.experts.tolist() == [63, 62, 61, 60, 59, 58]
        assert decision.hits == 0
        assert [request.expert for request in decision.requests] == [63, 62, 61, 60, 59, 58]
        with pytest.raises(ConfigError, match="without a checkpoint"):
            rt.gate(layer=0)
        with pytest.raises(ConfigError, match="without a checkpoint"):
            rt.gate_bias(layer=0)
    with pytest.raises(ConfigError, match="checkpoint"):
        shmroute.create(unique_name(), config, pager=True)


def test_a_checkpoint_that_does_not_fit_the_settings_is_refused() -> None:
    config = RuntimeConfig.from_checkpoint(CHECKPOINT, budget="50%")
    with pytest.raises(CheckpointError, match="not the checkpoint"):
        shmroute.create(unique_name(), config, checkpoint=SyntheticSource(6, 8, 16, 32))
    loose = RuntimeConfig(num_layers=5, num_experts=8, top_k=2, expert_bytes=196_608, slots=8)
    with pytest.raises(ConfigError, match="num_layers is 5 in the settings, 6 in the checkpoint"):
        shmroute.create(unique_name(), loose, checkpoint=CHECKPOINT)


def test_a_closed_runtime_refuses_while_another_of_the_same_process_goes_on(runtime: shmroute.Runtime) -> None:
    closed = shmroute.attach(runtime.name)
    closed.close()
    for use in (
        closed.metrics,
        lambda: closed.resident(layer=0),
        lambda: closed.is_resident(layer=0, expert=0),
        lambda: closed.page_out(layer=0, expert=0),
        lambda: closed.prefetch(layer=0, experts=[0]),
        lambda: closed.router(layer=0),
        lambda: closed.affinity(layer=0),
        lambda: closed.gate(layer=0),
        lambda: closed.gate_bias(layer=0),
        lambda: closed.expert(layer=0, expert=0),
        lambda: closed.experts(layer=0, experts=[0]),
    ):
        with pytest.raises(RuntimeClosedError):
            use()
    assert runtime.metrics().slots == 24


def test_numpys_narrow_integers_index_like_pythons(runtime: shmroute.Runtime) -> None:
    decision = runtime.router(layer=np.int32(2)).route(np.arange(8, dtype=np.float32))
    with runtime.expert(layer=np.int16(2), expert=decision.experts[0]) as w:
        assert w["gate"].shape == (256, 128)
    assert [expert for expert, *_ in runtime.experts(np.uint8(2), decision.experts)] == sorted(decision.experts)[::-1]
    assert runtime.page_out(np.int8(2), np.int16(0))


def test_an_empty_batch_goes_all_the_way(runtime: shmroute.Runtime) -> None:
    decision = runtime.router(layer=0).route(np.empty((0, 8), np.float32))
    assert decision.experts.shape == (0, 2)
    assert list(runtime.experts(0, decision.experts)) == []
    assert list(runtime.experts(0, [])) == []


@pytest.mark.parametrize("experts", [3, [[[1, 2]]]])
def test_expert_ids_of_another_rank_are_refused(runtime: shmroute.Runtime, experts: object) -> None:
    with pytest.raises(ValueError, match=r"\[k\] or \[T, k\]"):
        runtime.experts(0, experts)


def test_all_runtimes_of_a_process_have_one_router_a_layer(runtime: shmroute.Runtime) -> None:
    before = len(runtime._attachment._before_close)
    for _ in range(5):
        with shmroute.attach(runtime.name) as again:
            assert again.router(layer=4) is runtime.router(layer=4)
    assert len(runtime._attachment._before_close) <= before + 1


def test_without_a_checkpoint_an_expert_that_is_not_resident_is_an_error_at_once() -> None:
    config = RuntimeConfig(num_layers=1, num_experts=8, top_k=2, expert_bytes=4096, slots=4)
    with shmroute.create(unique_name(), config) as rt, pytest.raises(ConfigError, match="without a checkpoint"):
        rt.expert(0, 0, timeout=60).__enter__()


def test_a_runtime_that_nobody_closed_is_closed_at_exit() -> None:
    name = unique_name()
    code = (
        "import sys, shmroute; from shmroute import RuntimeConfig; "
        "shmroute.create(sys.argv[1], RuntimeConfig(1, 8, 2, 4096, 4)).router(0)"
    )
    run_python(code, name)
    assert not segment_path(name).exists()


def test_a_bonus_reads_back_as_it_was_written(runtime: shmroute.Runtime) -> None:
    router = runtime.router(layer=5)
    for bonus in (0.3, 0.15, 0.0, 123.456789):
        router.cache_bonus = bonus
        assert router.cache_bonus == bonus


def test_closing_from_a_signal_handler_in_the_middle_of_a_call_is_an_error(runtime: shmroute.Runtime) -> None:
    with shmroute.attach(runtime.name) as rt:

        def handle(number: int, frame: object) -> None:
            rt.close()

        former = signal.signal(signal.SIGALRM, handle)
        try:
            with pytest.raises(RuntimeError, match="signal handler"), rt._attachment.in_use():
                signal.raise_signal(signal.SIGALRM)
        finally:
            signal.signal(signal.SIGALRM, former)
        assert rt.metrics().slots == 24
