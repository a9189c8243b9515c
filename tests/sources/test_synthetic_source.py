"""Synthetic experts follow from their arguments alone."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest

from shmroute.errors import ConfigError
from shmroute.sources import DTYPES, ExpertSource, SourceSpec, SyntheticSource, open_source

GOOD: dict[str, Any] = {"num_layers": 2, "num_experts": 3, "hidden_size": 5, "intermediate_size": 7}


def read(source: ExpertSource, layer: int, expert: int) -> bytes:
    buffer = bytearray(source.geometry.expert_bytes)
    source.read_into(layer, expert, memoryview(buffer))
    return bytes(buffer)


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_are_finite_and_small(dtype: str) -> None:
    source = SyntheticSource(**GOOD, dtype=dtype)
    buffer = memoryview(bytearray(read(source, 1, 2)))
    assert sum(layout.nbytes for layout in source.geometry.tensors) == len(buffer)
    for layout in source.geometry.tensors:
        values = layout.view(buffer).astype(np.float64)
        assert ((np.abs(values) >= 1 / 32) & (np.abs(values) < 1 / 16)).all()
        assert (values > 0).any()
        assert (values < 0).any()


def test_every_expert_layer_and_seed_gives_other_bytes() -> None:
    sources = [SyntheticSource(**GOOD, seed=seed) for seed in (0, 1, 2**32, 2**64 - 1)]
    experts = {read(s, layer, expert) for s in sources for layer in range(2) for expert in range(3)}
    assert len(experts) == 4 * 2 * 3
    assert len({s.gate(layer).tobytes() for s in sources for layer in range(2)}) == 4 * 2
    assert len({s.geometry.fingerprint for s in sources}) == 4


def test_gates_are_float32_and_scaled_by_the_hidden_size() -> None:
    gate = SyntheticSource(1, 64, 256, 8).gate(0)
    assert gate.shape == (64, 256)
    assert gate.dtype == np.dtype(np.float32)
    assert 0.9 / 16 < np.abs(gate).max() <= 1 / 16
    assert abs(gate.mean()) < 1e-3


def test_another_process_makes_the_same_bytes_from_the_spec() -> None:
    source = SyntheticSource(**GOOD, seed=9, dtype="bfloat16", delay=0.001)
    spec = json.dumps(vars(source.spec))
    script = (
        "import hashlib, json, sys\n"
        "from shmroute.sources import SourceSpec\n"
        "s = SourceSpec(**json.loads(sys.argv[1])).open()\n"
        "b = bytearray(s.geometry.expert_bytes)\n"
        "s.read_into(1, 2, memoryview(b))\n"
        "print(hashlib.sha256(b + s.gate(1).tobytes()).hexdigest(), s.geometry.fingerprint)\n"
    )
    output = subprocess.run([sys.executable, "-c", script, spec], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(read(source, 1, 2) + source.gate(1).tobytes()).hexdigest()
    assert output.split() == [digest, source.geometry.fingerprint]
    assert SourceSpec(**json.loads(spec)).open().spec == source.spec


def test_the_bytes_stay_the_same_over_versions() -> None:
    digest = hashlib.sha256(read(SyntheticSource(**GOOD, seed=3), 1, 1)).hexdigest()
    assert digest == "eb78f3760f67b999d759b8fc38cc70e0a50a20fbb98ba82e2660bbb8e1c62300"


def test_a_delay_makes_each_read_that_much_slower_and_changes_nothing_else() -> None:
    slow, fast = SyntheticSource(**GOOD, delay=0.05), SyntheticSource(**GOOD)
    began = time.monotonic()
    assert read(slow, 0, 0) == read(fast, 0, 0)
    assert time.monotonic() - began >= 0.05
    assert slow.geometry == fast.geometry


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 0},
        {"num_experts": -1},
        {"num_experts": True},
        {"hidden_size": 2.0},
        {"intermediate_size": "7"},
        {"top_k": 4},
        {"top_k": 0},
        {"dtype": "float64"},
        {"dtype": None},
        {"seed": -1},
        {"seed": 2**64},
        {"renormalize": 1},
        {"delay": -0.1},
        {"delay": float("nan")},
        {"delay": float("inf")},
        {"delay": "1"},
    ],
)
def test_arguments_out_of_range_are_named(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        SyntheticSource(**{**GOOD, **change})


def test_it_is_an_expert_source_with_bounds() -> None:
    source = SyntheticSource(**GOOD)
    assert open_source(source) is source
    source.drop_page_cache(0, 0)
    assert "layer 1, expert 2" in source.location(1, 2)
    size = source.geometry.expert_bytes
    for layer, expert in ((-1, 0), (2, 0), (0, -1), (0, 3)):
        with pytest.raises(IndexError, match="no expert"):
            source.read_into(layer, expert, memoryview(bytearray(size)))
    for bad in (memoryview(bytes(size)), memoryview(bytearray(size - 1))):
        with pytest.raises(ValueError, match="the buffer must be"):
            source.read_into(0, 0, bad)
    source.close()
