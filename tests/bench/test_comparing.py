"""Two runs compared: what counts as noise, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shmroute.bench.measuring import Summary
from shmroute.bench.report import (
    HIGHER,
    LOWER,
    NEITHER,
    Figure,
    Report,
    Table,
    compare,
    exact,
    judge,
    noise_of,
    read_report,
    save_report,
    summary_figure,
)
from shmroute.errors import ConfigError


def sampled(median: float, half_width: float, name: str = "f") -> Figure:
    """A figure whose quartiles lie `half_width` (relative) around its median."""
    return summary_figure(name, Summary(median, median * (1 - half_width), median * (1 + half_width), 20), 1.0)


def report(*figures: Figure, better: str = LOWER, **machine: Any) -> Report:
    table = Table("group/table", "Title", "ns", better, figures, "note")
    return Report("0.1.0", True, machine, {"group": [table]}, {"torch": "not installed"})


@pytest.mark.parametrize(
    ("now", "better", "verdict"),
    [
        (sampled(100, 0.05), LOWER, "same"),
        (sampled(110, 0.05), LOWER, "same"),
        (sampled(120, 0.05), LOWER, "worse"),
        (sampled(80, 0.05), LOWER, "better"),
        (sampled(120, 0.05), HIGHER, "better"),
        (sampled(80, 0.05), HIGHER, "worse"),
        (sampled(120, 0.05), NEITHER, "changed"),
        (sampled(200, 0.5), LOWER, "same"),  # the spread of either run counts
        (sampled(300, 0.5), LOWER, "worse"),
    ],
)
def test_a_change_must_exceed_the_spreads_of_both(now: Figure, better: str, verdict: str) -> None:
    assert judge(sampled(100, 0.05), now, better)[2] == verdict


def test_equal_shifts_up_and_down_are_judged_alike() -> None:
    then = sampled(100, 0.05)
    for factor in (1.1, 1.14, 1.15, 1.2):
        up, down = judge(then, sampled(100 * factor, 0.05), LOWER), judge(then, sampled(100 / factor, 0.05), LOWER)
        assert (up[2] == "same") == (down[2] == "same")


def test_a_small_change_without_spread_is_noise_all_the_same() -> None:
    assert noise_of(sampled(100, 0), sampled(102, 0)) == pytest.approx(0.05)
    assert judge(sampled(100, 0), sampled(104, 0), LOWER)[2] == "same"
    assert judge(sampled(100, 0), sampled(106, 0), LOWER)[2] == "worse"


def test_what_was_computed_has_no_noise() -> None:
    assert judge(exact("bytes", 1000), exact("bytes", 1000), LOWER) == (1.0, 0.0, "same")
    assert judge(exact("bytes", 1000), exact("bytes", 1001), LOWER)[2] == "worse"


def test_nothing_at_all_can_be_compared() -> None:
    none = Figure("idle", 0.0, 0.0, 0.0, 5, 1.0)
    some = Figure("idle", 0.2, 0.1, 0.3, 5, 1.0)
    assert judge(none, none, LOWER)[::2] == (1.0, "same")
    assert judge(none, some, LOWER)[2] == "worse"
    assert judge(some, none, LOWER)[2] == "better"


def test_figures_that_only_one_run_has_are_named() -> None:
    then = report(sampled(1, 0, "both"), sampled(1, 0, "old"), processor="A", load=1.0)
    now = report(sampled(1, 0, "both"), sampled(1, 0, "new"), processor="B", load=1.0)
    found = compare(then, now)
    assert [change.key for change in found.changes] == ["group/table/both"]
    assert (found.only_then, found.only_now) == (["group/table/old"], ["group/table/new"])
    assert found.machine == {"processor": ("A", "B")}
    json.dumps(found.as_dict(), allow_nan=False)


def test_a_group_that_was_not_asked_for_is_not_missed() -> None:
    then = report(sampled(1, 0))
    assert compare(then, Report("0.1.0", True, {}, {})).only_then == []


def test_a_report_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    made = report(sampled(100, 0.05), exact("bytes", 3, 2.0, p99=4.0), cores=2)
    save_report(made, tmp_path / "r.json")
    assert read_report(tmp_path / "r.json") == made
    assert [change.verdict for change in compare(read_report(tmp_path / "r.json"), made).changes] == ["same", "same"]
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def test_a_report_that_cannot_be_written_leaves_the_former_one(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    save_report(report(sampled(1, 0)), path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        save_report(report(sampled(2, 0), cores=object()), path)
    assert path.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["r.json"]


def damaged(change: Any) -> bytes:
    """A report's JSON after some change."""
    data = report(sampled(1, 0)).as_dict()
    change(data)
    return json.dumps(data).encode()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "compared"),
        (b"\xff\xfe", "compared"),
        (b"[]", "no report"),
        (b'{"name": 1}', "no report"),
        (b"[" * 100_000, "compared"),
        (damaged(lambda data: data.update(format=99)), "format 99"),
        (damaged(lambda data: data.update(tables={"group": [{}]})), "damaged"),
        (damaged(lambda data: data.update(tables=3)), "damaged"),
        (damaged(lambda data: data.update(surprise=3)), "damaged"),
        (damaged(lambda data: data["tables"]["group"][0]["figures"][0].update(median="fast")), "damaged"),
        (damaged(lambda data: data["tables"]["group"][0]["figures"][0].update(median=float("nan"))), "damaged"),
        (damaged(lambda data: data["tables"]["group"][0]["figures"][0].pop("p75")), "damaged"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_report(path)
