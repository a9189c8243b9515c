"""The README's table of the closed loop, on a tenth of its tokens."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from shmroute.cli import app

CHECKPOINT = Path(__file__).resolve().parents[2] / "examples" / "tiny-mixtral"


def test_hit_rates_and_perplexity_are_those_of_the_readme() -> None:
    """At 50 %: 0.821 without a bonus; by probability + 0.12 but for the first layer 0.938, at +0.72 %."""
    arguments = (
        "--budgets", "50%", "--rule", "probability=0.12", "--layer-factors", "0,1,1,1,1,1", "--pools", "11", "--json",
    )  # fmt: skip
    result = CliRunner().invoke(app, ["eval", str(CHECKPOINT), str(CHECKPOINT / "heldout_tokens.npz"), *arguments])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["tokens"] == 11 * 4 * 191
    plain, biased = found["results"]
    assert abs(plain["hit_rate"] - 0.821) < 0.012
    assert abs(biased["hit_rate"] - 0.938) < 0.008
    assert abs(biased["changed"] - 0.108) < 0.01
    assert 0.3 < biased["misses_left"] < 0.4
    assert biased["low"] < 0.0072 < biased["high"]
    assert biased["perplexity_change"] < 0.015
