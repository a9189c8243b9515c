"""Control files of a faulty source, budgets and names: a `ConfigError`, or what they say."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from fuzzing import HOSTILE_NUMBERS, bounded, damaged_bytes, damaged_json, fuzz, json_values, to_text
from hypothesis import example, given
from hypothesis import strategies as st

from shmroute.budget import parse_bytes, slot_bytes_of, slots_of_budget
from shmroute.errors import ConfigError
from shmroute.shared.segment import SHM, checked_name, segment_path
from shmroute.sources import read_faults
from shmroute.sources.faulty import MAX_CONTROL_BYTES, MAX_DELAY, Fault

FAULTS = {
    "faults": [
        {"layer": 0, "expert": "*", "delay": 0.5, "block_until": None, "error": "EIO", "truncate": False,
         "corrupt": True},
        {"layer": "*"},
        {},
    ]
}  # fmt: skip

# ------------------------------------------------------------------ faults


def faults_or_refusal(path: Path) -> tuple[Fault, ...] | None:
    """Faults that can be carried out, None if the file is refused."""
    with bounded(path.stat().st_size):
        try:
            faults = read_faults(str(path))
        except ConfigError as error:
            # A field out of range is named by itself: which file it is from, its reader knows.
            assert str(path) in str(error) or "a fault's" in str(error)
            assert len(str(error)) < 2000
            return None
    assert path.stat().st_size <= MAX_CONTROL_BYTES
    for fault in faults:
        assert 0 <= fault.delay <= MAX_DELAY
        assert fault.error is None or re.fullmatch(r"E[A-Z0-9]+", fault.error)
        assert fault.applies_to(0, 0) in (True, False)
        assert (type(fault.truncate), type(fault.corrupt)) == (bool, bool)
    return faults


def test_undamaged_faults_are_read(tmp_path: Path) -> None:
    (tmp_path / "control").write_bytes(to_text(FAULTS))
    assert faults_or_refusal(tmp_path / "control") == tuple(Fault(**fault) for fault in FAULTS["faults"])


@fuzz(2)
@given(content=damaged_json(FAULTS) | damaged_bytes(to_text(FAULTS)) | st.binary(max_size=50))
@example(content=to_text({"faults": [{}] * 50_000}))
@example(content=to_text(FAULTS) + b" " * MAX_CONTROL_BYTES)
@example(content=b"[" * MAX_CONTROL_BYTES)
def test_a_damaged_control_file_is_refused_or_sound(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "control").write_bytes(content)
    faults_or_refusal(tmp_path / "control")


@fuzz(2)
@given(
    fields=st.dictionaries(
        st.sampled_from(["layer", "expert", "delay", "block_until", "error", "truncate", "corrupt"]),
        json_values | st.sampled_from(["*", "EIO", True, 0.5, 3]),
    )
)
def test_a_fault_of_any_fields_is_refused_or_sound(tmp_path: Path, fields: dict[str, Any]) -> None:
    (tmp_path / "control").write_bytes(to_text({"faults": [fields]}))
    faults_or_refusal(tmp_path / "control")


@pytest.mark.parametrize("number", [*HOSTILE_NUMBERS, -0.5, 3600.5, 1e300])
@pytest.mark.parametrize("field", ["layer", "expert", "delay", "error", "block_until", "truncate"])
def test_any_number_in_any_field_of_a_fault_is_refused_or_sound(tmp_path: Path, field: str, number: float) -> None:
    (tmp_path / "control").write_bytes(to_text({"faults": [{field: number}]}))
    faults_or_refusal(tmp_path / "control")


# ------------------------------------------------------------------ budgets

budget_texts = st.one_of(
    st.text(max_size=20),
    st.text(alphabet="0123456789.%eE+-_ \t\nkKmMgGtTiIbB,/\N{ARABIC-INDIC DIGIT FIVE}\N{SUPERSCRIPT TWO}", max_size=20),
    st.builds("{}{}{}".format, st.sampled_from(HOSTILE_NUMBERS) | st.floats(), st.sampled_from(["", " ", "."]),
              st.sampled_from(["", "%", "B", "kB", "TiB", "PiB", "%%"])),
)  # fmt: skip


@fuzz(3)
@given(budget=budget_texts | st.sampled_from(HOSTILE_NUMBERS) | json_values, experts=st.integers(1, 2**22),
       expert_bytes=st.integers(1, 2**40))  # fmt: skip
@example(budget="9" * 100_000, experts=1, expert_bytes=1)
@example(budget="9" * 30 + "." + "9" * 30 + "TiB", experts=1, expert_bytes=1)
@example(budget="0." + "0" * 29 + "1%", experts=2**22, expert_bytes=1)
@example(budget="\ud800", experts=1, expert_bytes=1)
def test_any_budget_is_refused_or_holds_between_one_and_all_experts(
    budget: Any, experts: int, expert_bytes: int
) -> None:
    with bounded(len(budget) if isinstance(budget, str) else 5000):
        try:
            slots = slots_of_budget(budget, experts, expert_bytes)
        except ConfigError:
            return
    assert type(slots) is int
    assert 1 <= slots <= experts
    if isinstance(budget, int):
        assert slots * slot_bytes_of(expert_bytes) <= budget


@fuzz(2)
@given(text=budget_texts)
def test_any_size_is_refused_or_a_number_of_bytes(text: str) -> None:
    try:
        size = parse_bytes(text)
    except ConfigError as error:
        assert repr(text) in str(error)
        return
    assert type(size) is int
    assert size >= 0


def test_a_budget_of_much_white_space_is_refused_at_once() -> None:
    began = time.monotonic()
    with pytest.raises(ConfigError):
        parse_bytes("1" + " " * 20_000 + "!")
    assert time.monotonic() - began < 0.4


# ------------------------------------------------------------------ names


@fuzz(3)
@given(name=st.text(max_size=110) | st.from_regex(r"[A-Za-z0-9_.\-/]{0,105}", fullmatch=True) | json_values)
@example(name="a\n")
@example(name="..")
@example(name="a/../../etc/passwd")
@example(name="\N{FULLWIDTH DIGIT ONE}")
def test_any_name_is_refused_or_one_file_in_shared_memory(name: Any) -> None:
    try:
        assert checked_name(name) == name
    except ConfigError:
        return
    path = segment_path(name)
    assert path.parent == SHM
    assert path.resolve() == path
    assert len(path.name.encode()) <= 255
    assert name.isascii() and name.isprintable()
