"""Settings of any text: a `ConfigError`, or settings that can be used; and nothing is imported by reading them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fuzzing import HOSTILE_NUMBERS, bounded, damaged_bytes, damaged_json, fuzz, json_values, segment_of, to_text
from hypothesis import example, given
from hypothesis import strategies as st
from typer.testing import CliRunner

from shmroute.cli import app
from shmroute.cli.inspection import look_at
from shmroute.config import RuntimeConfig, open_configured_source
from shmroute.errors import CheckpointError, ConfigError
from shmroute.lifecycle import attach
from shmroute.sources import SourceSpec, SyntheticSource, TensorLayout, faulty_spec
from shmroute.sources.base import DTYPES

SOURCE = SyntheticSource(2, 4, 4, 5)
CONFIG = RuntimeConfig.from_checkpoint(SOURCE, "50%", max_workers=2)
SETTINGS: dict[str, Any] = json.loads(CONFIG.to_json())
TENSOR = SETTINGS["tensors"][0]


def answers_or_refuses(text: bytes) -> None:
    """A `ConfigError`, or settings that are what `to_json` writes and whose every part can be used."""
    with bounded(len(text)):
        try:
            config = RuntimeConfig.from_json(text.decode("utf-8", "surrogateescape"))
        except ConfigError:
            return
        # By text: a NaN among a source's arguments equals nothing.
        assert RuntimeConfig.from_json(config.to_json()).to_json() == config.to_json()
        assert config.slots <= config.num_layers * config.num_experts
        assert config.budget_bytes == config.slots * config.slot_bytes
        if config.expert_bytes < 1 << 16:
            expert = memoryview(bytearray(config.expert_bytes))
            for tensor in config.tensors:
                assert tensor.view(expert).nbytes == tensor.nbytes
        assert config.source is None or (type(config.source.factory), type(config.source.arguments)) == (str, dict)
        assert config.fingerprint
        assert config.pager_command("name")


def test_undamaged_settings_are_read() -> None:
    assert RuntimeConfig.from_json(CONFIG.to_json()) == CONFIG


@fuzz()
@given(text=st.binary(max_size=200) | json_values.map(to_text))
@example(text=b"")
@example(text=b"[" * 100_000)
@example(text=b"{}")
def test_any_text_is_no_settings(text: bytes) -> None:
    with pytest.raises(ConfigError), bounded(len(text)):
        RuntimeConfig.from_json(text.decode("utf-8", "surrogateescape"))


@fuzz(2)
@given(text=damaged_json(SETTINGS))
@example(text=to_text(SETTINGS | {"tensors": [TENSOR | {"shape": [1.0]}]}))
@example(text=to_text(SETTINGS | {"tensors": [TENSOR | {"shape": [-1, -4]}]}))
@example(text=to_text(SETTINGS | {"tensors": [TENSOR | {"offset": 0.5}]}))
@example(text=to_text(SETTINGS | {"tensors": [TENSOR | {"name": []}]}))
@example(text=to_text(SETTINGS | {"tensors": [TENSOR | {"shape": [1] * 1000}]}))
@example(text=to_text(SETTINGS | {"tensors": [TENSOR] * 5000}))
@example(text=to_text(SETTINGS | {"source": {"factory": None, "arguments": {}}}))
@example(text=to_text(SETTINGS | {"source": {"factory": "a:b", "arguments": [1]}}))
@example(text=to_text(SETTINGS | {"affinity": SETTINGS["affinity"] | {"decay": float("nan")}}))
def test_damaged_settings_are_refused_or_sound(text: bytes) -> None:
    answers_or_refuses(text)


@fuzz(2)
@given(text=damaged_bytes(CONFIG.to_json().encode()))
def test_settings_with_damaged_bytes_are_refused_or_sound(text: bytes) -> None:
    answers_or_refuses(text)


@pytest.mark.parametrize("number", HOSTILE_NUMBERS)
@pytest.mark.parametrize("key", [key for key, value in SETTINGS.items() if type(value) is int])
def test_any_number_in_any_place_is_refused_or_sound(key: str, number: int) -> None:
    answers_or_refuses(to_text(SETTINGS | {key: number}))


# ------------------------------------------------------------------ tensors


@fuzz(2)
@given(
    name=json_values,
    offset=st.integers(0, 200) | json_values,
    shape=st.lists(st.integers(1, 5) | json_values, max_size=3).map(tuple) | json_values,
    dtype=st.sampled_from(list(DTYPES)) | json_values,
)
def test_a_tensor_of_any_fields_is_refused_or_can_be_viewed(name: Any, offset: Any, shape: Any, dtype: Any) -> None:
    expert = memoryview(bytearray(4096))
    with bounded(1000):
        try:
            tensor = TensorLayout(name, offset, shape, dtype)
        except ConfigError:
            return
        if tensor.offset >= 0 and tensor.offset + tensor.nbytes <= len(expert):
            assert tensor.view(expert).shape == shape


# ------------------------------------------------------------------ sources

FACTORIES = [
    "", ":", "a", "a:", ":a", ".:a", "..a:b", "a.:b", "a..b:c", "a\0b:c", "\ud800:a", "os", "os:", "os:path", "os:sep",
    "math:pi", "json:dumps", "shmroute.sources:DTYPES", "builtins:object", "builtins:dict", "builtins:len",
    "shmroute.sources.base:ExpertSource", "shmroute.sources.faulty:FaultySource",
    "shmroute.sources.synthetic:SyntheticSource", "shmroute.sources.huggingface:HuggingFaceSource",
    "shmroute.sources:TensorLayout", "shmroute.errors:CheckpointError",
]  # fmt: skip
"""Not only nonsense: also what can be imported and is no factory of sources, but does no harm."""


def nested(depth: int) -> SourceSpec:
    """A faulty source around a faulty source around …"""
    spec = SOURCE.spec
    for _ in range(depth):
        spec = faulty_spec(spec, "/nonexistent/control")
    return spec


@fuzz(0.5)
@given(
    factory=st.sampled_from(FACTORIES) | st.text(max_size=8).map("shmroute_nothing".__add__),
    arguments=st.dictionaries(
        st.sampled_from(["path", "num_layers", "num_experts", "hidden_size", "intermediate_size", "top_k", "dtype",
                         "seed", "delay", "inner_factory", "inner_arguments", "control"]) | st.text(max_size=5),
        json_values, max_size=6,
    ),
)  # fmt: skip
@example(factory="shmroute.sources.huggingface:HuggingFaceSource", arguments={"path": 5})
@example(factory="shmroute.sources.huggingface:HuggingFaceSource", arguments={"path": "\0"})
@example(factory="shmroute.sources.faulty:FaultySource", arguments=nested(400).arguments)
@example(factory="shmroute.sources.faulty:FaultySource", arguments=nested(3).arguments | {"control": "\0"})
@example(
    factory="shmroute.sources.synthetic:SyntheticSource",
    arguments={"num_layers": 1 << 24, "num_experts": 2, "hidden_size": 1 << 24, "intermediate_size": 1 << 24},
)
def test_a_source_of_any_recipe_is_refused_or_opens(factory: str, arguments: dict[str, Any]) -> None:
    text = to_text(SETTINGS | {"source": {"factory": factory, "arguments": arguments}})
    with bounded(len(text)):
        try:
            config = RuntimeConfig.from_json(text.decode())
            assert config.source is not None
            config.source.open().close()
        except (ConfigError, CheckpointError) as error:
            assert len(str(error)) < 30_000


def test_a_source_of_other_content_than_the_settings_say_is_refused() -> None:
    config = RuntimeConfig.from_json(CONFIG.to_json().replace(CONFIG.source_fingerprint, "0" * 32))
    with pytest.raises(CheckpointError, match="not those that the runtime was made for"):
        open_configured_source(config)


@pytest.fixture
def probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Name of a module that can be imported, but has not been."""
    name = f"probe_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    sys.modules.pop(name, None)


def test_settings_are_read_and_looked_at_without_importing_what_they_name(probe: str) -> None:
    """Only who asks for weights runs the code that a segment names: the pager, and a worker that wants a gate."""
    source = {"factory": f"{probe}:Source", "arguments": {"path": "somewhere"}}
    config = RuntimeConfig.from_json(json.dumps(SETTINGS | {"source": source}))
    with segment_of(config) as segment:
        for command, code in (("stat", 0), ("destroy", 1)):
            assert CliRunner().invoke(app, [command, segment.name]).exit_code == code
        assert look_at(segment.name) is not None
        with attach(segment.name) as runtime:
            runtime.router(0)
            runtime.metrics()
        config.pager_command(segment.name)
        assert probe not in sys.modules
        with pytest.raises(RuntimeError, match="imported"), attach(segment.name) as runtime:
            runtime.gate(0)
