"""Models whose experts are lent from a GPU's cache, on a stand-in for the GPU, compute what Transformers' own do."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from family_models import FAMILIES, SHIPPED, stock
from late_device import LateDevice
from test_identity import TOLERANCE, logits, tokens

from shmroute import RouterConfig, Runtime, RuntimeConfig, TraceConfig, create
from shmroute.errors import ConfigError, DeviceError
from shmroute.integrations.transformers import load, loading
from shmroute.integrations.transformers.cuda import CudaDevice

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> LateDevice:
    """What ``device="cuda:0"`` means in this test."""
    late = LateDevice(prompt=True)
    monkeypatch.setattr(loading, "CudaDevice", lambda name: late)
    return late


def least_budget(runtime: Runtime) -> int:
    """Of a cache for a token's experts of a layer and one more."""
    return (runtime.config.top_k + 1) * runtime.config.slot_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_generated_tokens(
    family: str, checkpoint: Callable[..., Path], runtime_of: Callable[..., Any], device: LateDevice
) -> None:
    """With room for the experts of one layer, and so far fewer than a batch wants."""
    folder = checkpoint(family)
    runtime = runtime_of(folder)
    ours = load(folder, runtime, device="cuda:0", device_budget=least_budget(runtime))
    theirs, ids = stock(folder), tokens(3, 17)
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), rtol=0, atol=TOLERANCE)
    wanted = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(ours.generate(ids[:1], **wanted), theirs.generate(ids[:1], **wanted))
    counters = runtime.metrics().total.counters
    assert counters["device_copies"] == device.copies > runtime.config.top_k + 1


def test_the_shipped_model_with_all_its_experts_there(runtime_of: Callable[..., Any], device: LateDevice) -> None:
    """Each is copied once, whatever the pager evicts."""
    runtime = runtime_of(SHIPPED, budget="25%")
    ours = load(SHIPPED, runtime, device="cuda:0", device_budget="100%")
    theirs = stock(SHIPPED, torch.bfloat16)
    ids = transformers.AutoTokenizer.from_pretrained(SHIPPED)("In the beginning", return_tensors="pt").input_ids
    wanted = {"max_new_tokens": 48, "do_sample": False}
    assert torch.equal(ours.generate(ids, **wanted), theirs.generate(ids, **wanted))
    counters = runtime.metrics().total.counters
    assert device.copies <= 48
    assert counters["device_hits"] > 0.8 * (counters["hits"] + counters["misses"])
    assert counters["leases"] == device.copies


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_bonus_prefers_what_is_there(share: float, device: LateDevice) -> None:
    """All experts are in host memory, so only the GPU can make a difference, and none if the share is whole."""
    config = RuntimeConfig.from_checkpoint(SHIPPED, "100%", router=RouterConfig(cache_bonus=0.5, host_share=share))
    with create(f"test-two-tiers-{share}", config, pager=True) as runtime:
        for layer in range(config.num_layers):
            for expert in range(config.num_experts):
                with runtime.expert(layer, expert):
                    pass
        model = load(SHIPPED, runtime, device="cuda:0", device_budget="50%")
        model.generate(tokens(1, 4), max_new_tokens=48, do_sample=False)
        counters = runtime.metrics().total.counters
    assert counters["misses"] == 0
    assert (counters["changed"] > 0) == (share == 0)
    assert counters["device_hits"] > 0


def test_several_models_share_a_process_s_cache(runtime_of: Callable[..., Any], device: LateDevice) -> None:
    runtime = runtime_of(SHIPPED)
    models = [load(SHIPPED, runtime, device="cuda:0", device_budget="30%") for _ in range(2)]
    assert torch.equal(logits(models[0], IDS), logits(models[1], IDS))
    assert len(device.locked) == 1
    with pytest.raises(ConfigError, match="give the same device and budget, or use another process"):
        load(SHIPPED, runtime, device="cuda:0", device_budget="40%")


def test_speculation_asks_for_nothing_that_is_there(runtime_of: Callable[..., Any], device: LateDevice) -> None:
    runtime = runtime_of(SHIPPED, budget="25%", predictors=("gate",))
    model = load(SHIPPED, runtime, speculate=True, device="cuda:0", device_budget="60%")
    model.generate(tokens(1, 4), max_new_tokens=24, do_sample=False)
    assert runtime.metrics().pager.predictors["gate"]["issued"] > 0
    there = [expert for expert in range(8) if runtime.router(1).is_on_device(expert)][:2]
    runtime._speculation._turn[:] = 0  # of the times that one is made though the pager has turned them down
    row = torch.zeros(8)
    row[there] = 5
    assert runtime.expect(1, row.numpy()) == []


def test_a_model_that_was_moved(runtime_of: Callable[..., Any], device: LateDevice) -> None:
    model = load(SHIPPED, runtime_of(SHIPPED), device="cuda:0", device_budget="50%")
    with pytest.raises(ConfigError, match=r"experts are torch\.bfloat16 on cpu and used as they are"):
        model.to("meta")(IDS.to("meta"))


# ------------------------------------------------------------------ what is refused, before any work


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"device": "cuda:0"}, "device is 'cuda:0' and device_budget None: give both"),
        ({"device_budget": "50%"}, "device is None and device_budget '50%': give both"),
        ({"device": "cuda:0", "device_budget": "4%"}, r"a device budget of '4%' holds 1 experts, but a token's 2"),
        ({"device": "cuda:0", "device_budget": "1 potato"}, "no size"),
    ],
)
def test_settings_that_do_not_do(
    settings: dict[str, Any], complaint: str, runtime_of: Callable[..., Any], device: LateDevice
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load(SHIPPED, runtime_of(SHIPPED), **settings)
    assert not device.locked


@pytest.mark.parametrize(
    ("name", "available", "complaint"),
    [
        ("cpu", True, "device must be a GPU such as 'cuda:0', not 'cpu'; leave it out to compute on the CPU"),
        ("gpu", True, "device must be a GPU such as 'cuda:0', not 'gpu'"),
        (7.5, True, "device must be a GPU such as 'cuda:0', not 7.5"),
        ("cuda:2", True, "device is 'cuda:2', but torch finds 2 GPUs here: cuda:0 to cuda:1"),
        (
            "cuda",
            False,
            r"device is 'cuda', but torch .* cannot use one: it (is built without CUDA|finds no usable GPU)",
        ),
    ],
)
def test_devices_that_are_none(
    name: Any, available: bool, complaint: str, runtime_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match=complaint):
        load(SHIPPED, runtime_of(SHIPPED), device=name, device_budget="50%")


def test_a_recording_of_logits_could_not_be_verified(tmp_path: Path, device: LateDevice) -> None:
    for with_logits in (True, False):
        config = RuntimeConfig.from_checkpoint(SHIPPED, "50%", trace=TraceConfig(str(tmp_path), logits=with_logits))
        with create(f"test-device-trace-{with_logits}", config, pager=True) as runtime:
            if with_logits:
                with pytest.raises(ConfigError, match="records logits, so that choices can be verified"):
                    load(SHIPPED, runtime, device="cuda:0", device_budget="50%")
            else:
                logits(load(SHIPPED, runtime, device="cuda:0", device_budget="50%"), IDS)
                assert runtime.metrics().total.counters["recorded"] > 0


def test_a_code_that_the_cuda_runtime_returns_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """It raises nothing itself. With a CUDA runtime that is none, so this shows what is asked, not what comes of it."""
    asked: list[tuple[int, ...]] = []

    def register(*arguments: int) -> int:
        asked.append(arguments)
        return 0 if len(asked) == 1 else 712

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=register))
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "CudaError", lambda code: f"code {code}")
    device = object.__new__(CudaDevice)
    device.torch_device = torch.device("cuda", 1)
    device.page_lock(4096, 8192)
    with pytest.raises(DeviceError, match="cudaHostRegister on cuda:1 failed: code 712"):
        device.page_lock(4096, 8192)
    assert asked == [(4096, 8192, 0)] * 2


# ------------------------------------------------------------------ with a GPU


gpu = pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="NO GPU HERE: what shmroute.integrations.transformers.cuda asks of one is NOT tested",
)


@gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_generated_tokens_on_a_gpu(
    family: str, checkpoint: Callable[..., Path], runtime_of: Callable[..., Any]
) -> None:
    folder = checkpoint(family)
    runtime = runtime_of(folder)
    ours = load(folder, runtime, device="cuda", device_budget=least_budget(runtime))
    theirs, ids = stock(folder).to("cuda"), tokens(3, 17).to("cuda")
    torch.testing.assert_close(logits(ours, ids), logits(theirs, ids), rtol=0, atol=1e-4)
    wanted = {"max_new_tokens": 16, "do_sample": False}
    assert torch.equal(ours.generate(ids[:1], **wanted), theirs.generate(ids[:1], **wanted))
    assert runtime.metrics().total.counters["device_copies"] > runtime.config.top_k + 1


@gpu
def test_the_pool_is_page_locked_while_the_runtime_is_open(runtime_of: Callable[..., Any]) -> None:
    runtime = runtime_of(SHIPPED)
    load(SHIPPED, runtime, device="cuda", device_budget="30%")
    with runtime.expert(0, 0) as weights:
        assert torch.frombuffer(weights.raw, dtype=torch.uint8).is_pinned()
    again = CudaDevice("cuda")
    segment = runtime._attachment.segment
    with pytest.raises(DeviceError, match="cudaHostRegister on cuda:0 failed"):
        again.page_lock(segment.address + segment.layout.pool, runtime.config.budget_bytes)


@gpu
def test_copies_and_products_on_a_gpu_read_the_right_bytes() -> None:
    """Copies behind slow products, into slots that these still read, as `DeviceCache` orders them."""
    device = CudaDevice("cuda")
    slots, host = device.allocate(2, 1 << 24), torch.empty((8, 1 << 24), dtype=torch.uint8)
    for number, row in enumerate(host):
        row.fill_(number + 1)
    device.page_lock(host.data_ptr(), host.nbytes)
    try:
        busy = torch.randn(4096, 4096, device=device.torch_device)
        marks, sums = [device.mark()] * 2, []
        for step in range(64):
            slot = step % 2
            device.begin()
            device.copy(slots[slot], host[step % 8], marks[slot])
            device.join()
            for _ in range(4):
                busy = (busy @ busy).clamp_(-1, 1)
            sums.append((step % 8 + 1, slots[slot].amin(), slots[slot].amax()))
            marks[slot] = device.mark()
            device.finish()
        device.synchronize()
    finally:
        device.page_unlock(host.data_ptr())
    assert all(low.item() == high.item() == wanted for wanted, low, high in sums)
