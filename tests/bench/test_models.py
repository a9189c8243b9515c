"""The group ``models`` without a model: when it runs, its tables, and what its workers' end makes of them.

What needs torch is in ``tests/with_torch/test_models_bench.py``.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from bench_runs import Result, report_of

from shmroute.bench import models
from shmroute.bench.measuring import QUICK as QUICK_SCALE
from shmroute.bench.memory_limit import MemoryCharge
from shmroute.bench.models import MIB, Entrant, Outcome, Setting, entrants_of, run_crew, tables
from shmroute.bench.models_checkpoint import PREFIX, ModelShape, model_checkpoint, weights_of, write_model
from shmroute.bench.models_tasks import COPIED, MAPPED, SHARED, CrewReport
from shmroute.bench.partners import PartnerError
from shmroute.bench.stage import Bench
from shmroute.bench.suite import chosen_groups
from shmroute.errors import ShmrouteError
from shmroute.sources.huggingface import HuggingFaceSource
from shmroute.sources.synthetic import SyntheticSource

TINY = ModelShape(layers=2, experts=4, top_k=2, hidden=64, inner=32, heads=2, key_value_heads=1, vocabulary=96)
SETTING = Setting(TINY, limit=100 * MIB, budgets={1: 10 * MIB, 2: 8 * MIB}, prompt=4, tokens=8, seconds=60, rounds=1)


def report(seconds: float, pss: int, **more: Any) -> CrewReport:
    """Of two workers, which decoded eight tokens each."""
    return CrewReport([[1] * 8, [2] * 8], seconds, 4.0, 3 * 10**9, pss * MIB, 2 * pss * MIB, 4, **more)


def charge(used: int, kills: int = 0) -> MemoryCharge:
    return MemoryCharge(used * MIB, (used + 5) * MIB, kills)


def test_it_runs_only_if_it_is_named() -> None:
    assert "models" not in chosen_groups(None)
    assert chosen_groups("models") == ["models"]


def test_without_torch_it_is_left_out_and_named(bench: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    done = report_of(bench("--only", "models", "--json"))
    assert done["tables"]["models"] == []
    assert done["absent"] == {"models": "needs torch and transformers: pip install 'shmroute[transformers]'"}


def test_who_takes_part() -> None:
    entrants = entrants_of(SETTING, "folder", 2)
    assert [(one.task.manner, one.task.bonus, one.task.budget, one.limit) for one in entrants] == [
        (SHARED, 0.0, 8 * MIB, 100 * MIB),
        (SHARED, None, 8 * MIB, 100 * MIB),
        (MAPPED, None, 0, 100 * MIB),
        (COPIED, None, 0, None),
    ]
    assert {(one.task.workers, one.task.tokens, one.task.prompt) for one in entrants} == {(2, 8, 4)}


@pytest.fixture
def measured() -> list[Entrant]:
    """Two rounds. The machine is half as fast in the second, where also the limit kills who maps the file."""
    ours, biased, mapped, copied = entrants_of(SETTING, "folder", 2)
    ours.outcomes.extend(
        [
            Outcome(report(1, 40, hit_rate=0.5, changed=0.0), charge(50)),
            Outcome(report(2, 44, hit_rate=0.7, changed=0.0), charge(60)),
        ]
    )
    biased.outcomes.extend(ours.outcomes)
    mapped.outcomes.extend([Outcome(report(2, 30), charge(99)), Outcome(None, charge(100, kills=1))])
    copied.outcomes.extend([Outcome(report(0.5, 400), None), Outcome(report(1, 440), None)])
    return [ours, biased, mapped, copied]


def test_speeds_are_compared_within_each_round(measured: list[Entrant]) -> None:
    speed, _ = tables(SETTING, 2, measured, None, "128 KiB")
    by_name = {figure.name: figure for figure in speed.figures}
    ours, copied = by_name["one shared cache"], by_name["Transformers, a copy in each one's memory, no limit"]
    assert (ours.median, ours.ratio, ours.samples) == (12, 1, 2)
    assert (copied.median, copied.ratio) == (24, 2)
    assert ours.details == {
        "later": 4, "tokens each": 8, "GB read": 3, "hit rate": pytest.approx(0.6), "% changed": 0
    }  # fmt: skip
    assert "limit of 100 MiB" in speed.title
    assert "128 KiB" in speed.note


def test_who_was_killed_has_a_speed_of_nothing_and_no_memory(measured: list[Entrant]) -> None:
    speed, memory = tables(SETTING, 2, measured, None, "128 KiB")
    killed = speed.figures[2]
    assert (killed.median, killed.p25, killed.details["killed"]) == (4, 2, 1)
    assert [figure.name for figure in memory.figures] == [measured[i].name for i in (0, 1, 3)]


def test_memory(measured: list[Entrant]) -> None:
    _, memory = tables(SETTING, 2, measured, None, "128 KiB")
    ours, _, copied = memory.figures
    assert (ours.median, ours.details) == (42, {"RSS": 84, "charged": 55, "at most": 65, "processes": 4})
    assert copied.ratio == 10
    assert copied.details == {"RSS": 840, "processes": 4}


def test_where_nothing_can_be_limited_the_tables_say_so(measured: list[Entrant]) -> None:
    for table in tables(SETTING, 2, measured, "a reason", "not known"):
        assert "none can be set here" in table.title


def test_what_cannot_be_measured_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bench = Bench(QUICK_SCALE)
    monkeypatch.setattr(models, "why_no_limit", lambda: "nobody may")
    monkeypatch.setattr(models, "free_memory", lambda: 0)
    monkeypatch.setattr(models, "disk_folder", lambda: tmp_path)
    monkeypatch.setattr(models, "run_crew", lambda task, group: Outcome(report(1, 1, hit_rate=0.5, changed=0.0), None))
    done = list(models.measure_setting(bench, SETTING))
    assert [one.key for one in done] == ["models/speed-1", "models/memory-1", "models/speed-2", "models/memory-2"]
    assert {len(one.figures) for one in done} == {2}
    assert len(bench.absent) == 4
    assert sum("nobody may" in reason for reason in bench.absent.values()) == 2
    assert sum("GB of memory" in reason for reason in bench.absent.values()) == 2
    assert list(tmp_path.iterdir()) == []


class TestCrewsEnd:
    """What `run_crew` makes of a program in the place of the crew's."""

    def run(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, code: str) -> Outcome:
        program = tmp_path / "program"
        program.write_text(f"#!{sys.executable}\nimport json, sys\ntask = json.loads(sys.stdin.readline())\n{code}\n")
        program.chmod(0o755)
        monkeypatch.setattr(models.sys, "executable", str(program))
        return run_crew(entrants_of(SETTING, "folder", 2)[0].task, None)

    def test_it_reports(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        said = json.dumps(vars(report(2, 10)))
        outcome = self.run(monkeypatch, tmp_path, f"print({said!r}, flush=True)\nassert sys.stdin.readline() == ''")
        assert outcome == Outcome(report(2, 10), None)
        assert outcome.rate == 8

    def test_it_fails(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        with pytest.raises(PartnerError, match="shared experts ended with code 3"):
            self.run(monkeypatch, tmp_path, "sys.exit(3)")

    def test_it_is_silent(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(models, "PATIENCE", 0.2)
        with pytest.raises(PartnerError, match="did not answer"):
            self.run(monkeypatch, tmp_path, "sys.stdin.read()")


def test_experts_are_those_of_the_synthetic_source(tmp_path: Path) -> None:
    write_model(tmp_path, TINY, seed=5)
    source = HuggingFaceSource(tmp_path)
    expected = SyntheticSource(2, 4, 64, 32, top_k=2, dtype="bfloat16", seed=5)
    assert (source.geometry.num_layers, source.geometry.expert_bytes) == (2, TINY.expert_bytes)
    assert source.geometry.tensors == expected.geometry.tensors
    mine, theirs = bytearray(TINY.expert_bytes), bytearray(TINY.expert_bytes)
    for layer in range(2):
        for expert in range(4):
            source.read_into(layer, expert, memoryview(mine))
            expected.read_into(layer, expert, memoryview(theirs))
            assert mine == theirs
    source.close()


def test_some_experts_are_popular_and_topics_come_in_runs(tmp_path: Path) -> None:
    """By the gates' products with embeddings: what the layers add to them is small."""
    shape = ModelShape(1, 64, 8, 256, 16, heads=4, key_value_heads=2, vocabulary=480)
    write_model(tmp_path, shape)
    source = HuggingFaceSource(tmp_path)
    embeddings = dict(models_tensors(tmp_path))["model.embed_tokens.weight"]
    normed = embeddings / np.sqrt((embeddings**2).mean(axis=1, keepdims=True))
    logits = normed @ source.gate(0).T
    source.close()
    assert logits.std() == pytest.approx(1.5, rel=0.1)
    chosen = np.zeros(logits.shape, bool)
    np.put_along_axis(chosen, np.argsort(-logits, axis=1)[:, :8], True, axis=1)
    use = np.sort(chosen.mean(axis=0))[::-1]
    assert use[:16].sum() > 0.5 * use.sum()  # a quarter of the experts has more than half of the uses
    again = {gap: (chosen[gap:] & chosen[:-gap]).sum() / chosen[gap:].sum() for gap in (1, 240)}
    assert again[1] > again[240] + 0.1
    assert again[240] > 8 / 64 + 0.1


def models_tensors(folder: Path) -> dict[str, np.ndarray]:
    """The dense tensors of the file, as float64."""
    raw = weights_of(folder).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    return {
        name: np.frombuffer(raw[8 + size + entry["data_offsets"][0] : 8 + size + entry["data_offsets"][1]],
                            ml_dtypes.bfloat16).reshape(entry["shape"]).astype(np.float64)
        for name, entry in header.items() if ".experts." not in name
    }  # fmt: skip


def test_experts_begin_at_a_page(tmp_path: Path) -> None:
    write_model(tmp_path, TINY)
    raw = weights_of(tmp_path).read_bytes()
    size = int.from_bytes(raw[:8], "little")
    assert (8 + size) % 4096 == 0
    assert json.loads(raw[8 : 8 + size])["model.layers.0.mlp.experts.gate_up_proj"]["data_offsets"][0] == 0


def test_what_the_dead_left_on_the_disk_is_removed(tmp_path: Path) -> None:
    dead, alive = tmp_path / f"{PREFIX}{2**22 + 1}-x", tmp_path / f"{PREFIX}{os.getppid()}-x"
    for left in (dead, alive):
        left.mkdir()
        (left / "model.safetensors").touch()
    with model_checkpoint(tmp_path, TINY) as folder:
        assert weights_of(folder).exists()
        assert not dead.exists()
    assert list(tmp_path.iterdir()) == [alive]


def test_a_disk_without_room_is_refused(tmp_path: Path) -> None:
    huge = ModelShape(100, 4096, 2, 2**14, 2**14, heads=2, key_value_heads=1, vocabulary=96)
    with pytest.raises(ShmrouteError, match=r"no room for a model with .* GB of experts; set TMPDIR"), \
            model_checkpoint(tmp_path, huge):  # fmt: skip
        pytest.fail("it was written")
    assert list(tmp_path.iterdir()) == []
