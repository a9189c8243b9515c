"""Checkpoints whose files hold anything: a `CheckpointError` that names the file, or experts that can be read."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fuzzing import HOSTILE_NUMBERS, bounded, damaged_bytes, damaged_json, fuzz, json_values, to_text
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from shmroute.errors import CheckpointError
from shmroute.sources import HuggingFaceSource, ModelScoring
from shmroute.sources.bounded_json import parse_json_object
from shmroute.sources.model_config import ModelConfig, read_model_config
from shmroute.sources.safetensors_header import ITEM_BYTES, LENGTH_BYTES, MAX_DIMENSIONS, MAX_HEADER_BYTES, read_header

HIDDEN, INNER, EXPERTS, LAYERS = 4, 3, 2, 2
INDEX = "model.safetensors.index.json"
SHARDS = ("model-1.safetensors", "model-2.safetensors")

SMALL = save({"a": np.arange(4, dtype=np.float32), "b": np.ones((2, 2), np.float16), "c": np.zeros(0, np.int8)})
"""A safetensors file."""

LENGTH = int.from_bytes(SMALL[:LENGTH_BYTES], "little")
HEADER = json.loads(SMALL[LENGTH_BYTES : LENGTH_BYTES + LENGTH])
DATA = SMALL[LENGTH_BYTES + LENGTH :]

CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": EXPERTS, "intermediate_size": INNER},
    "qwen2_moe": {
        "num_experts": EXPERTS, "moe_intermediate_size": INNER, "decoder_sparse_step": 1, "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
    "deepseek_v2": {
        "n_routed_experts": EXPERTS, "moe_intermediate_size": INNER, "first_k_dense_replace": 0, "moe_layer_freq": 1,
        "n_group": 1, "topk_group": 1, "topk_method": "group_limited_greedy", "scoring_func": "softmax",
        "routed_scaling_factor": 1.0,
    },
    "gpt_oss": {"num_local_experts": EXPERTS, "intermediate_size": INNER, "experts_per_token": 1},
}  # fmt: skip
for family, own in CONFIGS.items():
    CONFIGS[family] = own | {
        "model_type": family, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_experts_per_tok": 1,
    }  # fmt: skip


FUSED: dict[str, dict[str, tuple[int, ...]]] = {
    "fused": {"gate_up_proj": (2 * INNER, HIDDEN), "down_proj": (HIDDEN, INNER)},
    "gpt_oss": {
        "gate_up_proj": (HIDDEN, 2 * INNER), "gate_up_proj_bias": (2 * INNER,), "down_proj": (INNER, HIDDEN),
        "down_proj_bias": (HIDDEN,),
    },
}  # fmt: skip
SPELLINGS = ("separate", *FUSED)


def tensors_of(spelling: str) -> dict[str, np.ndarray[Any, Any]]:
    """The weights of a model with 2 layers of 2 experts, in Mixtral's spelling, fused, or in gpt-oss's."""
    made = {}
    for layer in range(LAYERS):
        stem = f"model.layers.{layer}.{'mlp' if spelling in FUSED else 'block_sparse_moe'}."
        made[f"{stem}{'router' if spelling == 'gpt_oss' else 'gate'}.weight"] = np.ones((EXPERTS, HIDDEN), np.float32)
        if spelling == "gpt_oss":
            made[f"{stem}router.bias"] = np.ones(EXPERTS, np.float32)
        if spelling in FUSED:
            for name, shape in FUSED[spelling].items():
                made[f"{stem}experts.{name}"] = np.ones((EXPERTS, *shape), np.float32)
            continue
        for expert in range(EXPERTS):
            for name, shape in (("w1", (INNER, HIDDEN)), ("w3", (INNER, HIDDEN)), ("w2", (HIDDEN, INNER))):
                made[f"{stem}experts.{expert}.{name}.weight"] = np.full(shape, expert, np.float32)
    return made


def config_of(spelling: str) -> dict[str, Any]:
    """The ``config.json`` of a model in a spelling."""
    return CONFIGS["gpt_oss" if spelling == "gpt_oss" else "mixtral"]


def write_checkpoint(folder: Path, spelling: str = "separate", *, sharded: bool) -> None:
    """A sound checkpoint."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config_of(spelling)))
    tensors = tensors_of(spelling)
    if not sharded:
        save_file(tensors, folder / "model.safetensors")
        return
    names = list(tensors)
    weight_map = {}
    for number, shard in enumerate(SHARDS):
        own = {name: tensors[name] for name in names[number::2]}
        save_file(own, folder / shard)
        weight_map |= dict.fromkeys(own, shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


@pytest.fixture(
    scope="module",
    params=[(spelling, sharded) for spelling in SPELLINGS for sharded in (False, True)],
    ids=lambda made: f"{made[0]}{' shards' * made[1]}",
)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound checkpoint; every test puts it right again."""
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    spelling, sharded = request.param
    write_checkpoint(folder, spelling, sharded=sharded)
    return folder


@contextlib.contextmanager
def instead(path: Path, content: bytes) -> Iterator[None]:
    """Other content in a file, for the length of a block."""
    original = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(original)


def opens_or_refuses(folder: Path) -> CheckpointError | None:
    """Open a checkpoint and read all of it; the error that named one of its files, if it did."""
    size = sum(file.stat().st_size for file in folder.iterdir())
    with bounded(size):
        try:
            with contextlib.closing(HuggingFaceSource(folder)) as source:
                geometry = source.geometry
                assert geometry.num_layers * geometry.num_experts * geometry.expert_bytes <= size
                expert = memoryview(bytearray(geometry.expert_bytes))
                for layer in range(geometry.num_layers):
                    assert source.gate(layer).shape == (geometry.num_experts, geometry.hidden_size)
                    bias = source.gate_bias(layer)
                    assert bias is None or bias.shape == (geometry.num_experts,)
                    for number in range(geometry.num_experts):
                        source.read_into(layer, number, expert)
                        source.location(layer, number)
        except CheckpointError as error:
            assert Path(error.path) == folder or Path(error.path).parent == folder
            assert str(error).startswith(error.path)
            return error
    return None


def test_a_sound_checkpoint_opens(checkpoint: Path) -> None:
    assert opens_or_refuses(checkpoint) is None


# ------------------------------------------------------------------ JSON


@fuzz(2)
@given(raw=st.binary(max_size=100) | json_values.map(to_text) | damaged_json(HEADER) | damaged_bytes(to_text(HEADER)))
@example(raw=b'{"a":' + b"[" * 100_000)
@example(raw=b'{"\\ud800":1}')
@example(raw=b'{"a":' + b"9" * 5000 + b"}")
@example(raw=b"{" + b'"":{},' * 30_000 + b'"a":1}')
def test_any_bytes_are_one_json_object_or_an_error(raw: bytes) -> None:
    with bounded(len(raw)):
        try:
            found = parse_json_object(raw, "file")
        except CheckpointError as error:
            assert error.path == "file"
            assert len(str(error)) < 1000
            return
        assert isinstance(found, dict)
    again = parse_json_object(raw, "file")
    assert json.dumps(found) == json.dumps(again)
    assert all(name.encode() is not None for name in found)


@pytest.mark.parametrize(
    "raw",
    [b'{"a":NaN}', b'{"a":-Infinity}', b'{"a":1,"a":1}', b'{"a":{"b":1,"b":2}}', b"\xef\xbb\xbf{}", b"[]", b"1",
     '{"a":1}'.encode("utf-16"), '{"a":1}'.encode("utf-32")],
)  # fmt: skip
def test_what_a_laxer_parser_takes_is_refused(raw: bytes) -> None:
    with pytest.raises(CheckpointError, match=r"^file: "):
        parse_json_object(raw, "file")


# ------------------------------------------------------------------ safetensors headers


def header_is_sound_or_refused(path: Path) -> None:
    """The ranges of the tensors tile the data, and fit shapes and dtypes."""
    size = path.stat().st_size
    with bounded(size):
        try:
            header = read_header(str(path))
        except CheckpointError as error:
            assert error.path == str(path)
            return
    position = LENGTH_BYTES + len(header.raw)
    for entry in sorted(header.tensors.values(), key=lambda entry: (entry.begin, entry.end)):
        assert (entry.begin, entry.begin <= entry.end <= size) == (position, True)
        position = entry.end
        assert len(entry.shape) <= MAX_DIMENSIONS
        if entry.dtype in ITEM_BYTES:
            count = 1
            for extent in entry.shape:
                count *= extent
            assert count * ITEM_BYTES[entry.dtype] == entry.end - entry.begin
    assert position == size


@fuzz(2)
@given(content=damaged_bytes(SMALL, focus=LENGTH_BYTES + LENGTH))
def test_a_damaged_header_is_refused_or_tiles_the_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any.safetensors"
    path.write_bytes(content)
    header_is_sound_or_refused(path)


@fuzz(2)
@given(header=damaged_json(HEADER), data=st.just(DATA) | st.binary(max_size=30))
@example(header=to_text({"a": {"dtype": "F32", "shape": [2**62] * 64, "data_offsets": [0, 0]}}), data=b"")
@example(header=to_text({"a": {"dtype": "F32", "shape": [2**63 - 1] * 20_000, "data_offsets": [0, 0]}}), data=b"")
@example(header=to_text({f"t{n}": {"dtype": "?", "shape": [], "data_offsets": [0, 0]} for n in range(3000)}), data=b"")
@example(header=to_text({"a": {"dtype": "U8", "shape": [1] * 1000, "data_offsets": [0, 1]}}), data=b"x")
@example(header=to_text({"x" * 100_000: 1}), data=b"")
def test_a_header_of_damaged_fields_is_refused_or_tiles_the_file(tmp_path: Path, header: bytes, data: bytes) -> None:
    path = tmp_path / "any.safetensors"
    path.write_bytes(len(header).to_bytes(LENGTH_BYTES, "little") + header + data)
    header_is_sound_or_refused(path)


@fuzz()
@given(length=st.sampled_from(HOSTILE_NUMBERS) | st.integers(0, 2**64 - 1), size=st.integers(0, 2**42))
@example(length=MAX_HEADER_BYTES + 1, size=2**42)
@example(length=2**64 - 1, size=2**42)
@example(length=2**40, size=2**42)
def test_a_length_of_any_number_costs_no_memory_in_a_file_of_any_size(tmp_path: Path, length: int, size: int) -> None:
    if 0 <= length <= min(size - LENGTH_BYTES, MAX_HEADER_BYTES):
        length += MAX_HEADER_BYTES + 1  # what the format allows, and the file has, is read and so paid for
    path = tmp_path / "sparse.safetensors"
    path.write_bytes((length & (2**64 - 1)).to_bytes(LENGTH_BYTES, "little"))
    os.truncate(path, size)
    with bounded(), pytest.raises(CheckpointError) as refused:
        read_header(str(path))
    assert refused.value.path == str(path)


# ------------------------------------------------------------------ config.json


def config_is_sound_or_refused(path: Path) -> ModelConfig | None:
    """What a config says is within what a runtime can have."""
    with bounded(path.stat().st_size):
        try:
            config = read_model_config(str(path))
        except CheckpointError as error:
            assert error.path == str(path)
            assert len(str(error)) < 1000
            return None
    assert 1 <= config.top_k <= config.num_experts <= 4096
    assert 1 <= len(config.moe_layers) <= config.num_hidden_layers <= 1024
    assert list(config.moe_layers) == sorted(set(config.moe_layers) & set(range(config.num_hidden_layers)))
    assert min(config.hidden_size, config.intermediate_size) >= 1
    assert isinstance(config.scoring, ModelScoring)
    return config


@pytest.mark.parametrize("family", CONFIGS)
def test_an_undamaged_config_is_read(tmp_path: Path, family: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS[family]))
    assert config_is_sound_or_refused(tmp_path / "config.json") is not None


@fuzz(3)
@given(data=st.data(), family=st.sampled_from(sorted(CONFIGS)))
def test_a_damaged_config_is_refused_or_within_bounds(tmp_path: Path, data: st.DataObject, family: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(data.draw(damaged_json(CONFIGS[family]) | damaged_bytes(to_text(CONFIGS[family]))))
    config_is_sound_or_refused(path)


@pytest.mark.parametrize("number", HOSTILE_NUMBERS)
@pytest.mark.parametrize(
    ("family", "key"), [(family, key) for family, keys in CONFIGS.items() for key in keys if key != "model_type"]
)
def test_any_number_under_any_key_is_refused_or_within_bounds(
    tmp_path: Path, family: str, key: str, number: int
) -> None:
    (tmp_path / "config.json").write_bytes(to_text(CONFIGS[family] | {key: number}))
    config_is_sound_or_refused(tmp_path / "config.json")


# ------------------------------------------------------------------ whole checkpoints


@fuzz(0.3)
@given(data=st.data())
def test_a_checkpoint_with_a_damaged_file_is_refused_or_readable(checkpoint: Path, data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(sorted(checkpoint.iterdir())))
    original = file.read_bytes()
    if file.suffix == ".json":
        content = data.draw(damaged_json(json.loads(original)) | damaged_bytes(original))
    else:
        length = int.from_bytes(original[:LENGTH_BYTES], "little")
        begin = LENGTH_BYTES + length
        content = data.draw(
            damaged_bytes(original, focus=begin)
            | damaged_json(json.loads(original[LENGTH_BYTES:begin])).map(
                lambda header: len(header).to_bytes(LENGTH_BYTES, "little") + header + original[begin:]
            )
        )
    with instead(file, content):
        opens_or_refuses(checkpoint)
    assert opens_or_refuses(checkpoint) is None


@fuzz()
@given(
    shards=st.dictionaries(
        st.sampled_from(sorted(tensors_of("separate"))) | st.text(max_size=5),
        st.sampled_from([*SHARDS, "absent.safetensors", "../model-1.safetensors", "/dev/zero", "\ud800.safetensors",
                         "\0.safetensors", ".safetensors", "x" * 300 + ".safetensors", "folder.safetensors",
                         "fifo.safetensors"]) | json_values,
        max_size=6,
    )
)  # fmt: skip
def test_an_index_may_name_anything(tmp_path_factory: pytest.TempPathFactory, shards: dict[str, Any]) -> None:
    folder = tmp_path_factory.getbasetemp() / "indexed"
    if not folder.exists():
        write_checkpoint(folder, sharded=True)
        (folder / "folder.safetensors").mkdir()
        os.mkfifo(folder / "fifo.safetensors")
    (folder / INDEX).write_bytes(to_text({"weight_map": shards}))
    assert opens_or_refuses(folder) is not None


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    "promised",
    [
        {"num_hidden_layers": 1024, "num_local_experts": 4096, "num_experts_per_tok": 4096},
        {"hidden_size": 1 << 24, "intermediate_size": 1 << 24},
        {"num_local_experts": 4096},
    ],
)
def test_what_a_config_promises_is_not_allocated_before_the_files_have_it(
    tmp_path: Path, spelling: str, promised: dict[str, int]
) -> None:
    write_checkpoint(tmp_path / "model", spelling, sharded=False)
    config = config_of(spelling) | promised
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert opens_or_refuses(tmp_path / "model") is not None


def test_many_layers_with_one_tensor_each_do_not_cost_the_experts_that_they_lack(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", sharded=False)
    names = [f"model.layers.{layer}.mlp.experts.0.gate_proj.weight" for layer in range(1024)]
    save_file({name: np.zeros(1, np.int8) for name in names}, tmp_path / "model" / "model.safetensors")
    config = CONFIGS["mixtral"] | {"num_hidden_layers": 1024, "num_local_experts": 4096}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    assert opens_or_refuses(tmp_path / "model") is not None
