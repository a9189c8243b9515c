"""What `load` makes, what it costs in memory, and what it refuses."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_models import FAMILIES, SHIPPED, make_checkpoint, stock
from safetensors.torch import load_file, save_file

import shmroute
from shmroute import RuntimeConfig
from shmroute.errors import CheckpointError, ConfigError, RuntimeClosedError, UnsupportedDtypeError
from shmroute.integrations.transformers import load

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_dense_parts_are_the_models_and_experts_are_not(
    family: str, checkpoint: Callable[..., Path], runtime_of: Callable[..., Any]
) -> None:
    folder = checkpoint(family)
    ours, theirs = load(folder, runtime_of(folder)), stock(folder)
    dense = {name: tensor for name, tensor in theirs.state_dict().items() if ".experts." not in name}
    assert ours.state_dict().keys() == dense.keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, dense[name]), name
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_experts_are_never_in_this_process(
    tmp_path: Path, runtime_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Peak resident memory, less what is shared memory: far below what Transformers itself takes."""
    monkeypatch.setitem(
        FAMILIES, "mixtral",
        ("MixtralConfig", {"num_local_experts": 32, "num_experts_per_tok": 2, "hidden_size": 256,
                           "intermediate_size": 1024}),
    )  # fmt: skip
    folder = make_checkpoint(tmp_path, "mixtral")
    runtime = runtime_of(folder, budget="10%")
    experts = 3 * 32 * runtime.config.expert_bytes
    program = Path(__file__).with_name("memory_program.py")
    peaks = {
        name: int(
            subprocess.run([sys.executable, program, str(folder), name], stdout=subprocess.PIPE, check=True).stdout
        )
        for name in (runtime.name, "stock")
    }
    assert peaks["stock"] - peaks[runtime.name] > 0.8 * experts, (peaks, experts)


def test_a_checkpoint_of_another_runtime(checkpoint: Callable[..., Path], runtime_of: Callable[..., Any]) -> None:
    runtime = runtime_of(checkpoint("olmoe"))
    with pytest.raises(CheckpointError, match="is not the checkpoint of the runtime"):
        load(checkpoint("qwen3_moe"), runtime)


def test_a_runtime_without_a_checkpoint(checkpoint: Callable[..., Path]) -> None:
    config = RuntimeConfig(num_layers=3, num_experts=8, top_k=2, expert_bytes=64, slots=4)
    with (
        shmroute.create("transformers-bare", config) as runtime,
        pytest.raises(ConfigError, match="made without a checkpoint"),
    ):
        load(checkpoint("mixtral"), runtime)


def test_an_unsupported_architecture(
    tmp_path: Path, checkpoint: Callable[..., Path], runtime_of: Callable[..., Any]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "granitemoe", "architectures": ["GraniteMoe"]}))
    with pytest.raises(CheckpointError, match=r"router of model_type 'granitemoe' is not supported.*mixtral"):
        load(tmp_path, runtime_of(checkpoint("mixtral")))


def test_no_such_folder(tmp_path: Path, checkpoint: Callable[..., Path], runtime_of: Callable[..., Any]) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load(tmp_path / "absent", runtime_of(checkpoint("mixtral")))


def test_another_dtype_than_the_experts(checkpoint: Callable[..., Path], runtime_of: Callable[..., Any]) -> None:
    folder = checkpoint("mixtral", torch.bfloat16)
    runtime = runtime_of(folder)
    with pytest.raises(ConfigError, match=r"dtype is torch\.float32, but the experts .* torch\.bfloat16"):
        load(folder, runtime, dtype=torch.float32)
    model = load(folder, runtime, dtype=torch.bfloat16)
    with pytest.raises(ConfigError, match=r"torch\.float32 on cpu, but this model's experts are torch\.bfloat16"):
        model.float()(IDS)
    assert runtime.metrics().total.counters["calls"] == 0  # nothing was routed, and so nothing loaded


def test_gpt_oss_as_it_is_published_is_refused_until_it_is_dequantised(
    tmp_path: Path, runtime_of: Callable[..., Any]
) -> None:
    """Experts in MXFP4: two 4-bit values in a byte, a scale for each 32; random ones here."""
    plain = make_checkpoint(tmp_path / "plain", "gpt_oss", torch.bfloat16, intermediate_size=64)
    tensors = load_file(plain / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, columns, rows = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(120, 126, (experts, rows, columns // 32), dtype=torch.uint8)
    published, dequantised = tmp_path / "published", tmp_path / "dequantised"
    published.mkdir()
    save_file(tensors, published / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    quantised = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": kept}}
    (published / "config.json").write_text(json.dumps(config | quantised))
    with pytest.raises(UnsupportedDtypeError, match="dequantise it"):
        RuntimeConfig.from_checkpoint(published, "50%")

    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        published, quantization_config=transformers.Mxfp4Config(dequantize=True), dtype=torch.bfloat16
    ).eval()
    theirs.save_pretrained(dequantised, save_original_format=False)
    ours = load(dequantised, runtime_of(dequantised))
    with torch.no_grad():
        torch.testing.assert_close(ours(IDS).logits, theirs(IDS).logits, rtol=0, atol=0.02)


def test_a_dense_tensor_that_is_missing(
    tmp_path: Path, checkpoint: Callable[..., Path], runtime_of: Callable[..., Any]
) -> None:
    folder = tmp_path / "holed"
    shutil.copytree(checkpoint("mixtral"), folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn\.q_proj.*are missing"):
        load(folder, runtime_of(folder))


def test_the_implementation_without_a_runtime(checkpoint: Callable[..., Path]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint("mixtral"), experts_implementation="shmroute")
    with pytest.raises(ConfigError, match=r"make it by shmroute\.integrations\.transformers\.load"):
        model(IDS)


def test_a_runtime_that_was_closed(runtime_of: Callable[..., Any]) -> None:
    runtime = runtime_of(SHIPPED)
    model = load(SHIPPED, runtime)
    model(IDS)
    runtime.close()
    with pytest.raises(RuntimeClosedError):
        model(IDS)


def test_no_lease_outlives_an_error_in_between(
    checkpoint: Callable[..., Path], runtime_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint("mixtral")
    runtime = runtime_of(folder)
    model = load(folder, runtime)

    def fail(*_: Any) -> None:
        raise RuntimeError("in the middle of an expert")

    experts = model.model.layers[0].mlp.experts
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="in the middle") as caught:
        patched.setattr(type(experts), "_apply_gate", fail)
        model(IDS)
    assert caught.traceback  # whatever keeps the frames alive does not keep the lease
    for expert in range(8):  # a thread that held a lease could not wait for any that is absent
        with runtime.expert(0, expert):
            pass


def test_without_torch_the_message_says_what_to_install() -> None:
    code = "import sys; sys.modules['torch'] = None; import shmroute.integrations.transformers"
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert "pip install 'shmroute[transformers]'" in done.stderr
