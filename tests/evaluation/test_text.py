"""Texts: what is read, what is refused, how windows are dealt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shmroute.errors import CheckpointError, ConfigError, TextError
from shmroute.evaluation.text import deal, read_texts

CHECKPOINT = Path(__file__).resolve().parents[2] / "examples" / "tiny-mixtral"


def saved(path: Path, **arrays: Any) -> Path:
    np.savez(path, **arrays)
    return path


def test_windows_are_dealt_in_turns_so_that_a_pool_has_streams_of_all_texts() -> None:
    texts = {"a": np.arange(100), "b": np.arange(100, 170)}
    dealt = deal(texts, Path("t"), 10, 4, None)
    assert dealt[..., 0].tolist() == [[0, 100, 10, 110], [20, 120, 30, 130], [40, 140, 50, 150]]  # 60 and 160 are left
    assert (np.diff(dealt, axis=2) == 1).all()
    assert deal(texts, Path("t"), 10, 4, 2)[:, 0, 0].tolist() == [0, 20]
    assert deal(texts, Path("t"), 10, 2, 3)[:, 0, 0].tolist() == [0, 20, 40]
    assert (deal(texts, Path("t"), 10, 4, 9) == dealt).all()


def test_a_text_too_short_for_one_pool_is_refused_with_the_numbers() -> None:
    with pytest.raises(TextError, match="4 streams of 10 tokens are wanted, and 'b' has 19 tokens; give more text"):
        deal({"a": np.arange(100), "b": np.arange(19)}, Path("t"), 10, 4, None)


def test_ids_of_any_integer_type_are_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "t.npz", one=np.array([0, 9], np.uint8), two=np.array([3], np.int64))
    texts = read_texts(path, CHECKPOINT, 10)
    assert {name: ids.tolist() for name, ids in texts.items()} == {"one": [0, 9], "two": [3]}
    assert all(ids.dtype == np.int64 for ids in texts.values())


@pytest.mark.parametrize(
    ("arrays", "complaint"),
    [
        ({}, "has no arrays"),
        ({"t": np.zeros((2, 2), int)}, r"'t' is int64 \[2, 2\]; token ids"),
        ({"t": np.zeros(3)}, r"'t' is float64 \[3\]; token ids"),
        ({"t": np.array(["a"])}, "'t' is <U1"),
        ({"t": np.array([None])}, "cannot be read: .*allow_pickle"),
        ({"t": np.array([1, 10, 2])}, "token 1 of 't' is 10, but the model's vocabulary has 10"),
        ({"t": np.array([1, 2, -1])}, "token 2 of 't' is -1"),
    ],
)
def test_what_are_no_token_ids_of_the_model_is_refused(tmp_path: Path, arrays: dict[str, Any], complaint: str) -> None:
    with pytest.raises(TextError, match=complaint):
        read_texts(saved(tmp_path / "t.npz", **arrays), CHECKPOINT, 10)


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04" + bytes(40)])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "damaged.npz"
    path.write_bytes(content)
    with pytest.raises(TextError, match=r"damaged\.npz: cannot be read"):
        read_texts(path, CHECKPOINT, 10)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for name in ("missing.npz", "missing.txt"):
        with pytest.raises(TextError, match=f"{name}: cannot be read"):
            read_texts(tmp_path / name, CHECKPOINT, 10)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TextError, match="cannot be read as text"):
        read_texts(tmp_path / "t.txt", CHECKPOINT, 10)


def test_plain_text_without_the_tokenizers_package_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    (tmp_path / "t.txt").write_text("In the beginning")
    with pytest.raises(ConfigError, match=r"needs the tokenizers package: pip install 'shmroute\[text\]', or give an"):
        read_texts(tmp_path / "t.txt", CHECKPOINT, 2048)


def test_plain_text_is_read_by_the_checkpoints_tokenizer(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    with np.load(CHECKPOINT / "heldout_tokens.npz") as file:
        expected = file["kjv"][:50].astype(int).tolist()
    text = tokenizers.Tokenizer.from_file(str(CHECKPOINT / "tokenizer.json")).decode(expected)
    (tmp_path / "genesis.txt").write_text(text)
    assert read_texts(tmp_path / "genesis.txt", CHECKPOINT, 2048)["genesis"].tolist() == expected
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is no tokenizer"):
        read_texts(tmp_path / "genesis.txt", tmp_path, 2048)
