"""Experts come out of a folder byte for byte, whatever the family's spelling; and what changes is noticed."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_builder import EXPERTS, HIDDEN, INNER, NUMPY_DTYPES, SPELLINGS, TOP_K, build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from shmroute.errors import (
    CheckpointChangedError,
    CheckpointError,
    UnsupportedDtypeError,
    UnsupportedScoringError,
)
from shmroute.sources import ExpertSource, HuggingFaceSource, ModelScoring, SourceSpec, open_source, served_file

TINY_MIXTRAL = Path(__file__).parents[2] / "examples" / "tiny-mixtral"
INDEX = "model.safetensors.index.json"


@contextmanager
def opened(folder: Path) -> Iterator[HuggingFaceSource]:
    with closing(HuggingFaceSource(folder)) as source:
        yield source


def read(source: ExpertSource, layer: int, expert: int) -> bytes:
    buffer = bytearray(source.geometry.expert_bytes)
    source.read_into(layer, expert, memoryview(buffer))
    return bytes(buffer)


def same_bytes(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


# What is served


def test_the_shipped_checkpoint_s_experts_equal_the_library_s() -> None:
    library = load_file(TINY_MIXTRAL / "model.safetensors")
    with opened(TINY_MIXTRAL) as source:
        geometry = source.geometry
        assert (geometry.num_layers, geometry.num_experts, geometry.top_k) == (6, 8, 2)
        assert geometry.scoring == ModelScoring(True)
        for layer in range(6):
            stem = f"model.layers.{layer}.block_sparse_moe."
            gate = library[f"{stem}gate.weight"].astype(np.float32)
            assert same_bytes(source.gate(layer), gate)
            for expert in range(8):
                buffer = memoryview(bytearray(geometry.expert_bytes))
                source.read_into(layer, expert, buffer)
                for layout, name in zip(geometry.tensors, ("w1", "w3", "w2"), strict=True):
                    expected = library[f"{stem}experts.{expert}.{name}.weight"]
                    assert same_bytes(layout.view(buffer), expected)


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(("model_type", "fused"), SPELLINGS)
def test_every_family_is_served_in_every_spelling_and_dtype(
    tmp_path: Path, model_type: str, fused: bool, shards: int, dtype: str
) -> None:
    made = build(tmp_path / "m", model_type, dtype=dtype, fused=fused, shards=shards)
    with opened(made.folder) as source:
        geometry = source.geometry
        assert geometry.layer_numbers == made.family.moe_layers
        assert geometry.num_layers == len(made.family.moe_layers)
        assert (geometry.num_experts, geometry.top_k) == (EXPERTS, TOP_K)
        assert geometry.scoring.renormalize is made.family.renormalize
        assert [(t.name, t.shape, t.dtype) for t in geometry.tensors] == [
            (name, shape, dtype) for name, shape in made.family.parts.items()
        ]
        for layer, gate in made.gates.items():
            assert same_bytes(source.gate(layer), gate.astype(np.float32))
            for bias, expected in (
                (source.gate_bias(layer), made.gate_biases.get(layer)),
                (source.correction_bias(layer), made.correction_biases.get(layer)),
            ):
                if expected is None:
                    assert bias is None
                else:
                    assert same_bytes(bias, expected.astype(np.float32))
        buffer = memoryview(bytearray(geometry.expert_bytes))
        for (layer, expert), parts in made.experts.items():
            source.read_into(layer, expert, buffer)
            assert bytes(buffer) == made.expert_bytes(layer, expert)
            for layout, part in zip(geometry.tensors, parts, strict=True):
                assert same_bytes(layout.view(buffer), part)


BIASES = {
    "deepseek_v3": "model.layers.1.mlp.gate.e_score_correction_bias",
    "gpt_oss": "model.layers.1.mlp.router.bias",
}


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda tensors, bias: tensors.pop(bias), "the tensor is missing"),
        (lambda tensors, bias: tensors.update({bias: np.zeros(EXPERTS + 1, np.float32)}), "its shape is [5]"),
    ],
    ids=["missing", "of another length"],
)
@pytest.mark.parametrize(("model_type", "bias"), BIASES.items())
def test_a_router_s_bias_must_be_there_and_fit(
    tmp_path: Path, model_type: str, bias: str, change: Callable[[dict[str, Any], str], object], what: str
) -> None:
    made = build(tmp_path / "m", model_type, change=lambda tensors: change(tensors, bias))
    with pytest.raises(CheckpointError) as refused:
        HuggingFaceSource(made.folder)
    assert bias in str(refused.value)
    assert what in str(refused.value)


@pytest.mark.parametrize(
    ("model_type", "name", "shape"),
    [(family, name, (EXPERTS,)) for family, name in BIASES.items()]
    + [
        ("gpt_oss", f"model.layers.1.mlp.experts.{name}", (EXPERTS, *shape))
        for name, shape in (
            ("gate_up_proj", (HIDDEN, 2 * INNER)), ("gate_up_proj_bias", (2 * INNER,)), ("down_proj", (INNER, HIDDEN)),
            ("down_proj_bias", (HIDDEN,)),
        )
    ],
)  # fmt: skip
def test_other_biases_or_weights_of_the_first_expert_are_another_checkpoint(
    tmp_path: Path, model_type: str, name: str, shape: tuple[int, ...]
) -> None:
    fingerprints = set()
    for number in range(2):
        made = build(
            tmp_path / str(number),
            model_type,
            change=lambda tensors, number=number: tensors.update({name: np.full(shape, number, np.float32)}),
        )
        with opened(made.folder) as source:
            fingerprints.add(source.geometry.fingerprint)
    assert len(fingerprints) == 2


@pytest.mark.parametrize("prefix", ["", "model.", "language_model.model.", "model.language_model."])
def test_the_tensors_common_prefix_is_found(tmp_path: Path, prefix: str) -> None:
    made = build(tmp_path / "m", prefix=prefix)
    with opened(made.folder) as source:
        assert read(source, 1, 3) == made.expert_bytes(1, 3)
        name = f"{prefix}layers.1.block_sparse_moe.experts.3.w1.weight"
        assert source.location(1, 3) == f"{made.folder / 'model.safetensors'}: {name}"


def test_a_single_file_of_another_name_is_found(tmp_path: Path) -> None:
    made = build(tmp_path / "m")
    (made.folder / "model.safetensors").rename(made.folder / "weights.safetensors")
    with opened(made.folder) as source:
        assert read(source, 0, 0) == made.expert_bytes(0, 0)


def test_fused_and_separate_layers_may_mix_and_extra_prediction_layers_are_ignored(tmp_path: Path) -> None:
    def fuse_layer_1(tensors: dict[str, Any]) -> None:
        stem = "model.layers.1.mlp."
        old = "model.layers.1.block_sparse_moe."
        parts = [
            [tensors.pop(f"{old}experts.{n}.{name}.weight") for name in ("w1", "w3", "w2")] for n in range(EXPERTS)
        ]
        tensors[f"{stem}experts.gate_up_proj"] = np.stack([np.concatenate(p[:2]) for p in parts])
        tensors[f"{stem}experts.down_proj"] = np.stack([p[2] for p in parts])
        tensors[f"{stem}gate.weight"] = tensors.pop(f"{old}gate.weight")
        tensors["model.layers.2.mlp.experts.0.gate_proj.weight"] = np.zeros(1, np.int8)

    made = build(tmp_path / "m", change=fuse_layer_1)
    with opened(made.folder) as source:
        for layer, expert in made.experts:
            assert read(source, layer, expert) == made.expert_bytes(layer, expert)


def test_a_spec_opens_the_same_source_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = build(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    with opened(Path("m")) as source:
        spec = SourceSpec(**json.loads(json.dumps(vars(source.spec))))
        assert spec.arguments == {"path": str(made.folder)}
        monkeypatch.chdir("/")
        with closing(spec.open()) as other:
            assert other.geometry == source.geometry


def test_open_source_takes_a_path_or_a_source(tmp_path: Path) -> None:
    made = build(tmp_path / "m")
    with closing(open_source(str(made.folder))) as source:
        assert isinstance(source, HuggingFaceSource)
        assert isinstance(source, ExpertSource)
        assert open_source(source) is source
    for wrong in (7, None, HuggingFaceSource):
        with pytest.raises(TypeError, match="a path of a Hugging Face model folder or an ExpertSource"):
            open_source(wrong)  # type: ignore[arg-type]


# How it is read


def test_adjacent_tensors_are_read_by_one_call_in_file_order(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[int]] = []
    preadv = os.preadv

    def recorded(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        calls.append([len(buffer) for buffer in buffers])
        return preadv(fd, buffers, offset)

    with opened(TINY_MIXTRAL) as source:
        monkeypatch.setattr(os, "preadv", recorded)
        read(source, 0, 0)
        assert len(calls) == 1
        assert len(calls[0]) == 3


@pytest.mark.parametrize("part", [1, 10, 64, 1 << 20])
@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_each_part_is_told_of_once_it_is_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, part: int
) -> None:
    made = build(tmp_path / "m", model_type, shards=2)
    monkeypatch.setattr(served_file, "PART", part)
    with opened(made.folder) as source:
        for layer, expert in made.experts:
            expected = made.expert_bytes(layer, expert)
            buffer = memoryview(bytearray(len(expected)))
            parts: list[list[tuple[int, int]]] = [[], []]
            for told in parts:
                buffer[:] = bytes(byte ^ 0xFF for byte in expected)

                def filled(begin: int, end: int, told: list[tuple[int, int]] = told) -> None:
                    assert buffer[begin:end] == expected[begin:end]  # noqa: B023 - called within this turn
                    told.append((begin, end))

                source.read_into(layer, expert, buffer, filled)
            assert parts[0] == parts[1]
            assert all(0 < end - begin <= part for begin, end in parts[0])
            in_order = sorted(parts[0])
            assert [begin for begin, _ in in_order] == [0, *(end for _, end in in_order[:-1])]
            assert in_order[-1][1] == len(expected)


@pytest.mark.parametrize("limit", [1, 7, 200])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_short_reads_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, limit: int
) -> None:
    made = build(tmp_path / "m", model_type, shards=2)
    preadv = os.preadv

    def short(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return preadv(fd, [buffers[0][:limit]], offset)

    with opened(made.folder) as source:
        monkeypatch.setattr(os, "preadv", short)
        for layer, expert in made.experts:
            assert read(source, layer, expert) == made.expert_bytes(layer, expert)


def test_an_unexpected_end_of_file_is_a_truncation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = build(tmp_path / "m")
    with opened(made.folder) as source:
        monkeypatch.setattr(os, "preadv", lambda *_: 0)
        with pytest.raises(CheckpointError, match="truncated") as caught:
            read(source, 1, 2)
    assert caught.value.path == str(made.folder / "model.safetensors")
    assert caught.value.tensor is not None
    assert ".1.block_sparse_moe.experts.2." in caught.value.tensor


def test_an_error_of_the_read_itself_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> int:
        raise OSError(5, "Input/output error")

    made = build(tmp_path / "m")
    with opened(made.folder) as source:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(OSError, match="Input/output error"):
            read(source, 0, 0)


def test_many_threads_read_at_once(tmp_path: Path) -> None:
    made = build(tmp_path / "m", "deepseek_v2", shards=3)
    wrong: list[tuple[int, int]] = []
    with opened(made.folder) as source:

        def work() -> None:
            for _ in range(50):
                wrong.extend(key for key in made.experts if read(source, *key) != made.expert_bytes(*key))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_only_the_expert_s_own_buffer_is_accepted_and_only_existing_experts(tmp_path: Path) -> None:
    made = build(tmp_path / "m")
    with opened(made.folder) as source:
        size = source.geometry.expert_bytes
        wrong: list[Any] = [
            memoryview(bytes(size)),
            memoryview(bytearray(size + 1)),
            memoryview(bytearray(size)).cast("f"),
            memoryview(bytearray(2 * size))[::2][:-1],
        ]
        for bad in wrong:
            with pytest.raises(ValueError, match="the buffer must be"):
                source.read_into(0, 0, bad)
        for layer, expert in ((-1, 0), (2, 0), (0, -1), (0, EXPERTS)):
            with pytest.raises(IndexError, match="no expert"):
                source.read_into(layer, expert, memoryview(bytearray(size)))
        with pytest.raises(IndexError):
            source.gate(-1)


@pytest.mark.parametrize(("model_type", "runs"), [("mixtral", ((0, 1), (2,))), ("gpt_oss", ((0,), (1,), (2,), (3,)))])
def test_dropping_page_cache_covers_exactly_the_expert_s_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str, runs: tuple[tuple[int, ...], ...]
) -> None:
    made = build(tmp_path / "m", model_type, fused=True)
    dropped: list[tuple[int, int]] = []
    advise = os.posix_fadvise

    def recorded(fd: int, offset: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        dropped.append((offset, length))
        advise(fd, offset, length, advice)

    content = (made.folder / "model.safetensors").read_bytes()
    with opened(made.folder) as source:
        monkeypatch.setattr(os, "posix_fadvise", recorded)
        source.drop_page_cache(1, 2)
        parts = [array.tobytes() for array in made.experts[1, 2]]
        expected = sorted(b"".join(parts[part] for part in run) for run in runs)
        assert sorted(content[o : o + n] for o, n in dropped) == expected
        assert read(source, 1, 2) == made.expert_bytes(1, 2)


def test_closing_twice_is_harmless_and_gives_all_descriptors_back(tmp_path: Path) -> None:
    made = build(tmp_path / "m", shards=3)
    before = len(os.listdir("/proc/self/fd"))
    source = HuggingFaceSource(made.folder)
    assert len(os.listdir("/proc/self/fd")) == before + 3
    source.close()
    source.close()
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(OSError, match="Bad file descriptor"):
        read(source, 0, 0)


# What changes


def rewrite(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("change", [rewrite, truncate])
def test_a_file_that_changes_while_it_is_served_is_noticed(tmp_path: Path, change: Callable[[Path], None]) -> None:
    made = build(tmp_path / "m")
    with opened(made.folder) as source:
        change(made.folder / "model.safetensors")
        for attempt in (lambda: read(source, 0, 0), lambda: source.gate(0)):
            with pytest.raises(CheckpointChangedError, match="changed after it was opened") as caught:
                attempt()
            assert caught.value.path == str(made.folder / "model.safetensors")
            assert caught.value.tensor is not None


def test_a_change_during_the_read_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = build(tmp_path / "m")
    preadv = os.preadv

    def meanwhile(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        count = preadv(fd, buffers, offset)
        rewrite(made.folder / "model.safetensors")
        return count

    with opened(made.folder) as source:
        monkeypatch.setattr(os, "preadv", meanwhile)
        with pytest.raises(CheckpointChangedError):
            read(source, 0, 0)


def test_a_replaced_file_goes_on_being_served_as_it_was(tmp_path: Path) -> None:
    made = build(tmp_path / "m")
    path = made.folder / "model.safetensors"
    with opened(made.folder) as source:
        (tmp_path / "other").write_bytes(b"something else")
        os.replace(tmp_path / "other", path)
        assert read(source, 1, 1) == made.expert_bytes(1, 1)


def test_the_fingerprint_is_of_files_weights_and_config(tmp_path: Path) -> None:
    def fingerprint(folder: Path) -> str:
        with opened(folder) as source:
            return source.geometry.fingerprint

    def other_weights(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.block_sparse_moe.gate.weight"] = np.zeros((EXPERTS, HIDDEN), np.float32)

    made = build(tmp_path / "a")
    shutil.copytree(made.folder, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == fingerprint(made.folder)
    others = {
        fingerprint(build(tmp_path / "b", config={"num_experts_per_tok": 1}).folder),
        fingerprint(build(tmp_path / "c", dtype="float16").folder),
        fingerprint(build(tmp_path / "d", shards=2).folder),
        fingerprint(build(tmp_path / "e", change=other_weights).folder),
        fingerprint(build(tmp_path / "f", fused=True).folder),
    }
    assert len(others | {fingerprint(made.folder)}) == 6


# What is refused

EXPERT_0 = "model.layers.0.block_sparse_moe.experts.0."


def setting(name: str, array: np.ndarray[Any, Any]) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: tensors.update({name: array})


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("name", [f"{EXPERT_0}w2.weight", "model.layers.1.block_sparse_moe.gate.weight"])
def test_a_missing_tensor_is_named(tmp_path: Path, name: str, shards: int) -> None:
    made = build(tmp_path / "m", shards=shards, change=lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match="the tensor is missing") as caught:
        HuggingFaceSource(made.folder)
    assert caught.value.tensor == name
    assert caught.value.path == str(made.folder / ("model.safetensors" if shards == 1 else INDEX))


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        (setting(f"{EXPERT_0}w1.weight", np.zeros((HIDDEN, INNER), np.float32)), CheckpointError, "shape"),
        (
            setting(f"{EXPERT_0}w1.weight", np.zeros((INNER + 1, HIDDEN), np.float32)),
            CheckpointError,
            "shape",
        ),
        (
            setting(f"{EXPERT_0}w3.weight", np.zeros((INNER, HIDDEN), np.float16)),
            CheckpointError,
            "other experts",
        ),
        (setting(f"{EXPERT_0}w1.weight", np.zeros((INNER, HIDDEN), np.int8)), UnsupportedDtypeError, "I8"),
        (setting(f"{EXPERT_0}w1.weight", np.zeros((INNER, HIDDEN))), UnsupportedDtypeError, "F64"),
        (setting(f"{EXPERT_0}w1.weight_scale_inv", np.zeros(1)), UnsupportedDtypeError, "quantised"),
        (setting(f"{EXPERT_0}w1.qweight", np.zeros(1)), UnsupportedDtypeError, "quantised"),
        (setting(f"{EXPERT_0}w1.bias", np.zeros(INNER, np.float32)), CheckpointError, "not expected"),
        (
            setting("model.layers.0.block_sparse_moe.experts.4.w1.weight", np.zeros((INNER, HIDDEN), np.float32)),
            CheckpointError,
            "not expected",
        ),
        (setting("model.layers.0.mlp.experts.down_proj", np.zeros(1)), CheckpointError, "both under"),
        (setting("layers.0.mlp.experts.down_proj", np.zeros(1)), CheckpointError, "several models"),
        (
            setting("model.layers.0.block_sparse_moe.gate.weight", np.zeros((HIDDEN, EXPERTS), np.float32)),
            CheckpointError,
            "shape",
        ),
        (
            setting("model.layers.0.block_sparse_moe.gate.weight", np.zeros((EXPERTS, HIDDEN), np.int8)),
            UnsupportedDtypeError,
            "I8",
        ),
        (
            setting("model.layers.0.block_sparse_moe.gate.weight_scale_inv", np.zeros(1)),
            UnsupportedDtypeError,
            "router is quantised",
        ),
        (
            setting("model.layers.0.block_sparse_moe.gate.e_score_correction_bias", np.zeros(EXPERTS)),
            UnsupportedScoringError,
            "more than a weight",
        ),
        (
            setting("model.layers.0.block_sparse_moe.e_score_correction_bias", np.zeros(EXPERTS)),
            UnsupportedScoringError,
            "more than a weight",
        ),
    ],
)
def test_tensors_that_cannot_be_served_as_they_are_are_refused_by_name(
    tmp_path: Path,
    change: Callable[[dict[str, Any]], object],
    error: type[CheckpointError],
    reason: str,
) -> None:
    made = build(tmp_path / "m", change=change)
    with pytest.raises(CheckpointError, match=reason) as caught:
        HuggingFaceSource(made.folder)
    assert type(caught.value) is error
    assert caught.value.path == str(made.folder / "model.safetensors")


@pytest.mark.parametrize("size", [INNER, HIDDEN, HIDDEN // 2])
def test_the_transposed_fused_layout_is_refused_as_such_even_where_shapes_coincide(tmp_path: Path, size: int) -> None:
    def transpose(tensors: dict[str, Any]) -> None:
        for number in range(2):
            stem = f"model.layers.{number}.block_sparse_moe.experts."
            tensors[f"{stem}gate_up_proj"] = np.zeros((EXPERTS, HIDDEN, 2 * size), np.float32)
            tensors[f"{stem}down_proj"] = np.zeros((EXPERTS, size, HIDDEN), np.float32)

    made = build(tmp_path / "m", fused=True, config={"intermediate_size": size}, change=transpose)
    with pytest.raises(CheckpointError, match="stored transposed"):
        HuggingFaceSource(made.folder)


GPT_OSS = "model.layers.0.mlp."


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        (lambda tensors: tensors.pop(f"{GPT_OSS}experts.gate_up_proj_bias"), CheckpointError, "is missing"),
        (lambda tensors: tensors.pop(f"{GPT_OSS}experts.down_proj"), CheckpointError, "is missing"),
        (
            setting(f"{GPT_OSS}experts.gate_up_proj", np.zeros((EXPERTS, 2 * INNER, HIDDEN), np.float32)),
            CheckpointError,
            r"shape is \[4, 12, 8\], but by config.json it is \[4, 8, 12\]",
        ),
        (
            setting(f"{GPT_OSS}experts.down_proj_bias", np.zeros((EXPERTS, INNER), np.float32)),
            CheckpointError,
            "shape",
        ),
        (
            setting(f"{GPT_OSS}experts.down_proj_bias", np.zeros((EXPERTS, HIDDEN), np.float16)),
            CheckpointError,
            "other experts",
        ),
        (
            setting(f"{GPT_OSS}experts.0.down_proj.weight", np.zeros((HIDDEN, INNER), np.float32)),
            CheckpointError,
            "gpt_oss model have gate_up, gate_up_bias, down, down_bias each",
        ),
        (
            setting(f"{GPT_OSS}gate.weight", np.zeros((EXPERTS, HIDDEN), np.float32)),
            UnsupportedScoringError,
            "more than a weight and a bias",
        ),
        (
            setting(f"{GPT_OSS}experts.gate_up_proj_blocks", np.zeros((EXPERTS, 12, 1, 4), np.uint8)),
            UnsupportedDtypeError,
            "experts are quantised",
        ),
    ],
)  # fmt: skip
def test_what_is_not_as_gpt_oss_stores_it_is_refused_by_name(
    tmp_path: Path,
    change: Callable[[dict[str, Any]], object],
    error: type[CheckpointError],
    reason: str,
) -> None:
    made = build(tmp_path / "m", "gpt_oss", change=change)
    with pytest.raises(CheckpointError, match=reason) as caught:
        HuggingFaceSource(made.folder)
    assert type(caught.value) is error
    assert caught.value.tensor is not None
    assert caught.value.tensor.startswith(GPT_OSS)


@pytest.mark.parametrize(
    ("name", "shape", "error", "reason"),
    [
        ("experts.gate_up_proj_bias", (EXPERTS, 2 * INNER), CheckpointError, "not expected"),
        ("router.weight", (EXPERTS, HIDDEN), UnsupportedScoringError, "more than a weight;"),
        ("gate.bias", (EXPERTS,), UnsupportedScoringError, "more than a weight;"),
    ],
)
def test_what_only_gpt_oss_has_is_refused_of_others(
    tmp_path: Path, name: str, shape: tuple[int, ...], error: type[CheckpointError], reason: str
) -> None:
    name = f"model.layers.0.mlp.{name}"
    made = build(tmp_path / "m", "olmoe", fused=True, change=setting(name, np.zeros(shape, np.float32)))
    with pytest.raises(CheckpointError, match=reason) as caught:
        HuggingFaceSource(made.folder)
    assert (type(caught.value), caught.value.tensor) == (error, name)


@pytest.mark.parametrize("model_type", ["mixtral", "gpt_oss"])
def test_block_quantised_fused_experts_are_refused(tmp_path: Path, model_type: str) -> None:
    def to_blocks(tensors: dict[str, Any]) -> None:
        for name in [name for name in tensors if name.endswith("_proj") and "experts" in name]:
            del tensors[name]
            tensors[f"{name}_blocks"] = np.zeros((EXPERTS, 4), np.uint8)
            tensors[f"{name}_scales"] = np.zeros((EXPERTS, 1), np.uint8)

    made = build(tmp_path / "m", model_type, fused=True, change=to_blocks)
    with pytest.raises(UnsupportedDtypeError, match="quantised"):
        HuggingFaceSource(made.folder)


def test_experts_in_a_layer_that_the_config_calls_dense_are_refused(tmp_path: Path) -> None:
    made = build(tmp_path / "m", "deepseek_v2", config={"first_k_dense_replace": 3})
    with pytest.raises(CheckpointError, match="layer 2 has no experts"):
        HuggingFaceSource(made.folder)


def test_a_layer_or_a_model_without_the_promised_experts_is_refused(tmp_path: Path) -> None:
    def only(keep: Callable[[str], bool]) -> Callable[[dict[str, Any]], None]:
        def change(tensors: dict[str, Any]) -> None:
            for name in [name for name in tensors if not keep(name)]:
                del tensors[name]

        return change

    made = build(tmp_path / "a", change=only(lambda name: ".1.block_sparse_moe.experts" not in name))
    with pytest.raises(CheckpointError, match="layer 1 has experts by config"):
        HuggingFaceSource(made.folder)
    made = build(tmp_path / "b", change=only(lambda name: "block_sparse_moe" not in name))
    with pytest.raises(CheckpointError, match="no experts found"):
        HuggingFaceSource(made.folder)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        HuggingFaceSource(tmp_path / "absent")
    folder = build(tmp_path / "m", shards=2).folder
    shard = folder / "model-00002-of-00002.safetensors"
    truncate(shard)
    with pytest.raises(CheckpointError, match="truncated") as caught:
        HuggingFaceSource(folder)
    assert caught.value.path == str(shard)
    shard.unlink()
    with pytest.raises(CheckpointError, match="does not exist") as caught:
        HuggingFaceSource(folder)
    assert caught.value.path == str(shard)
    (folder / INDEX).unlink()
    (folder / "model-00001-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="neither model"):
        HuggingFaceSource(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="does not exist"):
        HuggingFaceSource(folder)


def test_a_refused_checkpoint_leaves_no_descriptor_open(tmp_path: Path) -> None:
    made = build(tmp_path / "m", shards=3, change=lambda tensors: tensors.pop(f"{EXPERT_0}w2.weight"))
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError):
        HuggingFaceSource(made.folder)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_shard_without_the_tensor_that_the_index_promises_is_refused(tmp_path: Path) -> None:
    folder = build(tmp_path / "m", shards=2).folder
    index = json.loads((folder / INDEX).read_text())
    name = f"{EXPERT_0}w1.weight"
    shards = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
    (index["weight_map"][name],) = shards - {index["weight_map"][name]}
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="says it is here, but it is not") as caught:
        HuggingFaceSource(folder)
    assert (caught.value.tensor, os.path.basename(caught.value.path)) == (name, index["weight_map"][name])


@pytest.mark.parametrize(
    "shard",
    [
        "../m.safetensors",
        "/etc/m.safetensors",
        "sub/m.safetensors",
        "m\0.safetensors",
        "m.bin",
        "",
        "..",
        3,
        None,
    ],
)
def test_shard_names_that_lead_elsewhere_are_refused(tmp_path: Path, shard: object) -> None:
    folder = build(tmp_path / "m", shards=2).folder
    save_file({"a": np.zeros(1)}, tmp_path / "m.safetensors")
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(CheckpointError, match="the plain name of") as caught:
        HuggingFaceSource(folder)
    assert caught.value.tensor == "a"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"a": 1, "a": 1}'])
def test_an_unusable_index_is_refused(tmp_path: Path, text: str) -> None:
    folder = build(tmp_path / "m", shards=2).folder
    (folder / INDEX).write_text(text)
    with pytest.raises(CheckpointError) as caught:
        HuggingFaceSource(folder)
    assert caught.value.path == str(folder / INDEX)


names = st.sampled_from(
    [f"{EXPERT_0}w1.weight", "model.layers.0.mlp.gate.weight", "layers.7.mlp.experts.down_proj"]
) | st.text(max_size=8)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    index=st.binary(max_size=80)
    | st.dictionaries(
        names,
        st.sampled_from(["model-00001-of-00002.safetensors", "x.safetensors", ".."]) | st.text(max_size=8),
        max_size=4,
    ).map(lambda weight_map: json.dumps({"weight_map": weight_map}).encode())
)
def test_arbitrary_indexes_are_refused(tmp_path: Path, index: bytes) -> None:
    folder = tmp_path / "m"
    if not folder.exists():
        build(folder, shards=2)
    (folder / INDEX).write_bytes(index)
    with pytest.raises(CheckpointError):
        HuggingFaceSource(folder)
