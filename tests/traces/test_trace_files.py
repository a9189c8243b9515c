"""Loaders of traces: what they read, and what they say of anything else."""

from __future__ import annotations

import base64
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmroute.errors import ConfigError, TraceError
from shmroute.traces import Trace, open_trace, save_trace

EXPERTS = 5
IDS = np.array([[[0, 1], [2, 3]], [[4, 1], [0, -1]], [[2, 0], [1, 3]]], np.int32)  # 3 tokens, 2 layers, top 2


def write(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def meta(**keys: Any) -> Any:
    return np.array(json.dumps(keys))


# ------------------------------------------------------------------ npz


def test_what_was_saved_is_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    trace = Trace(
        "t", "t", IDS, EXPERTS, rng.random(IDS.shape, np.float32), rng.random((3, 2, EXPERTS), np.float32),
        np.array([0, 0, 7]), {"model": "none"},
    )  # fmt: skip
    save_trace(trace, tmp_path / "t.npz")
    again = open_trace(tmp_path / "t.npz")
    assert (again.num_tokens, again.num_layers, again.top_k, again.num_experts) == (3, 2, 2, EXPERTS)
    assert again.weights is not None
    assert again.logits is not None
    assert trace.weights is not None
    assert trace.logits is not None
    np.testing.assert_array_equal(again.ids, IDS)
    np.testing.assert_array_equal(again.weights, trace.weights)
    np.testing.assert_array_equal(again.logits, trace.logits)
    np.testing.assert_array_equal(again.seq_id, [0, 0, 7])
    assert again.meta["model"] == "none"


def test_the_logits_say_how_many_experts_there_are(tmp_path: Path) -> None:
    path = write(tmp_path / "t.npz", ids=IDS, logits=np.zeros((3, 2, 6), np.float32))
    assert open_trace(path).num_experts == 6


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        ({"x": IDS}, "no array 'ids'"),
        ({"ids": IDS}, "how many experts"),
        ({"ids": IDS, "meta": meta(experts="5")}, "how many experts"),
        ({"ids": IDS, "meta": np.array("{")}, "one JSON object"),
        ({"ids": IDS, "meta": np.array("[" * 100_000)}, "one JSON object"),
        ({"ids": IDS, "meta": meta(experts=4)}, r"ids\[1, 0, 0\] is 4, outside 0 … 3"),
        ({"ids": IDS - 1, "meta": meta(experts=5)}, r"is -2, outside"),
        ({"ids": IDS.astype(float), "meta": meta(experts=5)}, "integers with 3 dimensions, not float64"),
        ({"ids": IDS[0], "meta": meta(experts=5)}, "3 dimensions"),
        ({"ids": IDS[:0], "meta": meta(experts=5)}, "at least one token"),
        ({"ids": IDS, "meta": meta(experts=1)}, "with 2 chosen"),
        ({"ids": IDS, "meta": meta(experts=10**9)}, "1000000000 experts"),
        ({"ids": np.zeros((1, 1, 2), int), "meta": meta(experts=5)}, "twice: \\[0, 0\\]"),
        (
            {"ids": IDS, "meta": meta(experts=5), "weights": np.zeros((3, 2, 1), np.float32)},
            "weights must have the shape",
        ),
        (
            {"ids": IDS, "meta": meta(experts=5), "logits": np.zeros((3, 2, 4), np.float32)},
            "logits must have the shape",
        ),
        ({"ids": IDS, "meta": meta(experts=5), "seq_id": np.zeros(2, int)}, "one entry for each of 3 tokens"),
        ({"ids": np.array([[[{}]]], object), "meta": meta(experts=5)}, "no npz archive of plain arrays"),
    ],
)
def test_a_bad_archive_is_refused_by_name(tmp_path: Path, arrays: dict[str, Any], complaint: str) -> None:
    path = write(tmp_path / "bad.npz", **arrays)
    with pytest.raises(TraceError, match=complaint) as caught:
        open_trace(path)
    assert str(path) in str(caught.value)
    assert isinstance(caught.value, ConfigError)


class Trap:
    """Something whose unpickling would be noticed."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize("name", ["t.npz", "t.npy", "t.json", "t.jsonl", "t.csv"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x93NUMPY", b"{}", b"\xff" * 100, pickle.dumps(Trap())])
def test_anything_else_is_refused_too(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TraceError):
        open_trace(tmp_path / name, EXPERTS)


@given(content=st.binary(max_size=200), suffix=st.sampled_from([".npz", ".npy", ".json", ".jsonl", ".csv"]))
def test_no_bytes_end_in_another_error(tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(content)
    with pytest.raises(TraceError):
        open_trace(path, EXPERTS)


def test_a_file_must_be_there_and_bear_a_known_name(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no such file"):
        open_trace(tmp_path / "t.npz")
    (tmp_path / "d.npz").mkdir()
    with pytest.raises(TraceError, match="holds no recording"):
        open_trace(tmp_path / "d.npz")
    with pytest.raises(TraceError, match="ends in"):
        open_trace(tmp_path / "t.pkl")


@pytest.mark.parametrize("name", ["t.npy", "t.json", "t.jsonl", "t.csv"])
def test_formats_that_do_not_say_how_many_experts_need_to_be_told(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    with pytest.raises(TraceError, match="--experts"):
        open_trace(tmp_path / name)


# ------------------------------------------------------------------ others' formats


def test_a_vllm_response(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    choices = [{"text": "a", "routed_experts": IDS[1:2].tolist()}, {"text": "b", "routed_experts": IDS[2:].tolist()}]
    path.write_text(json.dumps({"prompt_routed_experts": IDS[:1].tolist(), "choices": choices}))
    trace = open_trace(path, EXPERTS)
    np.testing.assert_array_equal(trace.ids, IDS)
    np.testing.assert_array_equal(trace.seq_id, [0, 0, 1])


def in_base64(ids: Any) -> str:
    """As `numpy_to_base64` of vLLM 0.22 has it."""
    buffer = io.BytesIO()
    np.save(buffer, ids, allow_pickle=False)
    return base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32])
def test_a_vllm_response_of_0_22_has_the_prompt_in_each_choice(tmp_path: Path, dtype: Any) -> None:
    path = tmp_path / "r.json"
    ids = np.where(IDS < 0, 4, IDS).astype(dtype)
    other = ids[[0, 2, 1]]
    choices = [{"index": i, "text": "", "routed_experts": in_base64(one)} for i, one in enumerate((ids, other))]
    choices.append({"index": 2, "text": "", "routed_experts": None})
    path.write_text(json.dumps({"choices": choices, "usage": {"prompt_tokens": 1, "completion_tokens": 6}}))
    trace = open_trace(path, EXPERTS)
    np.testing.assert_array_equal(trace.ids, np.concatenate([ids, other[1:]]))
    np.testing.assert_array_equal(trace.seq_id, [0, 0, 0, 1, 1])


def test_choices_of_different_prompts_keep_all_their_rows(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    ids = np.where(IDS < 0, 4, IDS)
    choices = [{"routed_experts": in_base64(one)} for one in (ids, ids[::-1])]
    path.write_text(json.dumps({"choices": choices, "usage": {"prompt_tokens": 2}}))
    np.testing.assert_array_equal(open_trace(path, EXPERTS).ids, np.concatenate([ids, ids[::-1]]))


def test_vllm_layers_without_experts_are_left_out(tmp_path: Path) -> None:
    ids = np.where(IDS < 0, 4, IDS)
    with_dense = np.zeros((3, 4, 2), np.uint8)
    with_dense[:, [1, 3]] = ids
    np.save(tmp_path / "r.npy", with_dense)
    trace = open_trace(tmp_path / "r.npy", EXPERTS)
    np.testing.assert_array_equal(trace.ids, ids)
    assert trace.meta["layer_numbers"] == [1, 3]


@pytest.mark.parametrize(
    ("response", "complaint"),
    [
        ({"choices": [{"routed_experts": None}]}, "all null or empty"),
        ({"choices": [{"routed_experts": "no base64"}]}, "npy file in base64"),
        ({"choices": [{"routed_experts": base64.b64encode(b"no npy").decode()}]}, "npy file in base64"),
        ({"choices": [{"routed_experts": in_base64(np.zeros((2, 2, 2)))}]}, "must be integers"),
        ([], "no list 'choices'"),
        ({"choices": [{"text": "a"}]}, "--enable-return-routed-experts"),
        ({"choices": [{"routed_experts": [[1, 2]]}]}, "nested lists"),
        ({"choices": [{"routed_experts": [[[1], [2, 3]]]}]}, "nested lists"),
        ({"choices": [{"routed_experts": [[[1]]]}, {"routed_experts": [[[1, 2]]]}]}, "differ in layers or k"),
    ],
)
def test_a_bad_vllm_response(tmp_path: Path, response: Any, complaint: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(json.dumps(response))
    with pytest.raises(TraceError, match=complaint):
        open_trace(path, EXPERTS)


def test_a_vllm_array(tmp_path: Path) -> None:
    np.save(tmp_path / "r.npy", IDS.astype(np.int16))
    np.testing.assert_array_equal(open_trace(tmp_path / "r.npy", EXPERTS).ids, IDS)


def megatron(step: int, layer: int, indices: Any, **others: Any) -> str:
    record = {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": layer, "rank": 0}
    return json.dumps(record | {"num_tokens": len(indices), "topk": 2, "top_indices": indices} | others)


def test_a_megatron_trace(tmp_path: Path) -> None:
    ids = np.where(IDS < 0, 4, IDS)
    lines = [megatron(step, 3 + 2 * layer, ids[[step], layer].tolist()) for step in (2, 0, 1) for layer in (1, 0)]
    lines += [megatron(0, 3, [[1, 2]], mtp_idx=0), megatron(0, 3, [[1, 2]], block="encoder"), ""]
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    trace = open_trace(tmp_path / "r.jsonl", EXPERTS)
    np.testing.assert_array_equal(trace.ids, ids)
    assert trace.meta["layer_numbers"] == [3, 5]


def test_micro_batches_of_a_training_step_come_one_after_the_other(tmp_path: Path) -> None:
    ids = np.where(IDS < 0, 4, IDS)
    lines = [megatron(0, layer, ids[[token], layer].tolist()) for token in (0, 1, 2) for layer in (0, 1)]
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    np.testing.assert_array_equal(open_trace(tmp_path / "r.jsonl", EXPERTS).ids, ids)


def test_a_last_step_that_was_cut_short_is_left_out(tmp_path: Path) -> None:
    ids = np.where(IDS < 0, 4, IDS)
    lines = [megatron(step, layer, ids[[step], layer].tolist()) for step in (0, 1) for layer in (0, 1)]
    (tmp_path / "r.jsonl").write_text("\n".join([*lines, megatron(2, 0, [[1, 2]])]))
    np.testing.assert_array_equal(open_trace(tmp_path / "r.jsonl", EXPERTS).ids, ids[:2])


def test_a_record_of_the_tracers_first_version(tmp_path: Path) -> None:
    record = {"step": 0, "layer": 3, "rank": 0, "num_tokens": 1, "topk": 2, "top_indices": [[0, 4]]}
    (tmp_path / "r.jsonl").write_text(json.dumps(record))
    assert open_trace(tmp_path / "r.jsonl", EXPERTS).ids.tolist() == [[[0, 4]]]


@pytest.mark.parametrize(
    ("lines", "complaint"),
    [
        (["nonsense"], "line 1 is no JSON"),
        (["{}"], "line 1 is no record"),
        ([megatron(0, 0, [[1, 2]], topk=3)], "'topk' is 3"),
        ([megatron(0, 0, [1, 2])], "integers \\[tokens\\]\\[topk\\]"),
        ([megatron(0, 0, [[1, 2]]), megatron(1, 0, [[1, 2]]), megatron(1, 1, [[1, 2]])], "step 0 has the layers"),
        ([megatron(0, 0, [[1, 2]]), megatron(0, 1, [[1, 2], [0, 1]])], "step 0 has"),
        ([megatron(0, 0, [[1, 2]], stage="post")], "no record of stage"),
    ],
)
def test_a_bad_megatron_trace(tmp_path: Path, lines: list[str], complaint: str) -> None:
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    with pytest.raises(TraceError, match=complaint):
        open_trace(tmp_path / "r.jsonl", EXPERTS)


def test_csv_with_a_choice_in_each_row(tmp_path: Path) -> None:
    rows = [
        f"{layer},{token},{IDS[token, layer, rank]},{token // 2},{rank / 2}"
        for token in range(3) for layer in range(2) for rank in range(2) if IDS[token, layer, rank] >= 0
    ]  # fmt: skip
    (tmp_path / "t.csv").write_text("layer,token,expert,seq,weight\n" + "\n".join(rows))
    trace = open_trace(tmp_path / "t.csv", EXPERTS)
    np.testing.assert_array_equal(trace.ids, IDS)
    np.testing.assert_array_equal(trace.seq_id, [0, 0, 1])
    assert trace.weights is not None
    assert trace.weights[0, 0].tolist() == [0, 0.5]


def test_csv_with_a_token_and_layer_in_each_row(tmp_path: Path) -> None:
    rows = [
        f"{token},{layer},{IDS[token, layer, 0]},{IDS[token, layer, 1]}" for token in range(3) for layer in range(2)
    ]
    (tmp_path / "t.csv").write_text("token,layer,expert0,expert1\n" + "\n".join(rows))
    np.testing.assert_array_equal(open_trace(tmp_path / "t.csv", EXPERTS).ids, IDS)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a,b\n1,2\n", "must name the columns"),
        ("token,layer,expert\n", "no rows"),
        ("token,layer,expert\n0,0,x\n", "line 2"),
        ("token,layer,expert\n0,0\n", "line 2"),
        ("token,layer,expert\n-1,0,0\n", "from 0"),
        ("token,layer,expert\n99999999999,0,0\n", "from 0"),
        ("token,layer,expert0,expert1\n0,0,1,2\n0,0,3,4\n", "more than one row"),
    ],
)
def test_bad_csv(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(TraceError, match=complaint):
        open_trace(tmp_path / "t.csv", EXPERTS)


@given(at=st.integers(0, 10**6), value=st.integers(0, 255))
def test_a_damaged_archive_is_refused_or_still_a_trace(
    tmp_path_factory: pytest.TempPathFactory, at: int, value: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.npz"
    save_trace(Trace("t", "t", IDS, EXPERTS), path)
    content = bytearray(path.read_bytes())
    content[at % len(content)] = value
    path.write_bytes(content)
    try:
        assert open_trace(path).num_tokens > 0
    except TraceError as error:
        assert str(path) in str(error)
