"""A Mixtral decoder in NumPy, float32: what a checkpoint computes, whoever chooses the experts.

It decodes one token at a time for many sequences at once, all at the same position, with a cache of keys and values.
The experts are an argument of the layer, so that a router may choose others than the gate's best. It is made for models
that fit into memory several times, not for speed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 - lets NumPy hold bfloat16
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open

from shmroute.errors import CheckpointError
from shmroute.sources import ExpertGeometry, open_source
from shmroute.sources.bounded_json import read_json_object, shown
from shmroute.sources.model_config import MAX_CONFIG_BYTES, MAX_EXTENT, SUPPORTED_MODEL_TYPES

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class DecoderConfig:
    """What a ``config.json`` says of a Mixtral model beside its experts.

    Attributes
    ----------
    num_layers, hidden_size, num_heads, num_kv_heads, head_dim, vocab_size : int
    max_positions : int
        Tokens that a sequence may have.
    norm_eps : float
    rope_theta : float
        Base of the rotary embedding's wavelengths.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope_theta: float

    @classmethod
    def read(cls, path: Path) -> DecoderConfig:
        """Read a ``config.json``.

        Raises
        ------
        CheckpointError
            If it is of another architecture, or lacks a key.
        """
        values = read_json_object(str(path), MAX_CONFIG_BYTES)
        if (model_type := values.get("model_type")) != "mixtral":
            hint = ", although its experts can be served" if model_type in SUPPORTED_MODEL_TYPES else ""
            raise CheckpointError(
                str(path), f"model_type {shown(model_type)} cannot be evaluated{hint}: only 'mixtral' can"
            )
        rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default")) if isinstance(rope, dict) else rope
        for key, value, expected in (
            ("hidden_act", values.get("hidden_act", "silu"), "silu"),
            ("sliding_window", values.get("sliding_window"), None),
            ("rope_type", kind, "default"),
        ):
            if value != expected:
                raise CheckpointError(str(path), f"the key {key!r} is {shown(value)}; {expected!r} can be evaluated")

        def integer(key: str, default: int | None = None) -> int:
            value = values.get(key) if values.get(key) is not None else default
            if type(value) is not int or not 1 <= value <= MAX_EXTENT:
                raise CheckpointError(
                    str(path), f"the key {key!r} is {shown(value)}; an integer from 1 to {MAX_EXTENT} is expected"
                )
            return value

        def number(key: str, found: Any) -> float:
            if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < 1e12:
                raise CheckpointError(str(path), f"the key {key!r} is {shown(found)}; a number above 0 is expected")
            return float(found)

        hidden, heads = integer("hidden_size"), integer("num_attention_heads")
        kv_heads = integer("num_key_value_heads", heads)
        head_dim = integer("head_dim", hidden // heads)
        if heads % kv_heads or head_dim % 2:
            raise CheckpointError(
                str(path), f"{heads} heads of {head_dim} with {kv_heads} for keys and values do not fit together"
            )
        return cls(
            num_layers=integer("num_hidden_layers"),
            hidden_size=hidden,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            vocab_size=integer("vocab_size"),
            max_positions=integer("max_position_embeddings"),
            norm_eps=number("rms_norm_eps", values.get("rms_norm_eps", 1e-5)),
            rope_theta=number("rope_theta", rope.get("rope_theta", values.get("rope_theta", 1e6))),
        )


@dataclass(frozen=True)
class _Layer:
    """One layer's weights, float32, each to be multiplied from the right: ``x @ w``.

    Attributes
    ----------
    attention_norm, expert_norm : ndarray
        [H].
    qkv : ndarray
        [H, (heads + 2 kv_heads) · head_dim].
    output : ndarray
        [heads · head_dim, H].
    gate : ndarray
        [H, E], the router's.
    gate_up : ndarray
        [E, H, 2 I]: of every expert, first what goes through SiLU.
    down : ndarray
        [E, I, H].
    """

    attention_norm: Floats
    qkv: Floats
    output: Floats
    expert_norm: Floats
    gate: Floats
    gate_up: Floats
    down: Floats


class KeyValueCache:
    """Keys and values of sequences that are all at the same position.

    Parameters
    ----------
    config : DecoderConfig
    sequences, positions : int
        How many sequences, and the tokens that each may have.
    """

    def __init__(self, config: DecoderConfig, sequences: int, positions: int) -> None:
        shape = (config.num_layers, sequences, config.num_kv_heads, positions, config.head_dim)
        self.keys, self.values = np.zeros(shape, np.float32), np.zeros(shape, np.float32)


class Decoder:
    """A checkpoint's weights and the parts of a decoding step.

    Parameters
    ----------
    folder : Path
        A Mixtral checkpoint: ``config.json`` and safetensors files.

    Raises
    ------
    CheckpointError
        If it is not one, or does not fit into memory.
    """

    def __init__(self, folder: Path) -> None:
        self.config = config = DecoderConfig.read(folder / "config.json")
        source = open_source(folder)
        try:
            self.geometry: ExpertGeometry = source.geometry
            _check_memory(folder, self.geometry)
            with _Tensors(folder) as tensors:
                width = config.num_heads * config.head_dim
                kv_width = config.num_kv_heads * config.head_dim
                h = config.hidden_size
                self.embedding = tensors.get("model.embed_tokens.weight", (config.vocab_size, h))
                head = tensors.find("lm_head.weight", (config.vocab_size, h))
                self._head = (self.embedding if head is None else head).T
                self._norm = tensors.get("model.norm.weight", (h,))
                self._layers = []
                for number in range(config.num_layers):
                    prefix = f"model.layers.{number}"
                    q, k, v = (
                        tensors.get(f"{prefix}.self_attn.{name}_proj.weight", (rows, h))
                        for name, rows in (("q", width), ("k", kv_width), ("v", kv_width))
                    )
                    gate_up, down = _experts(source, number)
                    self._layers.append(
                        _Layer(
                            attention_norm=tensors.get(f"{prefix}.input_layernorm.weight", (h,)),
                            qkv=np.ascontiguousarray(np.concatenate([q, k, v]).T),
                            output=np.ascontiguousarray(tensors.get(f"{prefix}.self_attn.o_proj.weight", (h, width)).T),
                            expert_norm=tensors.get(f"{prefix}.post_attention_layernorm.weight", (h,)),
                            gate=np.ascontiguousarray(source.gate(number).T),
                            gate_up=gate_up,
                            down=down,
                        )
                    )
        finally:
            source.close()
        frequencies = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
        angles = np.arange(config.max_positions)[:, None] * np.concatenate([frequencies, frequencies])
        self._cos, self._sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def attend(self, layer: int, hidden: Floats, cache: KeyValueCache, position: int) -> Floats:
        """The hidden states after a layer's attention, float32 [N, H]; extends the cache by this position."""
        c, w = self.config, self._layers[layer]
        n, groups = len(hidden), c.num_heads // c.num_kv_heads
        qkv = (self._normalized(hidden, w.attention_norm) @ w.qkv).reshape(n, -1, c.head_dim)
        turned = self._rotated(qkv[:, : c.num_heads + c.num_kv_heads], position)
        keys, values = cache.keys[layer, :, :, : position + 1], cache.values[layer, :, :, : position + 1]
        keys[:, :, position] = turned[:, c.num_heads :]
        values[:, :, position] = qkv[:, c.num_heads + c.num_kv_heads :]
        queries = turned[:, : c.num_heads].reshape(n, c.num_kv_heads, groups, c.head_dim)
        scores = queries @ keys.swapaxes(-1, -2) * np.float32(c.head_dim**-0.5)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        result: Floats = hidden + (shares @ values).reshape(n, -1) @ w.output
        return result

    def gate(self, layer: int, hidden: Floats) -> tuple[Floats, Floats]:
        """What enters a layer's experts, float32 [N, H], and the router's logits, float32 [N, E]."""
        w = self._layers[layer]
        x = self._normalized(hidden, w.expert_norm)
        return x, x @ w.gate

    def mix(self, layer: int, x: Floats, experts: npt.NDArray[np.int32], weights: Floats) -> Floats:
        """The weighted sum of the chosen experts' outputs, float32 [N, H]; `experts` and `weights` are [N, k]."""
        w = self._layers[layer]
        k, half = experts.shape[1], w.down.shape[1]
        order = np.argsort(experts, axis=None, kind="stable")
        rows = order // k
        bounds = np.searchsorted(experts.ravel()[order], np.arange(len(w.down) + 1))
        out = np.zeros_like(x)
        for expert in np.flatnonzero(np.diff(bounds)):
            part = slice(bounds[expert], bounds[expert + 1])
            mine = rows[part]
            both = x[mine] @ w.gate_up[expert]
            gate, up = both[:, :half], both[:, half:]
            with np.errstate(over="ignore"):  # exp(-gate) may be inf, of which the share is 0
                inner = gate / (1 + np.exp(-gate)) * up
            out[mine] += weights.ravel()[order[part], None] * (inner @ w.down[expert])
        return out

    def cross_entropy(self, hidden: Floats, following: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Nats of the tokens that follow, float64 [N], given the last layer's hidden states."""
        logits = self._normalized(hidden, self._norm) @ self._head
        peak = logits.max(1)
        total = np.log(np.exp(logits - peak[:, None]).sum(1, dtype=np.float64))
        result: npt.NDArray[np.float64] = total + peak - logits[np.arange(len(logits)), following]
        return result

    def _normalized(self, x: Floats, weight: Floats) -> Floats:
        mean = np.einsum("nh,nh->n", x, x)[:, None] / np.float32(x.shape[1])
        result: Floats = x / np.sqrt(mean + np.float32(self.config.norm_eps)) * weight
        return result

    def _rotated(self, x: Floats, position: int) -> Floats:
        """Rotary embedding: pairs are the elements of the two halves, as in Transformers."""
        half = x.shape[-1] // 2
        other = np.concatenate([-x[..., half:], x[..., :half]], axis=-1)
        result: Floats = x * self._cos[position] + other * self._sin[position]
        return result


class _Tensors:
    """The tensors of all of a folder's safetensors files, by name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: list[Any] = []
        self._where: dict[str, Any] = {}
        try:
            for path in sorted(folder.glob("*.safetensors")):
                file: Any = safe_open(path, framework="numpy")
                self._files.append(file)
                self._where |= dict.fromkeys(file.keys(), file)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(str(folder), f"its safetensors files cannot be read: {error}") from error

    def __enter__(self) -> _Tensors:
        return self

    def __exit__(self, *exception: object) -> None:
        self._where.clear()
        self._files.clear()

    def find(self, name: str, shape: tuple[int, ...]) -> Floats | None:
        """A tensor in float32; None if there is none of that name."""
        if name not in self._where:
            return None
        stored = np.asarray(self._where[name].get_tensor(name))
        if stored.shape != shape:
            raise CheckpointError(
                str(self._folder), f"its shape is {list(stored.shape)}, by config.json {list(shape)}", name
            )
        return stored.astype(np.float32)

    def get(self, name: str, shape: tuple[int, ...]) -> Floats:
        """The same, which must be there."""
        found = self.find(name, shape)
        if found is None:
            raise CheckpointError(str(self._folder), "it is in none of the safetensors files", name)
        return found


def _experts(source: Any, layer: int) -> tuple[Floats, Floats]:
    """A layer's experts as `_Layer` has them."""
    geometry = source.geometry
    buffer = memoryview(bytearray(geometry.expert_bytes))
    views = {tensor.name: tensor.view(buffer) for tensor in geometry.tensors}
    gate_up, down = [], []
    for expert in range(geometry.num_experts):
        source.read_into(layer, expert, buffer)
        gate_up.append(np.concatenate([views["gate"], views["up"]]).astype(np.float32).T)
        down.append(views["down"].astype(np.float32).T)
    return np.ascontiguousarray(gate_up), np.ascontiguousarray(down)


def _check_memory(folder: Path, geometry: ExpertGeometry) -> None:
    """Refuse what would not fit: all experts, in float32, are held at once."""
    elements = sum(int(np.prod(tensor.shape)) for tensor in geometry.tensors)
    needed = geometry.num_layers * geometry.num_experts * elements * 4
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available // 2:
        raise CheckpointError(
            str(folder),
            f"its experts take {needed / 2**30:.1f} GiB in float32, more than half of this machine's "
            f"{available / 2**30:.1f} GiB: evaluate a smaller model of the kind",
        )
