"""``shmroute record``, and the options that start a recording."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from runtimes import REPOSITORY, small_config, unique_name
from typer.testing import CliRunner, Result

from shmroute.cli import app
from shmroute.config import TraceConfig
from shmroute.lifecycle import attach, create, destroy
from shmroute.traces import open_trace

SHMROUTE = Path(sys.executable).with_name("shmroute")


def record(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["record", *map(str, arguments)])


def make(folder: Path, tokens: int = 3) -> str:
    """Record a run; its uuid."""
    config = small_config(num_layers=2, trace=TraceConfig(str(folder)))
    with create(unique_name(), config, progress=None) as runtime:
        for layer in range(2):
            runtime.router(layer).route(np.zeros((tokens, 8), np.float32))
        return runtime.uuid


def test_a_table_for_people_and_nothing_written(tmp_path: Path) -> None:
    uuid = make(tmp_path)
    result = record(tmp_path)
    assert result.exit_code == 0, result.output
    assert f"run {uuid[:8]}: 3 tokens, 2 layers × 8 experts, top 2, without logits" in result.stdout
    assert "killed" not in result.stdout
    assert len(list(tmp_path.iterdir())) == 1


def test_a_merged_trace_is_read_like_the_folder(tmp_path: Path) -> None:
    make(tmp_path / "run")
    result = record(tmp_path / "run", "-o", tmp_path / "t.npz", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["output"] == str(tmp_path / "t.npz")
    assert (found["tokens"], found["dropped"], found["unfinished"], found["incomplete_tokens"]) == (3, 0, 0, 0)
    (worker,) = found["workers"]
    assert (worker["lane"], worker["pid"], worker["routed"], worker["ended"]) == (0, os.getpid(), 6, True)
    folder, file = open_trace(tmp_path / "run"), open_trace(tmp_path / "t.npz")
    for name in ("ids", "weights", "seq_id", "resident", "lane", "tick", "strength", "stall_ns"):
        np.testing.assert_array_equal(getattr(folder, name), getattr(file, name))
    assert file.meta["workers"] == found["workers"]
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_of_several_runs_one_must_be_named(tmp_path: Path) -> None:
    first, second = make(tmp_path, 1), make(tmp_path, 2)
    result = record(tmp_path)
    assert result.exit_code == 2
    assert first[:8] in result.stderr
    assert second[:8] in result.stderr
    assert "--run" in result.stderr
    assert json.loads(record(tmp_path, "--run", second[:8], "--json").stdout)["tokens"] == 2
    result = record(tmp_path, "--run", "zz")
    assert result.exit_code == 2
    assert "'zz'" in result.stderr


@pytest.mark.parametrize("what", ["absent", "empty", "file"])
def test_what_is_no_recording_is_named(tmp_path: Path, what: str) -> None:
    path = tmp_path / what
    if what == "empty":
        path.mkdir()
    elif what == "file":
        path.touch()
    result = record(path)
    assert result.exit_code == 2
    assert str(path) in result.stderr


def test_an_output_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    make(tmp_path / "run")
    result = record(tmp_path / "run", "-o", tmp_path / "none" / "t.npz")
    assert result.exit_code == 1
    assert "cannot be written" in result.stderr


def test_trace_logits_alone_is_a_mistake() -> None:
    arguments = ["pager", str(REPOSITORY / "examples" / "tiny-mixtral"), "--name", "x", "--budget", "50%"]
    result = CliRunner().invoke(app, [*arguments, "--trace-logits"])
    assert result.exit_code == 2
    assert "--trace" in result.stderr


def test_a_pager_started_with_trace_has_its_workers_record(tmp_path: Path) -> None:
    name, folder = unique_name(), tmp_path / "made" / "here"
    pager = subprocess.Popen(
        [
            SHMROUTE, "pager", REPOSITORY / "examples" / "tiny-mixtral", "--name", name, "--budget", "50%",
            "--trace", "made/here", "--trace-logits",
        ],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert pager.stderr is not None
        while "created" not in (line := pager.stderr.readline()):
            assert line, "the pager ended"
        with attach(name, progress=None) as runtime:
            runtime.router(5).route(np.zeros((4, 8), np.float32))
            running = json.loads(record(folder, "--json").stdout)
            assert (running["tokens"], running["incomplete_tokens"]) == (4, 4), "the other layers were not routed"
            assert not running["workers"][0]["ended"]
        pager.send_signal(signal.SIGINT)
        assert pager.wait(60) == 0
    finally:
        if pager.poll() is None:
            pager.kill()
            pager.wait()
            destroy(name)
        assert pager.stderr is not None
        pager.stderr.close()
    trace = open_trace(folder)
    assert trace.logits is not None
    assert trace.meta["checkpoint"] == str(REPOSITORY / "examples" / "tiny-mixtral")


def test_a_demo_with_trace_leaves_traces_that_verify(tmp_path: Path) -> None:
    arguments = ["--trace", tmp_path, "--tokens", "40", "--budget", "25%", "--json"]
    done = subprocess.run([SHMROUTE, "demo", *arguments], capture_output=True, text=True, check=False, timeout=110)
    runs = json.loads(done.stdout)["runs"]
    for run, name in zip(runs, ("bonus-0", "bonus-0.5"), strict=True):
        trace = open_trace(tmp_path / f"{name}.npz")
        assert trace.num_tokens == run["metrics"]["total"]["tokens"] // 6
        assert int(trace.misses().sum()) == run["metrics"]["total"]["misses"]
        assert trace.stall_ns is not None
        assert int(trace.stall_ns.sum()) == run["metrics"]["total"]["wait_ns"]
        verified = CliRunner().invoke(app, ["replay", "--verify", str(tmp_path / f"{name}.npz")])
        assert verified.exit_code == 0, verified.output


def test_an_interruption_is_130_and_leaves_no_half_file(tmp_path: Path) -> None:
    make(tmp_path / "run")
    code = (
        "import sys, time, numpy as np\n"
        "from shmroute.cli import main\n"
        "def slow(*arguments, **named):\n"
        "    print('writing', flush=True)\n"
        "    time.sleep(60)\n"
        "np.savez_compressed = slow\n"
        "sys.argv = ['shmroute', 'record', sys.argv[1], '-o', sys.argv[2]]\n"
        "main()\n"
    )
    program = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "run", tmp_path / "t.npz"], stdout=subprocess.PIPE, text=True
    )
    assert program.stdout is not None
    assert program.stdout.readline() == "writing\n"
    program.send_signal(signal.SIGINT)
    assert program.wait(60) == 130
    program.stdout.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
