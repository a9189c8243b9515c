"""``shmroute eval`` as its users run it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from shmroute.cli import app

CHECKPOINT = Path(__file__).resolve().parents[2] / "examples" / "tiny-mixtral"
TEXT = CHECKPOINT / "heldout_tokens.npz"
SHORT = ("--window", "12", "--pools", "2", "--jobs", "2", "--budgets", "50%")


def evaluate(*arguments: str | Path, checkpoint: Path = CHECKPOINT, text: Path = TEXT) -> Result:
    return CliRunner().invoke(app, ["eval", str(checkpoint), str(text), *map(str, arguments)])


def test_a_table_for_people() -> None:
    result = evaluate(*SHORT, "--policies", "lru,expected-next-use", "--rule", "absolute=0.5,1")
    assert result.exit_code == 0, result.stderr
    assert "88 tokens in 2 pools of 4 streams" in result.stdout
    assert re.findall(r"none|absolute +[\d.]+", result.stdout) == [
        "none", "absolute      0.5", "absolute        1",
    ] * 2  # fmt: skip
    assert "24 slots (50.0%), lru" in result.stdout
    assert "24 slots (50.0%), expected-next-use" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert "6 of 6 settings done" in result.stderr


def test_json_for_programs() -> None:
    result = evaluate(*SHORT, "--budgets", "25%,50%", "--rule", "absolute=0.5", "--json")
    found = json.loads(result.stdout)
    assert (found["tokens"], found["window"], found["streams"], found["pools"]) == (88, 12, 4, 2)
    assert [(one["slots"], one["rule"], one["strength"]) for one in found["results"]] == [
        (12, "none", 0), (12, "absolute", 0.5), (24, "none", 0), (24, "absolute", 0.5),
    ]  # fmt: skip
    for plain, biased in (found["results"][:2], found["results"][2:]):
        assert (plain["perplexity_change"], plain["changed"], plain["misses_left"]) == (0, 0, 1)
        assert biased["hit_rate"] > plain["hit_rate"]
        assert biased["low"] <= biased["perplexity_change"] <= biased["high"]
    assert found["results"][0]["perplexity"] == found["results"][2]["perplexity"]


def test_the_first_layers_may_be_spared() -> None:
    """The setting does what a factor of 0 does, beside the same unbiased run."""
    spared = json.loads(evaluate(*SHORT, "--json", "--rule", "probability:spared_layers=1=0.3").stdout)["results"]
    factors = json.loads(
        evaluate(*SHORT, "--json", "--rule", "probability=0.3", "--layer-factors", "0,1,1,1,1,1").stdout
    )["results"]
    assert [one["rule"] for one in spared] == ["none", "probability:spared_layers=1"]
    assert [one["perplexity"] for one in spared] == [one["perplexity"] for one in factors]
    assert [one["hit_rate"] for one in spared] == [one["hit_rate"] for one in factors]


def test_every_rule_can_be_evaluated() -> None:
    rules = ("cache-prior:top_j=1=0.3", "max-rank:max_rank=4=1", "cumulative-threshold=0.9", "probability=0.1")
    result = evaluate(*SHORT, "--json", *(word for rule in rules for word in ("--rule", rule)))
    assert result.exit_code == 0, result.stderr
    plain, *biased = json.loads(result.stdout)["results"]
    assert [f"{one['rule']}={one['strength']:g}" for one in biased] == list(rules)
    for one in biased:
        assert one["changed"] > 0
        assert one["hit_rate"] > plain["hit_rate"]


def test_each_layer_may_have_a_strength_of_its_own() -> None:
    result = evaluate(
        *SHORT, "--rule", "absolute=0.5", "--layer-factors", "0,0,0,0,0,0", "--layer-factors", "0,1,1,1,1,1", "--json"
    )
    plain, zero, some = json.loads(result.stdout)["results"]
    assert (zero["rule"], some["rule"]) == ("absolute ×0,0,0,0,0,0", "absolute ×0,1,1,1,1,1")
    assert (zero["changed"], zero["perplexity"], zero["hit_rate"]) == (0, plain["perplexity"], plain["hit_rate"])
    assert some["changed"] > 0
    assert some["hit_rate"] > plain["hit_rate"]


def test_results_do_not_depend_on_how_many_run_at_once() -> None:
    outputs = [evaluate(*SHORT, "--jobs", jobs, "--rule", "absolute=0.1,0.3", "--json").stdout for jobs in ("1", "3")]
    assert outputs[0] == outputs[1]


def test_budgets_below_one_tokens_cycle_are_warned_about() -> None:
    result = evaluate(*SHORT, "--budgets", "10%", "--rule", "absolute=0.5")
    assert result.exit_code == 0
    assert "WARNING: 4 slots are fewer than one token's cycle of 6 layers × 2 experts = 12" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--budgets", "0%"), "a budget's share must be above 0%"),
        (("--budgets", "2.1%"), "1 slots cannot hold the 2 experts that a token chooses"),
        (("--budgets", "1%"), "holds no expert"),
        (("--budgets", "much"), "'much' is no size"),
        (("--rule", "absolute"), "'absolute' is no rule; write a name and strengths"),
        (("--rule", "best=1"), "names are absolute, cache-prior, max-rank, cumulative-threshold, probability"),
        (("--rule", "cache-prior:top=1=0.1"), "'top=1' is no option; write top_j=N or max_rank=N"),
        (("--rule", "cache-prior:top_j=x=0.1"), "'top_j=x' is no option"),
        (("--rule", "cache-prior:top_j=3=0.1"), "top_j is 3, but only top_k = 2 experts are chosen"),
        (("--rule", "probability:top_j=1=0.1"), "the rule 'probability' keeps none of the best"),
        (("--rule", "max-rank=1"), "the rule 'max-rank' needs one"),
        (("--rule", "absolute=strong"), "the strength 'strong' is no number"),
        (("--rule", "absolute=-1"), "cache_bonus must be a number in [0, 1e+06], not -1.0"),
        (("--rule", "absolute=nan"), "cache_bonus must be a number"),
        (("--layer-factors", "0,1"), "'0,1' has 2 numbers; the model has 6 layers"),
        (("--layer-factors", "a"), "'a': numbers with commas between are expected"),
        (("--layer-factors", "1,1,1,1,1,-1"), "--layer-factors must be a number in [0, 1000], not -1.0"),
        (("--policies", "best"), "there is no policy 'best'; give lru"),
        (("--streams", "0"), "--streams must be an integer from 1 to 32"),
        (("--window", "1"), "--window must be"),
        (("--window", "513"), "--window 513 is more than the 512 positions that the model has"),
        (("--pools", "0"), "--pools must be"),
        (("--jobs", "0"), "--jobs must be"),
    ],
)
def test_a_wrong_option_says_what_is_allowed(arguments: tuple[str, ...], complaint: str) -> None:
    result = evaluate(*arguments)
    assert result.exit_code == 2, result.stdout
    assert complaint in result.stderr


def test_a_wrong_text_or_checkpoint_is_an_error_before_anything_runs(tmp_path: Path) -> None:
    np.savez(tmp_path / "t.npz", t=np.full(5000, 2048))
    result = evaluate(text=tmp_path / "t.npz")
    assert result.exit_code == 2
    assert "token 0 of 't' is 2048, but the model's vocabulary has 2048" in result.stderr
    result = evaluate(checkpoint=tmp_path)
    assert result.exit_code == 1
    assert "config.json" in result.stderr
    assert "decoding" not in result.stderr


def test_a_worker_that_dies_is_an_error_and_not_a_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("true"))
    result = evaluate(*SHORT)
    assert result.exit_code == 1
    assert "a worker ended with code 0 before it was done" in result.stderr


def test_a_plot_is_drawn_and_a_name_that_cannot_be_one_is_refused_at_once(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = evaluate(*SHORT, "--rule", "absolute=0.5,1", "--plot", tmp_path / "p.png")
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    for name, complaint in (("p.doc", "must end in one of"), ("none/p.png", "there is no folder")):
        result = evaluate(*SHORT, "--plot", tmp_path / name)
        assert result.exit_code == 2
        assert complaint in result.stderr


def test_a_plot_without_matplotlib_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = evaluate(*SHORT, "--plot", tmp_path / "p.png")
    assert result.exit_code == 2
    assert "--plot needs matplotlib: pip install 'shmroute[plots]'" in result.stderr


def children_of(pid: int) -> list[int]:
    """Processes that any thread of a process started."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(word) for task in tasks for word in (task / "children").read_text().split()]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_end_it_and_its_workers(number: signal.Signals, code: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "shmroute", "eval", str(CHECKPOINT), str(TEXT), "--jobs", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    while "decoding" not in process.stderr.readline():
        assert process.poll() is None
    workers = children_of(process.pid)
    assert len(workers) == 2
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in errors
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(importlib.util.find_spec("torch") is not None, reason="torch is installed here")
def test_live_without_torch_says_what_to_install() -> None:
    result = evaluate(*SHORT[:4], "--live")
    assert result.exit_code == 2
    assert "--live needs torch, transformers: pip install 'shmroute[transformers]'" in result.stderr
