"""Experts out of a random number generator: for tests, benchmarks and simulations without a checkpoint."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import xxhash

from shmroute.errors import ConfigError
from shmroute.shared.words import MAX_EXPERTS, MAX_LAYERS
from shmroute.sources.base import DTYPES, ExpertGeometry, ModelScoring, SourceSpec, TensorLayout

MAX_DELAY = 3600.0
_EXPERT_STREAM, _GATE_STREAM = 0, 1

# Random bits are kept for sign and mantissa and the exponent is forced, which is far cheaper than drawing
# floats and converting them, and cannot give NaN, infinity, zero or a subnormal. All exponents stand for
# 2**-5.
_MANTISSA_MASK: dict[str, tuple[int, int]] = {
    "float32": (0x807F_FFFF_807F_FFFF, 0x3D00_0000_3D00_0000),
    "float16": (0x83FF_83FF_83FF_83FF, 0x2800_2800_2800_2800),
    "bfloat16": (0x807F_807F_807F_807F, 0x3D00_3D00_3D00_3D00),
}


class SyntheticSource:
    """A source whose bytes follow from its arguments.

    Every value is finite, with ``1/32 <= abs(value) < 1/16``, so that products of such experts neither
    overflow nor vanish. The same arguments give the same bytes in every process and with every version of
    NumPy (they are made of a bit generator's raw output, which NumPy keeps stable). Making them costs about 1
    ns per 2 bytes.

    Parameters
    ----------
    num_layers, num_experts, hidden_size, intermediate_size : int
        At least 1, and no more layers and experts than a runtime can have.
    top_k : int
        From 1 to `num_experts`.
    dtype : str
        A key of `DTYPES`.
    seed : int
        From 0 to 2**64 - 1.
    renormalize : bool
    delay : float
        Seconds that each read takes longer, as on a slow disk; at most an hour.

    Raises
    ------
    ConfigError
        If an argument is of another type or outside its range.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        *,
        top_k: int = 2,
        dtype: str = "float32",
        seed: int = 0,
        renormalize: bool = True,
        delay: float = 0.0,
    ) -> None:
        for name, value, high in (
            ("num_layers", num_layers, MAX_LAYERS),
            ("num_experts", num_experts, MAX_EXPERTS),
            ("hidden_size", hidden_size, 2**24),
            ("intermediate_size", intermediate_size, 2**24),
            ("top_k", top_k, MAX_EXPERTS),
        ):
            _check_integer(name, value, 1, high)
        _check_integer("seed", seed, 0, 2**64 - 1)
        if top_k > num_experts:
            raise ConfigError(f"top_k is {top_k}, but there are only {num_experts} experts")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ConfigError(f"dtype is {dtype!r}; expected is one of {', '.join(DTYPES)}")
        if not isinstance(renormalize, bool):
            raise ConfigError(f"renormalize is {renormalize!r}; True or False is expected")
        if isinstance(delay, bool) or not isinstance(delay, int | float) or not 0 <= delay <= MAX_DELAY:
            raise ConfigError(f"delay is {delay!r}; seconds from 0 to {MAX_DELAY:g} are expected")

        self._seed, self._delay = seed, delay
        self._identity = {
            "num_layers": num_layers,
            "num_experts": num_experts,
            "hidden_size": hidden_size,
            "intermediate_size": intermediate_size,
            "top_k": top_k,
            "dtype": dtype,
            "seed": seed,
            "renormalize": renormalize,
        }
        gate = TensorLayout("gate", 0, (intermediate_size, hidden_size), dtype)
        up = TensorLayout("up", gate.nbytes, (intermediate_size, hidden_size), dtype)
        down = TensorLayout("down", up.offset + up.nbytes, (hidden_size, intermediate_size), dtype)
        self._geometry = ExpertGeometry(
            num_layers=num_layers,
            num_experts=num_experts,
            top_k=top_k,
            scoring=ModelScoring(renormalize),
            layer_numbers=tuple(range(num_layers)),
            hidden_size=hidden_size,
            expert_bytes=down.offset + down.nbytes,
            tensors=(gate, up, down),
            # The delay changes no byte, and so is no part of the identity.
            fingerprint=xxhash.xxh3_128(json.dumps(["synthetic", self._identity]).encode()).hexdigest(),
        )

    @property
    def geometry(self) -> ExpertGeometry:
        return self._geometry

    @property
    def spec(self) -> SourceSpec:
        return SourceSpec("shmroute.sources.synthetic:SyntheticSource", {**self._identity, "delay": self._delay})

    def read_into(
        self, layer: int, expert: int, buffer: memoryview, filled: Callable[[int, int], object] | None = None
    ) -> None:
        """Make one expert's bytes; see `ExpertSource.read_into`.

        Raises
        ------
        IndexError, ValueError
            If there is no such expert, or `buffer` is not writable, of format ``"B"`` and exactly as large as
            one.
        """
        self._check_index(layer, expert)
        size = self._geometry.expert_bytes
        if buffer.readonly or buffer.format != "B" or buffer.ndim != 1 or len(buffer) != size:
            raise ValueError(f"the buffer must be writable, contiguous, of format 'B' and {size} bytes long")
        if self._delay:
            time.sleep(self._delay)
        words = self._words((_EXPERT_STREAM, layer, expert), math.ceil(size / 8))
        mask, exponent = _MANTISSA_MASK[self._geometry.tensors[0].dtype]
        words &= np.uint64(mask)
        words |= np.uint64(exponent)
        np.frombuffer(buffer, np.uint8)[:] = words.view(np.uint8)[:size]
        if filled is not None:
            filled(0, size)

    def drop_page_cache(self, layer: int, expert: int) -> None:
        """Does nothing: there are no files."""

    def location(self, layer: int, expert: int) -> str:
        self._check_index(layer, expert)
        return f"synthetic (seed {self._seed}): layer {layer}, expert {expert}"

    def gate(self, layer: int) -> npt.NDArray[np.float32]:
        """The router's weights, uniform within ``[-1, 1) / sqrt(hidden_size)``; see `ExpertSource.gate`."""
        self._check_index(layer, 0)
        shape = (self._geometry.num_experts, self._geometry.hidden_size)
        words = self._words((_GATE_STREAM, layer), math.prod(shape))
        uniform = (words >> np.uint64(40)).astype(np.float64) * 2.0**-23 - 1.0
        return (uniform / math.sqrt(shape[1])).astype(np.float32).reshape(shape)

    def gate_bias(self, layer: int) -> None:
        """None: its logits are ``x @ gate.T``."""
        self._check_index(layer, 0)

    def correction_bias(self, layer: int) -> None:
        """None: its model scores by softmax."""
        self._check_index(layer, 0)

    def close(self) -> None:
        """Does nothing: there is nothing to release."""

    def _check_index(self, layer: int, expert: int) -> None:
        layers, experts = self._geometry.num_layers, self._geometry.num_experts
        if not (0 <= layer < layers and 0 <= expert < experts):
            raise IndexError(f"no expert {expert} of layer {layer}: there are {layers} layers of {experts} experts")

    def _words(self, stream: tuple[int, ...], count: int) -> npt.NDArray[np.uint64]:
        generator = np.random.SFC64(np.random.SeedSequence(self._seed, spawn_key=stream))
        words: npt.NDArray[np.uint64] = generator.random_raw(count)
        return words


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(f"{name} is {value!r}; an integer from {low} to {high} is expected")
