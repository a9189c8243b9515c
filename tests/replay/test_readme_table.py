"""README's table of a trace recorded on the shipped model: recorded and replayed here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from runtimes import REPOSITORY
from shipped_trace import record_shipped_model

from shmroute.replay.run import ALL, Outcome, replay
from shmroute.replay.timing import Machine

HEADING = "### Replay of a trace recorded on the shipped model"
WORKERS, BUDGETS = 4, (4, 12, 24)
BANDWIDTH, COMPUTE = 1e9, 0.2e-3

Figures = dict[str, list[tuple[float, float, float]]]
"""By policy, for each budget: hit rate, on time, ms that a token waits."""


def readme_table() -> Figures:
    """The figures under the heading."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert HEADING in text, "README lacks the table's heading"
    passage = re.split(r"\n#+ ", text.split(HEADING)[1])[0]
    lines = [re.sub(r"[*`]", "", line) for line in re.findall(r"^\|.*\|$", passage, re.M)]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    found = {}
    for policy, *cells in rows[2:]:
        numbers = [re.findall(r"\d*\.\d+", cell) for cell in cells]
        assert [len(three) for three in numbers] == [3] * len(BUDGETS), (policy, cells)
        found[policy.split()[0]] = [(float(a), float(b), float(c)) for a, b, c in numbers]
    return found


def figures(outcomes: list[Outcome]) -> Figures:
    found: Figures = {}
    for one in outcomes:
        found.setdefault(one.policy, []).append((one.hit_rate, one.on_time, one.stall_per_token * 1000))
    return found


def test_readmes_table_is_what_a_replay_gives(tmp_path: Path) -> None:
    trace = record_shipped_model(tmp_path)
    assert (trace.num_tokens, trace.meta["dropped"], trace.meta["unfinished"]) == (2816, 0, 0)
    machine = Machine(trace.meta["expert_bytes"], BANDWIDTH, COMPUTE)
    replayed = figures(replay(trace, BUDGETS, ALL, machine, workers=WORKERS))
    written = readme_table()
    assert list(written) == list(replayed)
    for policy, cells in replayed.items():
        for (hit_rate, on_time, stall), said in zip(cells, written[policy], strict=True):
            # Room for rounding, and for a choice or two that another order of summation in the gate's product changes.
            assert said == (
                pytest.approx(hit_rate, abs=1e-3), pytest.approx(on_time, abs=1e-3), pytest.approx(stall, abs=0.02)
            ), policy  # fmt: skip
