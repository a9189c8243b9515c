"""Faults strike exactly the reads they are set for, in whatever process these happen."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from checkpoint_builder import build

from shmroute.errors import CheckpointError, ConfigError
from shmroute.sources import (
    Fault,
    FaultySource,
    LoggedRead,
    SourceSpec,
    SyntheticSource,
    faulty_spec,
    read_faults,
    read_log,
    set_faults,
)

INNER = SyntheticSource(2, 3, 4, 5)


def faulty(tmp_path: Path, log: bool = False) -> FaultySource:
    spec = faulty_spec(INNER.spec, tmp_path / "control", tmp_path / "log" if log else None)
    source = SourceSpec(**json.loads(json.dumps(vars(spec)))).open()
    assert isinstance(source, FaultySource)
    assert source.spec == spec
    return source


def read(source: FaultySource | SyntheticSource, layer: int = 0, expert: int = 0) -> bytes:
    buffer = bytearray(source.geometry.expert_bytes)
    source.read_into(layer, expert, memoryview(buffer))
    return bytes(buffer)


def test_without_a_control_file_it_is_the_inner_source(tmp_path: Path) -> None:
    source = faulty(tmp_path)
    assert read(source, 1, 2) == read(INNER, 1, 2)
    assert source.geometry == INNER.geometry
    assert source.location(1, 2) == INNER.location(1, 2)
    assert (source.gate(1) == INNER.gate(1)).all()
    assert source.gate_bias(1) is source.correction_bias(1) is None
    source.drop_page_cache(0, 0)
    source.close()
    source.close()


@pytest.mark.parametrize("model_type", ["gpt_oss", "deepseek_v3"])
def test_the_router_s_biases_are_the_inner_source_s(tmp_path: Path, model_type: str) -> None:
    made = build(tmp_path / "m", model_type)
    spec = SourceSpec("shmroute.sources:HuggingFaceSource", {"path": str(made.folder)})
    with closing(faulty_spec(spec, tmp_path / "control").open()) as source:
        for bias, expected in (
            (source.gate_bias(1), made.gate_biases),
            (source.correction_bias(1), made.correction_biases),
        ):
            assert (bias is None) is (1 not in expected)
            assert bias is None or (bias == expected[1]).all()


def test_an_error_strikes_its_expert_only_and_ends_when_it_is_lifted(tmp_path: Path) -> None:
    source = faulty(tmp_path)
    set_faults(tmp_path / "control", [Fault(layer=0, expert=1, error="EIO")])
    with pytest.raises(OSError, match="Input/output error") as caught:
        read(source, 0, 1)
    assert caught.value.errno == errno.EIO
    for layer, expert in ((0, 0), (0, 2), (1, 1)):
        assert read(source, layer, expert) == read(INNER, layer, expert)
    set_faults(tmp_path / "control", [])
    assert read(source, 0, 1) == read(INNER, 0, 1)


@pytest.mark.parametrize(
    ("fault", "struck"),
    [
        (Fault(truncate=True), {(0, 0), (0, 1), (1, 0), (1, 1)}),
        (Fault(layer=1, truncate=True), {(1, 0), (1, 1)}),
        (Fault(expert=0, truncate=True), {(0, 0), (1, 0)}),
    ],
)
def test_a_star_means_all(tmp_path: Path, fault: Fault, struck: set[tuple[int, int]]) -> None:
    source = faulty(tmp_path)
    set_faults(tmp_path / "control", [fault])
    found = set()
    for layer in range(2):
        for expert in range(2):
            try:
                read(source, layer, expert)
            except CheckpointError as error:
                assert "truncated" in str(error)
                found.add((layer, expert))
    assert found == struck


def test_corruption_flips_three_bytes(tmp_path: Path) -> None:
    source = faulty(tmp_path)
    set_faults(tmp_path / "control", [Fault(corrupt=True)])
    good, bad = read(INNER), read(source)
    differing = [n for n in range(len(good)) if good[n] != bad[n]]
    assert differing == [0, len(good) // 2, len(good) - 1]


def test_what_is_told_of_is_damaged_already(tmp_path: Path) -> None:
    source = faulty(tmp_path)
    buffer = memoryview(bytearray(source.geometry.expert_bytes))
    seen = bytearray(len(buffer))

    def filled(begin: int, end: int) -> None:
        seen[begin:end] = buffer[begin:end]

    source.read_into(0, 0, buffer, filled)
    assert bytes(seen) == read(INNER)
    set_faults(tmp_path / "control", [Fault(corrupt=True)])
    source.read_into(0, 0, buffer, filled)
    assert bytes(seen) == read(source) != read(INNER)


def test_a_delay_is_waited_for(tmp_path: Path) -> None:
    source = faulty(tmp_path)
    set_faults(tmp_path / "control", [Fault(delay=0.05)])
    began = time.monotonic()
    read(source)
    assert time.monotonic() - began >= 0.05


def test_a_blocked_read_waits_for_its_file(tmp_path: Path) -> None:
    source = faulty(tmp_path, log=True)
    set_faults(tmp_path / "control", [Fault(block_until=str(tmp_path / "go"))])
    done = threading.Event()

    def blocked() -> None:
        read(source)
        done.set()

    thread = threading.Thread(target=blocked)
    thread.start()
    while not read_log(tmp_path / "log"):
        time.sleep(0.001)
    assert not done.wait(0.05)
    (tmp_path / "go").touch()
    thread.join(10)
    assert done.is_set()


def test_the_log_counts_the_reads_of_all_processes(tmp_path: Path) -> None:
    source = faulty(tmp_path, log=True)
    assert read_log(tmp_path / "log") == []
    script = (
        "import json, sys\n"
        "from shmroute.sources import SourceSpec\n"
        "s = SourceSpec(**json.loads(sys.argv[1])).open()\n"
        "for n in range(200): s.read_into(1, 2, memoryview(bytearray(s.geometry.expert_bytes)))\n"
    )
    spec = json.dumps(vars(source.spec))
    children = [subprocess.Popen([sys.executable, "-c", script, spec]) for _ in range(2)]
    set_faults(tmp_path / "control", [Fault(layer=0, error="EIO")])
    with pytest.raises(OSError, match="Input/output"):
        read(source, 0, 1)
    assert [child.wait(60) for child in children] == [0, 0]
    log = read_log(tmp_path / "log")
    assert log.count(LoggedRead(0, 1, os.getpid())) == 1
    for child in children:
        assert log.count(LoggedRead(1, 2, child.pid)) == 200
    assert len(log) == 401
    assert read_log(tmp_path / "absent") == []


def test_faults_survive_the_control_file(tmp_path: Path) -> None:
    faults = (
        Fault(),
        Fault(0, 3, 1.5, "/tmp/go", "ENOSPC", True, True),
        Fault(layer="*", expert=2, delay=1),
    )
    set_faults(tmp_path / "control", faults)
    assert read_faults(str(tmp_path / "control")) == faults
    assert os.listdir(tmp_path) == ["control"]


def test_a_failed_change_leaves_the_old_faults_and_no_draft(tmp_path: Path) -> None:
    (tmp_path / "control").mkdir()
    with pytest.raises(IsADirectoryError):
        set_faults(tmp_path / "control", [])
    assert os.listdir(tmp_path) == ["control"]


@pytest.mark.parametrize(
    "fields",
    [
        {"layer": -1},
        {"layer": "all"},
        {"expert": True},
        {"expert": 1.0},
        {"delay": -1},
        {"delay": float("nan")},
        {"delay": "1"},
        {"error": "EWHATEVER"},
        {"error": 5},
        {"error": []},
        {"truncate": 1},
        {"corrupt": "yes"},
        {"block_until": 3},
    ],
)
def test_a_field_out_of_range_is_named(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(fields))):
        Fault(**fields)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b'{"faults": {}}',
        b'{"faults": [3]}',
        b'{"faults": [{"eror": "EIO"}]}',
        b'{"faults": [{"error": "EIEIO"}]}',
        b"\xff",
        b" " * (2**20 + 1),
    ],
)
def test_an_unusable_control_file_is_a_config_error(tmp_path: Path, content: bytes) -> None:
    source = faulty(tmp_path)
    (tmp_path / "control").write_bytes(content)
    with pytest.raises(ConfigError):
        read(source)
    with pytest.raises(ConfigError):
        faulty(tmp_path)


def test_an_unusable_log_or_inner_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        faulty_spec(INNER.spec, tmp_path / "control", tmp_path).open()
    with pytest.raises(ConfigError, match="cannot be imported"):
        faulty_spec(SourceSpec("absent:Source"), tmp_path / "control").open()
