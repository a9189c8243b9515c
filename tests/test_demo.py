"""The demo, as its user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from shmroute.demo.recording import Recording
from shmroute.demo.reference import dense_reference
from shmroute.errors import CheckpointError
from shmroute.shared.segment import SHM

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "tiny-mixtral"
SHMROUTE = Path(sys.executable).with_name("shmroute")


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([SHMROUTE, "demo", *arguments], capture_output=True, text=True, check=False, timeout=110)


def test_the_demo_equals_the_dense_reference_and_a_bonus_raises_the_hit_rate() -> None:
    done = run_demo("--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    plain, biased = report["runs"]
    assert report["shortcomings"] == []
    assert plain["largest_error"] < 1e-3
    assert plain["changed"] == 0
    assert plain["choices"] == 2816 * 6 * 2
    assert biased["hit_rate"] > plain["hit_rate"] + 0.03
    assert 0 < biased["changed"] < 0.15 * biased["choices"]
    for run in (plain, biased):
        total, pager = run["metrics"]["total"], run["metrics"]["pager"]
        assert total["tokens"] == 2816 * 6
        assert total["hits"] + total["misses"] == run["choices"]
        assert total["misses"] > 0
        assert pager["evictions"] > 0
        assert pager["bytes_read"] == pager["loads"] * 196_608
        assert pager["loads"] - pager["evictions"] <= run["metrics"]["slots"]
        assert run["metrics"]["pool_bytes"] == 24 * 196_608
        assert sum(worker["metrics"]["tokens"] for worker in run["workers"]) == total["tokens"]
    assert not [path.name for path in SHM.glob("shmroute.demo-*")]


@pytest.mark.parametrize("budget", ["25%", "50%"])
def test_a_bonus_beats_none_at_either_budget(budget: str) -> None:
    done = run_demo("--json", "--budget", budget, "--tokens", "150")
    assert done.returncode == 0, done.stderr
    plain, biased = json.loads(done.stdout)["runs"]
    assert biased["hit_rate"] > plain["hit_rate"]


def test_a_demo_in_which_nothing_is_missed_fails() -> None:
    done = run_demo("--budget", "100%", "--tokens", "20")
    assert done.returncode == 1
    assert "no eviction" in done.stdout


def test_a_demo_without_its_data_says_where_it_looked(tmp_path: Path) -> None:
    done = run_demo("--data", str(tmp_path / "absent"))
    assert done.returncode == 2
    assert str(tmp_path / "absent") in done.stderr
    done = run_demo("--data", str(tmp_path))
    assert done.returncode == 1
    assert "activations.npz" in done.stderr


def test_a_checkpoint_that_the_reference_cannot_read_is_one_line(tmp_path: Path) -> None:
    for name in ("config.json", "activations.npz"):
        (tmp_path / name).symlink_to(FOLDER / name)
    (tmp_path / "other.safetensors").symlink_to(FOLDER / "model.safetensors")
    done = run_demo("--data", str(tmp_path))
    assert done.returncode == 1
    assert "CheckpointError" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_reference_routes_like_a_plain_softmax_top_k() -> None:
    hidden = Recording.load(FOLDER).stream("faq", 8)
    outputs, choices = dense_reference(FOLDER, hidden, 2)
    with np.load(FOLDER / "activations.npz") as file:
        logits = np.einsum("tlh,leh->tle", hidden, file["gate"])
    assert (np.argsort(-logits, axis=-1)[..., :2] == choices).all()
    assert outputs.shape == hidden.shape


def test_a_recording_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "activations.npz").write_bytes(b"not a zip file")
    with pytest.raises(CheckpointError, match=r"activations\.npz"):
        Recording.load(tmp_path)
