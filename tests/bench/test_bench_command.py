"""``shmroute bench``, as its user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from bench_runs import Result, left_by, report_of

from shmroute.bench import plots, suite
from shmroute.bench.report import Table, exact, read_report
from shmroute.bench.stage import Bench
from shmroute.errors import ShmrouteError

Command = Callable[..., Result]
PATIENCE = 60.0


def test_every_figure_has_its_peers(bench: Command) -> None:
    done = bench("--only", "sizes,ring,leases", "--json")
    assert done.exit_code == 0, done.stderr
    report = report_of(done)
    assert list(report["tables"]) == ["sizes", "ring", "leases", "machine"]
    keys = set()
    for group in ("sizes", "ring", "leases"):
        for table in report["tables"][group]:
            keys.add(table["key"])
            assert len(table["figures"]) >= 2, table["title"]
            assert table["figures"][0]["ratio"] == 1
            assert len({figure["name"] for figure in table["figures"]}) == len(table["figures"])
    assert keys == {
        "sizes/control", "ring/kernel", "ring/message", "ring/handover", "leases/residency", "leases/lease",
        "leases/affinity",
    }  # fmt: skip
    handed_over = {figure["name"] for figure in report["tables"]["ring"][2]["figures"]}
    assert {"ring + bell", "posix_ipc semaphore alone, no message", "multiprocessing.Queue"} <= handed_over


def test_the_control_segment_is_below_its_limit(bench: Command) -> None:
    figures = report_of(bench("--only", "sizes", "--json"))["tables"]["sizes"][0]["figures"]
    by_name = {figure["name"]: figure["median"] for figure in figures}
    assert figures[0]["median"] <= by_name["limit: 4 MiB"] == 4 << 20


def test_tables_are_printed(bench: Command) -> None:
    done = bench("--only", "sizes")
    assert done.exit_code == 0
    assert "61 layers × 256 experts" in done.stdout
    assert "limit: 4 MiB" in done.stdout


def test_a_run_is_compared_with_a_saved_one(bench: Command, tmp_path: Path) -> None:
    saved = tmp_path / "before.json"
    assert bench("--only", "sizes", "--save", saved).exit_code == 0
    # A saved size that was another one is a change; the same file may be written at the end.
    data = json.loads(saved.read_text())
    data["tables"]["sizes"][0]["figures"][0]["median"] += 64
    saved.write_text(json.dumps(data))
    done = bench("--only", "sizes", "--json", "--compare", saved, "--save", saved)
    assert done.exit_code == 0
    changes = {change["key"]: change for change in report_of(done)["comparison"]["changes"]}
    verdicts = [change["verdict"] for key, change in changes.items() if key.startswith("sizes/")]
    assert verdicts == ["better"] + ["same"] * 7
    assert (
        read_report(saved).tables["sizes"][0].figures[0].median + 64
        == data["tables"]["sizes"][0]["figures"][0]["median"]
    )
    assert "figures changed beyond the noise" in bench("--only", "sizes", "--compare", saved).stdout


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be measured before the command is known to be right."""

    def measure(bench: Bench) -> Iterator[Table]:
        pytest.fail("it measured")

    monkeypatch.setattr(suite, "GROUPS", dict.fromkeys(suite.GROUPS, measure))


@pytest.mark.usefixtures("unmeasured")
class TestRefused:
    """Each is one line and exit code 2, before anything is measured."""

    def refused(self, done: Result, *words: str) -> None:
        assert done.exit_code == 2
        assert "Traceback" not in done.output
        for word in words:
            assert word in done.output

    def test_an_unknown_group(self, bench: Command) -> None:
        self.refused(bench("--only", "ring,speed"), "'speed'", "routing, concurrency")
        self.refused(bench("--only", ","), "names no group")

    def test_a_report_that_is_none(self, bench: Command, tmp_path: Path) -> None:
        path = tmp_path / "none.json"
        self.refused(bench("--compare", path), str(path), "cannot be read")
        path.write_text("{}")
        saved = tmp_path / "saved.json"
        self.refused(bench("--compare", path, "--save", saved), "no report")
        assert not saved.exists()
        assert path.read_text() == "{}"

    def test_a_place_where_nothing_can_be_saved(self, bench: Command, tmp_path: Path) -> None:
        self.refused(bench("--save", tmp_path / "absent" / "r.json"), "is no folder")
        self.refused(bench("--save", tmp_path), "is a folder")

    def test_plots_without_matplotlib(self, bench: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        self.refused(bench("--plots", tmp_path / "plots"), "shmroute[plots]")

    def test_interpreted_kernels(self, bench: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(suite, "COMPILED", False)
        self.refused(bench(), "NUMBA_DISABLE_JIT")


def test_a_group_that_fails_does_not_keep_the_others_from_being_measured(
    bench: Command, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails(bench: Bench) -> Iterator[Table]:
        yield Table("ring/made-up", "Made up", "ns", "lower", (exact("a", 1), exact("b", 2, 1)))
        raise ShmrouteError("no room")

    monkeypatch.setitem(suite.GROUPS, "ring", fails)
    done = bench("--only", "ring,sizes", "--json", "--save", tmp_path / "r.json")
    assert done.exit_code == 1
    assert "no room" in done.stderr
    report = report_of(done)
    assert report["failures"] == {"ring": "ShmrouteError: no room"}
    assert len(report["tables"]["ring"]) == len(report["tables"]["sizes"]) == 1
    assert read_report(tmp_path / "r.json").failures == report["failures"]


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143)])
def test_an_interrupted_run_says_so_by_its_exit_code(
    stop: BaseException, code: int, bench: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(bench: Bench) -> Iterator[Table]:
        yield Table("ring/made-up", "Made up", "ns", "lower", (exact("a", 1), exact("b", 2, 1)))
        raise stop

    monkeypatch.setitem(suite.GROUPS, "ring", stopped)
    assert bench("--only", "ring").exit_code == code


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_nothing(number: int, tmp_path: Path) -> None:
    """Wherever it is hit, even while something is being compiled, or when it was about to end."""
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "shmroute", "bench", "--quick", "--only", "ring"],
            stdout=subprocess.DEVNULL, stderr=file, start_new_session=True,
        )  # fmt: skip
    deadline = time.monotonic() + PATIENCE
    while not left_by(process.pid):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, number)  # as a terminal does: partners get it too
    process.wait(PATIENCE)
    assert left_by(process.pid) == [], log.read_text()
    assert "Traceback" not in log.read_text()


def test_curves_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    series = {"x": [1.0, 2.0], "median": [3.0, 4.0], "p25": [2.0, 3.0], "p75": [4.0, 5.0]}
    curves = [
        {
            "name": name,
            "title": name,
            "x": "E",
            "y": "ns",
            "log": log,
            "series": {"one": series},
            "marks": [("here", 1.5)],
        }
        for name, log in (("a", "xy"), ("b", ""))
    ]
    plots.check_plottable(tmp_path / "plots")
    assert [path.name for path in plots.draw(curves, tmp_path / "plots")] == ["a.png", "b.png"]
    assert (tmp_path / "plots" / "a.png").read_bytes().startswith(b"\x89PNG")
