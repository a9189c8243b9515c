"""Without compilation the same kernels do the same: this suite's own tests, run interpreted."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shmroute.shared.atomic import COMPILED

TESTS = Path(__file__).resolve().parent.parent
SUBSET = [
    "shared/test_atomic.py",
    "shared/test_bell.py",
    "shared/test_experts.py",
    "shared/test_lease_table.py",
    "shared/test_metrics.py",
    "shared/test_ring.py",
    "shared/test_turned_down.py",
    "shared/test_words.py",
    "routing/test_choosing.py",
    "routing/test_grouping.py",
    "routing/test_rules.py",
    "routing/test_bad_logits.py::test_a_row_with_too_few_finite_logits_refuses_the_whole_batch",
    "routing/test_bad_logits.py::test_an_expert_without_a_finite_logit_is_passed_over_and_counted",
]


@pytest.mark.timeout(400)  # it is hundreds of tests
@pytest.mark.skipif(not COMPILED, reason="everything runs interpreted already")
def test_a_part_of_the_suite_passes_interpreted() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(TESTS / path) for path in SUBSET)],
        cwd=TESTS.parent, env=os.environ | {"NUMBA_DISABLE_JIT": "1"}, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout
    assert "failed" not in done.stdout
