"""The benchmark's group ``models`` from end to end, on a tiny model without a limit: structure and tokens, no times."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from shmroute.bench import models
from shmroute.bench.measuring import QUICK
from shmroute.bench.models import Entrant, Outcome, Setting, measure_setting, run_crew
from shmroute.bench.models_checkpoint import ModelShape
from shmroute.bench.models_tasks import CrewTask
from shmroute.bench.stage import Bench

SHAPE = ModelShape(layers=2, experts=8, top_k=2, hidden=128, inner=64, heads=2, key_value_heads=1, vocabulary=192)
TOKENS, PROMPT, WORKERS = 6, 4, 2
SETTING = Setting(
    SHAPE, limit=1 << 30, budgets={WORKERS: SHAPE.experts_bytes // 2}, prompt=PROMPT,
    tokens=TOKENS, seconds=60, rounds=1,
)  # fmt: skip


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[tuple[str, float | None], Outcome]]:
    """By manner and bonus, once the tables are made."""
    found = {}

    def run(task: CrewTask, group: None) -> Outcome:
        found[task.manner, task.bonus] = outcome = run_crew(task, group)
        return outcome

    monkeypatch.setattr(models, "run_crew", run)
    monkeypatch.setattr(models, "why_no_limit", lambda: None)
    monkeypatch.setattr(models, "disk_folder", lambda: tmp_path)
    monkeypatch.setattr(Entrant, "sample", lambda self, limits, sample=Entrant.sample: sample(self, False))
    yield found


def test_all_contestants_decode_the_same_tokens(outcomes: dict[tuple[str, float | None], Outcome]) -> None:
    bench = Bench(QUICK)
    tables = list(measure_setting(bench, SETTING))
    assert bench.absent == {}
    assert [one.key for one in tables] == ["models/speed-2", "models/memory-2"]
    assert {len(one.figures) for one in tables} == {4}
    for table in tables:
        assert all(figure.median > 0 for figure in table.figures)
        assert table.figures[0].ratio == 1
    ours = tables[0].figures[0]
    assert 0 < ours.details["hit rate"] < 1
    assert ours.details["% changed"] == 0
    firsts = [number * SHAPE.vocabulary // WORKERS + PROMPT for number in range(WORKERS)]
    expected = [list(range(first, first + TOKENS)) for first in firsts]
    for manner, bonus in (("mapped", None), ("copied", None), ("shared", 0.0)):
        report = outcomes[manner, bonus].report
        assert report is not None
        assert report.ids == expected, manner
        assert report.processes == 1 + WORKERS + (manner == "shared")
    assert [path.name for path in Path("/dev/shm").iterdir() if f"bench-{os.getpid()}" in path.name] == []
