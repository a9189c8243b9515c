"""``shmroute eval --live``: real processes that decode with the model itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from family_models import SHIPPED
from typer.testing import CliRunner, Result

from shmroute.cli import app

TEXT = SHIPPED / "heldout_tokens.npz"
SHORT = ("--window", "16", "--pools", "2", "--streams", "2", "--budgets", "50%", "--rule", "absolute=1")


def evaluate(*arguments: str, checkpoint: Path = SHIPPED) -> Result:
    return CliRunner().invoke(app, ["eval", str(checkpoint), str(TEXT), *SHORT, *arguments])


def test_it_agrees_with_the_simulation_where_it_must_and_tells_what_that_cannot() -> None:
    result = evaluate("--live", "--json")
    assert result.exit_code == 0, result.stderr
    live, simulated = json.loads(result.stdout), json.loads(evaluate("--json").stdout)
    assert live["tokens"] == simulated["tokens"] == 60
    plain, biased = live["results"]
    assert plain["perplexity"] == pytest.approx(simulated["results"][0]["perplexity"], rel=0.02)  # bfloat16 here
    assert plain["changed"] == 0 < biased["changed"]
    assert biased["hit_rate"] > plain["hit_rate"]
    for one in live["results"]:
        assert one["stall_per_token"] > 0
        assert one["bytes_per_token"] > one["loads_per_token"] * 196_608 * (1 - 1e-9) > 0
        assert one["workers_pss"] + one["pager_pss"] < one["workers_rss"] + one["pager_rss"]
        assert one["segment"] > 24 * 196_608
    assert "tokens_per_second" not in simulated["results"][0]


def test_tables_for_people() -> None:
    result = evaluate("--live")
    assert result.exit_code == 0, result.stderr
    assert "TOKENS/S" in result.stdout and "TOGETHER" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_options_of_the_simulation_are_refused() -> None:
    for option in (("--jobs", "2"), ("--layer-factors", "1,1,1,1,1,1")):
        result = evaluate("--live", *option)
        assert result.exit_code == 2
        assert f"{option[0]} is of the simulation" in result.stderr


def test_a_worker_that_fails_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(SHIPPED / name)
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    result = evaluate("--live", checkpoint=tmp_path)
    assert result.exit_code == 1
    assert "tensors of the model are missing" in result.stderr
    assert not list(Path("/dev/shm").glob("shmroute-eval-*"))
