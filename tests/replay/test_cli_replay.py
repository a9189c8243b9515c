"""``shmroute replay`` on traces made here."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner, Result

from shmroute.cli import app
from shmroute.pager.eviction.names import POLICIES
from shmroute.traces import Trace, save_trace


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """24 tokens, 3 layers × 8 experts, top 2."""
    rng = np.random.default_rng(1)
    ids = np.stack([[rng.choice(8, 2, replace=False) for _ in range(3)] for _ in range(24)]).astype(np.int32)
    save_trace(Trace("t", "t", ids, 8, seq_id=np.arange(24) // 6), tmp_path / "made.npz")
    return tmp_path / "made.npz"


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["replay", *map(str, arguments)])


def test_a_table_for_people(trace: Path) -> None:
    result = run(trace, "--slots", "50%,20", "--workers", "2")
    assert result.exit_code == 0, result.stderr
    for word in ("made: 24 tokens, 3 layers × 8 experts, top 2, 2 workers", "12 (50.0%)", "20 (83.3%)", "belady"):
        assert word in result.stdout
    assert all(policy in result.stdout for policy in POLICIES)


def test_prefetches_have_columns_of_their_own(trace: Path) -> None:
    assert "ISSUED" not in run(trace, "--policies", "lru").stdout
    result = run(trace, "--policies", "lru,belady", "--prefetch", "none,oracle, transitions + affinity")
    assert result.exit_code == 0, result.stderr
    for word in ("ISSUED", "USED", "LATE", "CANCELLED", "ACCURACY", "PREFETCH", " oracle ", " transitions+affinity "):
        assert word in result.stdout
    assert result.stdout.count("belady") == 3, "once for each budget"


def test_the_help_names_the_extra_that_plots_need() -> None:
    assert "shmroute[plots]" in "".join(
        CliRunner().invoke(app, ["replay", "--help"], terminal_width=200).stdout.split()
    )


def test_prefetching_in_json(trace: Path) -> None:
    result = run(
        trace,
        "--json",
        "--policies",
        "lru",
        "--slots",
        "12",
        "--compute",
        "20",
        "--prefetch",
        "none,affinity,oracle,none",
    )
    (found,) = json.loads(result.stdout)["traces"]
    assert [one["prefetch"] for one in found["results"]] == ["none", "affinity", "oracle"]
    none, affinity, oracle = found["results"]
    assert (none["prefetch_accuracy"], set(none["prefetches"].values())) == (None, {0})
    for one in (affinity, oracle):
        counts = one["prefetches"]
        assert list(counts) == ["issued", "completed", "useful", "wasted", "overtaken", "cancelled"]
        assert counts["issued"] >= counts["completed"] + counts["overtaken"] + counts["cancelled"] > 0
        assert one["prefetch_accuracy"] == counts["useful"] / counts["completed"]
    assert oracle["stall_per_token"] < none["stall_per_token"]


def test_json_for_programs(trace: Path) -> None:
    result = run(trace, trace, "--json", "--policies", "lru,belady", "--tokens", "10", "--slots", "24")
    found = json.loads(result.stdout)
    assert [one["tokens"] for one in found["traces"]] == [10, 10]
    assert [one["policy"] for one in found["traces"][0]["results"]] == ["lru", "belady"]
    assert found["traces"][0]["results"][0].keys() == {
        "policy", "prefetch", "slots", "hit_rate", "on_time", "bytes_per_token", "stall_per_token", "loads",
        "prefetches", "prefetch_accuracy",
    }  # fmt: skip
    assert found["traces"][0]["results"][0]["hit_rate"] == found["traces"][1]["results"][1]["hit_rate"]
    assert result.stderr == ""


def test_budgets_that_cannot_work_well_are_warned_about_with_the_numbers(trace: Path) -> None:
    result = run(trace, "--slots", "3,6", "--workers", "3", "--policies", "lru")
    assert result.exit_code == 0
    assert "WARNING: 3 slots are fewer than 3 workers + 1 = 4" in result.stderr
    assert "WARNING: 3 slots are fewer than one token's cycle of 3 layers × 2 experts = 6" in result.stderr
    assert "6 slots are" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--slots", "0"), "'0' is 0 slots"),
        (("--slots", "0%"), "'0%' is 0 slots"),
        (("--slots", "1%"), "'1%' is 0 slots; "),
        (("--slots", "101%"), "so give 1 to 24, or a share up to 100%"),
        (("--slots", "25"), "so give 1 to 24"),
        (("--slots", "many"), "'many' is neither"),
        (("--slots", "1.5"), "'1.5' is neither"),
        (("--slots", ""), "'' is neither"),
        (("--policies", "lru,best"), "no policy 'best'; give lru"),
        (("--workers", "0"), "--workers must be"),
        (("--workers", "33"), "--workers must be"),
        (("--tokens", "0"), "--tokens must be"),
        (("--bandwidth", "0"), "--bandwidth must be above 0"),
        (("--expert-size", "big"), "'big' is no size"),
        (("--compute", "-1"), "--compute must be"),
        (("--prefetch", "luck"), "--prefetch: there is no prefetching 'luck' in 'luck'; give none, oracle, or some of"),
        (("--prefetch", ""), "there is no prefetching ''"),
        (("--prefetch", "none+affinity"), "there is no prefetching 'none' in 'none+affinity'"),
        (("--prefetch", "affinity+affinity"), "names a predictor twice"),
        (("--prefetch", "none,transitions+gate"), "--prefetch: the predictor 'gate' needs hidden states"),
        (("--prefetch", "oracle", "--one-by-one"), "leave out --one-by-one"),
        (("--compute", "nan"), "--compute must be"),
    ],
)
def test_a_wrong_option_says_what_is_allowed(trace: Path, arguments: tuple[str, ...], complaint: str) -> None:
    result = run(trace, *arguments)
    assert result.exit_code == 2
    assert complaint in result.stderr


def test_a_wrong_file_is_named(trace: Path, tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("text")
    for path, complaint in ((tmp_path / "none.npz", "no such file"), (tmp_path / "text.npz", "no npz archive")):
        result = run(trace, path)
        assert result.exit_code == 2
        assert str(path) in result.stderr
        assert complaint in result.stderr
        assert result.stdout == ""


def test_plots_are_drawn_or_the_missing_package_named(trace: Path, tmp_path: Path) -> None:
    result = run(trace, "--plots", tmp_path / "plots", "--policies", "lru,belady", "--prefetch", "none,oracle")
    try:
        import matplotlib  # noqa: F401, PLC0415
    except ImportError:
        assert result.exit_code == 2
        assert "pip install 'shmroute[plots]'" in result.stderr
    else:
        assert result.exit_code == 0
        for name in ("made.png", "made-timeline.png"):
            assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")
