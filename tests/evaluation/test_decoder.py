"""The decoder against what Transformers recorded, and against a full recomputation that shares nothing with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - lets NumPy hold bfloat16
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file

from shmroute.errors import CheckpointError
from shmroute.evaluation.decoder import Decoder, DecoderConfig, KeyValueCache

CHECKPOINT = Path(__file__).resolve().parents[2] / "examples" / "tiny-mixtral"


def two_best(logits: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int32], npt.NDArray[Any]]:
    """The two best experts of each row and their softmax."""
    experts = np.argsort(-logits, axis=1, kind="stable")[:, :2]
    exponents = np.exp(np.take_along_axis(logits, experts, 1) - logits.max(1, keepdims=True))
    return experts.astype(np.int32), exponents / exponents.sum(1, keepdims=True)


def decode(decoder: Decoder, tokens: npt.NDArray[np.int64]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Token by token: what enters each layer's experts, [N, T, L, H], and the losses, [N, T - 1]."""
    count, length = tokens.shape
    layers = decoder.config.num_layers
    cache = KeyValueCache(decoder.config, count, length)
    entering = np.zeros((count, length, layers, decoder.config.hidden_size), np.float32)
    losses = np.zeros((count, length - 1))
    for position in range(length):
        hidden = decoder.embedding[tokens[:, position]]
        for layer in range(layers):
            hidden = decoder.attend(layer, hidden, cache, position)
            x, logits = decoder.gate(layer, hidden)
            entering[:, position, layer] = x
            hidden = hidden + decoder.mix(layer, x, *two_best(logits))
        if position + 1 < length:
            losses[:, position] = decoder.cross_entropy(hidden, tokens[:, position + 1])
    return entering, losses


def test_hidden_states_and_losses_are_those_that_transformers_recorded(decoder: Decoder) -> None:
    with np.load(CHECKPOINT / "activations.npz") as file:
        meta = json.loads(str(file["meta"]))
        tokens = file["tokens"].astype(np.int64).reshape(16, 176)
        recorded = file["h"].astype(np.float32).reshape(16, 176, 6, 128)
    entering, losses = decode(decoder, tokens)
    assert np.abs(entering - recorded).max() < 3e-3  # float16 keeps 11 bits, of numbers up to 4
    for domain, expected in meta["cross_entropy"].items():
        mine = [window == domain for window in meta["sequences"]]
        assert losses[mine].mean() == pytest.approx(expected, abs=1e-5)


def recomputed_losses(tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """The losses of one sequence, all positions at once, in float64."""
    weights = {name: value.astype(np.float64) for name, value in load_file(CHECKPOINT / "model.safetensors").items()}
    length = len(tokens)

    def norm(x: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weights[name]

    def turned(x: npt.NDArray[Any]) -> npt.NDArray[Any]:  # [heads, T, 32], its halves as complex numbers
        pairs = x[..., :16] + 1j * x[..., 16:]
        pairs = pairs * np.exp(1j * np.arange(length)[:, None] * 1e6 ** (-np.arange(16) / 16))
        return np.concatenate([pairs.real, pairs.imag], -1)

    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(6):
        attention, block = f"model.layers.{layer}.self_attn", f"model.layers.{layer}.block_sparse_moe"
        y = norm(x, f"model.layers.{layer}.input_layernorm.weight")
        q, k, v = (
            (y @ weights[f"{attention}.{i}_proj.weight"].T).reshape(length, -1, 32).swapaxes(0, 1) for i in "qkv"
        )
        k, v = np.repeat(turned(k), 2, axis=0), np.repeat(v, 2, axis=0)
        scores = turned(q) @ k.swapaxes(1, 2) / np.sqrt(32) + np.triu(np.full((length, length), -np.inf), 1)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = (shares / shares.sum(-1, keepdims=True)) @ v
        x = x + mixed.swapaxes(0, 1).reshape(length, -1) @ weights[f"{attention}.o_proj.weight"].T
        y = norm(x, f"model.layers.{layer}.post_attention_layernorm.weight")
        experts, gains = two_best(y @ weights[f"{block}.gate.weight"].T)
        added = np.zeros_like(x)
        for token in range(length):
            for expert, gain in zip(experts[token], gains[token], strict=True):
                w1, w2, w3 = (weights[f"{block}.experts.{expert}.w{i}.weight"] for i in (1, 2, 3))
                gate = w1 @ y[token]
                added[token] += gain * (w2 @ (gate / (1 + np.exp(-gate)) * (w3 @ y[token])))
        x = x + added
    logits = norm(x, "model.norm.weight") @ weights["model.embed_tokens.weight"].T
    logits -= logits.max(1, keepdims=True)
    logits -= np.log(np.exp(logits).sum(1, keepdims=True))
    return -logits[np.arange(length - 1), tokens[1:]]


def test_one_token_at_a_time_equals_recomputing_all_positions(decoder: Decoder, windows: npt.NDArray[np.int64]) -> None:
    tokens = windows[0, :2]
    _, losses = decode(decoder, tokens)
    for sequence in range(2):
        np.testing.assert_allclose(losses[sequence], recomputed_losses(tokens[sequence]), atol=2e-4)


def test_a_sequence_does_not_depend_on_those_beside_it(decoder: Decoder, windows: npt.NDArray[np.int64]) -> None:
    together, _ = decode(decoder, windows[0])
    alone, _ = decode(decoder, windows[0, 2:3])
    np.testing.assert_allclose(together[2], alone[0], atol=1e-4)


def test_the_weights_decide_how_much_an_expert_adds(decoder: Decoder) -> None:
    x = np.random.default_rng(1).standard_normal((3, 128)).astype(np.float32)
    experts = np.array([[0, 7], [7, 3], [3, 0]], np.int32)
    weights = np.array([[0.75, 0.25], [1.0, 0.0], [0.5, 0.5]], np.float32)

    def alone(expert: int) -> npt.NDArray[np.float32]:
        return decoder.mix(2, x, np.full((3, 1), expert, np.int32), np.ones((3, 1), np.float32))

    expected = [sum(weights[row, i] * alone(int(experts[row, i]))[row] for i in range(2)) for row in range(3)]
    np.testing.assert_allclose(decoder.mix(2, x, experts, weights), expected, atol=1e-5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint whose ``config.json`` a test may change."""
    (tmp_path / "model.safetensors").symlink_to(CHECKPOINT / "model.safetensors")
    (tmp_path / "config.json").write_text((CHECKPOINT / "config.json").read_text())
    return tmp_path


def change(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


def test_a_config_is_read_as_transformers_reads_it(folder: Path) -> None:
    assert DecoderConfig.read(folder / "config.json") == DecoderConfig(6, 128, 4, 2, 32, 2048, 512, 1e-5, 1e6)
    change(folder, rope_parameters=None, rope_theta=5000, num_key_value_heads=None, head_dim=16)
    config = DecoderConfig.read(folder / "config.json")
    assert (config.rope_theta, config.num_kv_heads, config.head_dim) == (5000, 4, 16)


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        (
            {"model_type": "olmoe"},
            "'olmoe' cannot be evaluated, although its experts can be served: only 'mixtral' can",
        ),
        ({"model_type": "gpt2"}, "'gpt2' cannot be evaluated: only 'mixtral' can"),
        ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu'; 'silu' can be evaluated"),
        ({"sliding_window": 64}, "'sliding_window' is 64; None can be evaluated"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "'rope_type' is 'yarn'; 'default' can be evaluated"),
        ({"rope_parameters": "yarn"}, "'rope_type' is 'yarn'; 'default' can be evaluated"),
        ({"rope_parameters": {"rope_theta": -1}}, "'rope_theta' is -1; a number above 0"),
        ({"num_attention_heads": 3}, "3 heads of 42 with 2 for keys and values do not fit"),
        ({"num_attention_heads": "4"}, "'num_attention_heads' is '4'; an integer from 1"),
        ({"vocab_size": None}, "'vocab_size' is None"),
        ({"rms_norm_eps": "small"}, "'rms_norm_eps' is 'small'; a number above 0"),
    ],
)
def test_another_architecture_is_refused_by_the_key_that_says_so(
    folder: Path, keys: dict[str, Any], complaint: str
) -> None:
    change(folder, **keys)
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        Decoder(folder)
    assert complaint in str(caught.value)


def test_tensors_that_do_not_fit_the_config_are_named(folder: Path) -> None:
    change(folder, vocab_size=2000)
    with pytest.raises(CheckpointError, match=r"model.embed_tokens.weight: its shape is \[2048, 128\], by config.json"):
        Decoder(folder)
    change(folder, vocab_size=2048, num_hidden_layers=7)
    with pytest.raises(CheckpointError, match=r"layer 6 has experts by config\.json"):
        Decoder(folder)


def test_a_model_that_would_not_fit_into_memory_is_refused_before_it_is_read(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 2000)
    with pytest.raises(CheckpointError, match=r"its experts take 0.0 GiB in float32, more than half"):
        Decoder(folder)
