"""Short forms of the two stress commands, run as their user runs them; and that they fail when they should."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from shmroute.shared.segment import SHM

ROOT = Path(__file__).resolve().parents[2]


def run_stress(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"stress.{command}", *arguments],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=280,
    )  # fmt: skip


def report_of(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def segments(label: str) -> list[str]:
    return [path.name for path in SHM.glob(f"shmroute.{label}-*")]


@pytest.mark.timeout(300)
def test_workers_and_pagers_that_die_and_stop_lose_nothing_and_leave_nothing() -> None:
    done = run_stress("chaos", "--seconds", "12", "--workers", "4", "--seed", "1", "--json")
    assert done.returncode == 0, done.stderr
    report = report_of(done)
    assert report["failures"] == []
    assert report["seed"] == 1
    assert report["kills"] == sum(report["deaths"].values()) >= 6
    assert report["takeovers"] >= 4
    assert all(report["deaths"].values())
    levers = report["levers"]
    for lever in (
        "workers stopped",
        "rings filled under a stopped pager",
        "checksum mismatches caught",
        "experts made unreadable",
        "files cut short",
        "pagers that found no file",
        "pagers told to hand over",
        "lanes of the dead reaped",
        "items begun anew after a death",
    ):
        assert levers[lever] > 0, lever
    checks = report["checks"]
    # Killed between two checks of one lease, or while it holds two leases, one a thread: nearly two to a lease.
    assert checks["digests under leases"] > 1.9 * report["operations"]["leases"] > 1000
    assert checks["items against the reference"] > 10
    assert any("checksum mismatch" in error for error in report["errors"])
    assert any("Input/output error" in error for error in report["errors"])
    assert "deaths survived" in done.stderr


@pytest.mark.timeout(300)
def test_steady_work_grows_nothing() -> None:
    done = run_stress("soak", "--seconds", "10", "--workers", "3", "--seed", "1", "--json")
    assert done.returncode == 0, done.stderr
    report = report_of(done)
    assert report["failures"] == []
    assert not report["drift_judged"]
    assert all(count > 0 for count in report["operations"].values())
    assert report["operations"]["attaches"] > 3
    judged = [process for process in report["growth"] if process["memory"] is not None]
    assert {process["role"] for process in judged} == {"worker", "owner", "pager"}
    assert len(report["periods"]) > 20


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("sabotage", "message"),
    [
        ("digest", "expert 0 of layer 0 has digest"),
        ("output", "off the reference"),
        ("leak", "/dev/shm still has sem.shmroute-"),
    ],
)
def test_what_is_wrong_is_noticed_and_nothing_is_left_even_so(sabotage: str, message: str) -> None:
    done = run_stress("chaos", "--seconds", "1", "--workers", "2", "--seed", "5", "--json", "--sabotage", sabotage)
    assert done.returncode == 1
    assert any(message in failure for failure in report_of(done)["failures"])
    assert message in done.stderr
    assert "--seed 5" in done.stderr
    assert segments("chaos") == []


def test_an_interrupted_run_leaves_nothing() -> None:
    command = [sys.executable, "-m", "stress.chaos", "--seconds", "100", "--workers", "2", "--seed", "1"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as chaos:
        assert chaos.stdout is not None
        while "deaths" not in (line := chaos.stdout.readline()):
            assert line, "it ended before it began"
        time.sleep(0.5)
        chaos.send_signal(signal.SIGINT)
        chaos.stdout.read()
        assert chaos.wait(60) == 130
    name = f"chaos-{chaos.pid}"
    assert f"shmroute.{name}" not in segments("chaos")
    assert not [path for path in Path("/proc").glob("[0-9]*/cmdline") if name in cmdline(path)]


def cmdline(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace")
    except OSError:  # it ended meanwhile
        return ""


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("chaos", ["--workers", "1"], "--workers"),
        ("chaos", ["--workers", "31"], "--workers"),
        ("chaos", ["--seconds", "soon"], "--seconds"),
        ("chaos", ["--seed", "-1"], "--seed"),
        ("chaos", ["--budget", "much"], "'much' is no size"),
        ("chaos", ["--checkpoint", "/nonexistent"], "does not exist"),
        ("chaos", ["--sabotage", "everything"], "--sabotage"),
        ("soak", ["--seconds", "0.5"], "a second or more"),
        ("soak", ["--hours", "-1"], "--hours"),
        ("soak", ["--budget", "much"], "'much' is no size"),
    ],
)
def test_a_wrong_argument_is_named(command: str, arguments: list[str], message: str) -> None:
    done = run_stress(command, *arguments)
    assert done.returncode == 2
    assert message in done.stderr


def test_the_commands_need_no_development_package() -> None:
    code = (
        "import sys\n"
        "for name in ('hypothesis', 'pytest', '_pytest', 'mypy', 'ruff'): sys.modules[name] = None\n"
        "import stress.chaos, stress.soak, stress.worker, stress.pager"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
