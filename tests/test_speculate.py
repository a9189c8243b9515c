"""`Runtime.speculate`: the next layer's gate, a layer ahead; and what becomes of prefetches in a live pager."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from runtimes import unique_name
from safetensors.numpy import save_file

import shmroute
from shmroute import PagerConfig, PagingPriority, Runtime, RuntimeConfig
from shmroute.demo.recording import Recording
from shmroute.pager.process import start_pager
from shmroute.shared.layout import HEADER_OWNER, HEADER_TURNED_DOWN
from shmroute.shared.metrics import Predictor
from shmroute.shared.ring import ring_pop
from shmroute.shared.turned_down import PROBE
from shmroute.shared.words import request_speculative

CHECKPOINT = Path(__file__).resolve().parents[1] / "examples" / "tiny-mixtral"
GPT_OSS = {"gate_up_proj": (4, 8, 12), "gate_up_proj_bias": (4, 12), "down_proj": (4, 6, 8), "down_proj_bias": (4, 8)}
"""Of 4 experts."""


@pytest.fixture
def hidden() -> np.ndarray:
    return Recording.load(CHECKPOINT).hidden


def made(pager: bool, **settings: object) -> Runtime:
    config = RuntimeConfig.from_checkpoint(CHECKPOINT, "25%", pager=PagerConfig(**settings))
    return shmroute.create(unique_name(), config, pager=pager, progress=None)


@pytest.fixture
def runtime() -> Iterator[Runtime]:
    """Without a pager: requests stay on the ring."""
    with made(pager=False) as runtime:
        yield runtime


def test_it_asks_for_what_the_next_gate_says_marked_as_speculation(runtime: Runtime, hidden: np.ndarray) -> None:
    x = hidden[7, 2]
    expected = np.argsort(-(runtime.gate(3) @ x))[:2].tolist()
    requests = runtime.speculate(2, x)
    assert [(request.layer, request.expert) for request in requests] == [(3, expert) for expert in expected]
    assert {request.priority for request in requests} == {PagingPriority.PREFETCH}
    runtime.prefetch(5, [1])
    segment = runtime._attachment.segment
    ring, bits = segment.address + segment.layout.ring, segment.layout.ring_bits
    assert [request_speculative(ring_pop(ring, bits)) for _ in range(3)] == [1, 1, 0]
    assert runtime.speculate(2, x) == []  # requested already


def test_a_batch_asks_for_each_expert_once_those_of_most_weight_first(runtime: Runtime, hidden: np.ndarray) -> None:
    x = hidden[:40, 0]
    requests = runtime.speculate(0, x)
    chosen = np.argsort(-(x @ runtime.gate(1).T), axis=1)[:, :2]
    assert sorted(request.expert for request in requests) == np.unique(chosen).tolist()
    assert requests[0].expert == np.bincount(chosen.ravel()).argmax()


def test_logits_that_were_estimated_elsewhere(runtime: Runtime, hidden: np.ndarray) -> None:
    logits = hidden[:3, 2] @ runtime.gate(4).T
    requests = runtime.expect(4, logits)
    assert {request.expert for request in requests} == set(np.argsort(-logits, axis=1)[:, :2].ravel().tolist())
    assert {request.layer for request in requests} == {4}
    assert runtime.expect(4, logits[0]) == []  # requested already
    for wrong in (logits[:, :7], logits.astype(np.float64), np.full(8, np.nan, np.float32), [1.0] * 8):
        with pytest.raises(ValueError, match=r"logits must be finite float32 \[8\] or \[T, 8\]"):
            runtime.expect(4, wrong)
    with pytest.raises(ValueError, match="layer"):
        runtime.expect(6, logits)


def test_what_a_router_adds_to_its_logits_counts(tmp_path: Path, runtime: Runtime) -> None:
    """Of all families only gpt-oss has such a bias."""
    assert runtime.gate_bias(3) is None
    random = np.random.default_rng(0)
    bias = np.array([0.0, 30.0, 0.0, 60.0], np.float32)
    tensors = {}
    for layer in range(2):
        stem = f"model.layers.{layer}.mlp."
        tensors |= {f"{stem}experts.{name}": np.zeros(shape, np.float32) for name, shape in GPT_OSS.items()}
        tensors[f"{stem}router.weight"] = random.standard_normal((4, 8)).astype(np.float32)
        tensors[f"{stem}router.bias"] = bias * layer
    save_file(tensors, tmp_path / "model.safetensors")
    settings = {"model_type": "gpt_oss", "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 2,
                "num_local_experts": 4, "num_experts_per_tok": 2}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = RuntimeConfig.from_checkpoint(tmp_path, "50%")
    with shmroute.create(unique_name(), config, progress=None) as biased:
        for layer in range(2):
            assert (biased.gate_bias(layer) == bias * layer).all()
        x = -biased.gate(1)[1]  # the last that it would choose, were it not for the bias
        assert np.argmin(biased.gate(1) @ x) == 1
        assert [request.expert for request in biased.speculate(0, x)] == [3, 1]


def test_after_the_last_layer_there_is_nothing_to_ask_for(runtime: Runtime, hidden: np.ndarray) -> None:
    assert runtime.speculate(5, hidden[0, 5]) == []


@pytest.mark.parametrize("settings", [{"prefetch": 0}, {"predictors": ("affinity",)}], ids=str)
def test_where_the_settings_leave_no_place_for_it_nothing_is_asked_for(
    settings: dict[str, object], hidden: np.ndarray
) -> None:
    with made(pager=False, **settings) as runtime:
        assert runtime.speculate(0, hidden[0, 0]) == []


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (np.zeros(127, np.float32), r"float32 \[127\]"),
        (np.zeros((2, 2, 128), np.float32), r"float32 \[2, 2, 128\]"),
        (np.zeros(128), r"float64 \[128\]"),
        (np.full(128, np.nan, np.float32), "with NaN or inf"),
        (np.float32(1), "1.0"),
        ([0.0] * 128, r"\[0.0"),
    ],
    ids=["size", "rank", "dtype", "nan", "scalar", "list"],
)
def test_what_is_no_hidden_state_is_refused(runtime: Runtime, bad: object, what: str) -> None:
    with pytest.raises(ValueError, match=rf"hidden must be finite float32 \[128\] or \[T, 128\], not .*{what}"):
        runtime.speculate(0, bad)  # type: ignore[arg-type]


def turn_down(runtime: Runtime, word: int) -> None:
    runtime._attachment.segment.write(HEADER_TURNED_DOWN, word)


def test_while_the_gate_is_turned_down_workers_neither_think_nor_ask_but_for_probes(
    runtime: Runtime, hidden: np.ndarray
) -> None:
    calls = []

    def logits() -> np.ndarray:
        calls.append(1)
        return hidden[0, 3] @ runtime.gate(4).T

    turn_down(runtime, 1 << Predictor.GATE)
    asked = [runtime.expect(4, logits) for _ in range(PROBE)]
    assert [bool(requests) for requests in asked] == [False] * (PROBE - 1) + [True]
    assert len(calls) == 1
    assert runtime.speculate(2, hidden[0, 2]) == []
    assert runtime.metrics().total.counters["withheld"] == PROBE
    turn_down(runtime, ~(1 << Predictor.GATE))  # all others
    assert runtime.speculate(2, hidden[0, 2])


def test_what_is_wrong_is_refused_whether_it_is_wanted_or_not(runtime: Runtime) -> None:
    with pytest.raises(ValueError, match="logits must be finite"):
        runtime.expect(4, lambda: np.zeros(7, np.float32))
    turn_down(runtime, 1 << Predictor.GATE)
    with pytest.raises(ValueError, match="hidden must be finite"):
        runtime.speculate(0, np.zeros(7, np.float32))
    with pytest.raises(ValueError, match="layer"):
        runtime.expect(6, lambda: np.zeros(8, np.float32))


def test_the_cpu_time_of_speculating_is_counted(runtime: Runtime, hidden: np.ndarray) -> None:
    def logits() -> np.ndarray:
        until = time.thread_time() + 0.02
        while time.thread_time() < until:
            pass
        return hidden[0, 3] @ runtime.gate(4).T

    runtime.expect(4, logits)
    counted = runtime.metrics().total.counters["speculating_ns"]
    assert counted >= 20_000_000
    turn_down(runtime, 1 << Predictor.GATE)
    runtime.expect(4, logits)
    assert runtime.metrics().total.counters["speculating_ns"] == counted


@pytest.mark.parametrize("word", [-1, 1 << 62, 1 << Predictor.HINT], ids=hex)
def test_nothing_but_speculation_depends_on_who_is_turned_down(word: int, hidden: np.ndarray) -> None:
    with made(pager=True, tick=10.0) as runtime:  # so that the pager does not correct the word
        turn_down(runtime, word)
        assert runtime.prefetch(5, [1]) == 1
        for layer in range(6):
            decision = runtime.router(layer).route(runtime.gate(layer) @ hidden[0, layer])
            runtime.speculate(layer, hidden[0, layer])
            assert len([expert for expert, *_ in runtime.experts(layer, decision.experts)]) == 2


def test_a_pager_tells_workers_whose_thinking_saves_nothing(hidden: np.ndarray) -> None:
    config = RuntimeConfig.from_checkpoint(CHECKPOINT, "100%", pager=PagerConfig(tick=0.05))
    with shmroute.create(unique_name(), config, pager=True, progress=None) as runtime:
        for layer in range(6):
            for expert in range(8):
                with runtime.expert(layer, expert):
                    pass  # now there is nothing left to foresee
        deadline = time.monotonic() + 60
        while not runtime.metrics().total.counters["withheld"] and time.monotonic() < deadline:
            runtime.speculate(0, hidden[0, 0])
        counters = runtime.metrics().total.counters
        assert counters["withheld"] > 0
        assert counters["speculating_ns"] > 0


def test_a_dead_pager_leaves_who_is_turned_down_and_its_successor_begins_anew(hidden: np.ndarray) -> None:
    with made(pager=True) as runtime:
        segment = runtime._attachment.segment
        assert runtime._pager is not None
        runtime._pager.kill()
        runtime._pager.wait()
        turn_down(runtime, 1 << Predictor.GATE)
        assert runtime.speculate(2, hidden[0, 2]) == []
        assert segment.read(HEADER_TURNED_DOWN) == 1 << Predictor.GATE
        runtime._pager = start_pager(segment, segment.read(HEADER_OWNER))
        deadline = time.monotonic() + 20
        while segment.read(HEADER_TURNED_DOWN) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert runtime.speculate(2, hidden[0, 2])


def test_a_live_pager_counts_what_becomes_of_each_predictors_prefetches(hidden: np.ndarray) -> None:
    with made(pager=True) as runtime:
        for token in range(120):
            for layer in range(6):
                decision = runtime.router(layer).route(runtime.gate(layer) @ hidden[token, layer])
                runtime.speculate(layer, hidden[token, layer])
                for _ in runtime.experts(layer, decision.experts):
                    pass
        deadline = time.monotonic() + 20
        while (pager := runtime.metrics().pager).counters["queued"] and time.monotonic() < deadline:
            time.sleep(0.05)
        gate = pager.predictors["gate"]
        assert gate["issued"] > 0  # how many is the arbiter's to say, by how long loads took
        assert gate["issued"] >= gate["completed"] + gate["overtaken"] + gate["cancelled"]
        assert gate["completed"] >= gate["useful"] + gate["wasted"]
        assert gate["useful"] + gate["overtaken"] > 0
        completed = sum(outcomes["completed"] for outcomes in pager.predictors.values())
        assert completed == pager.counters["prefetches"]
        assert pager.prefetch_accuracy == pytest.approx(
            sum(outcomes["useful"] for outcomes in pager.predictors.values()) / completed
        )
        assert pager.as_dict()["predictors"]["gate"] == gate
