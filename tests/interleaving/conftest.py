"""These tests need interpreted kernels, and so a pytest process of their own: ``NUMBA_DISABLE_JIT=1 pytest
tests/interleaving``. Another one passes them over.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from shmroute.shared.atomic import COMPILED

collect_ignore_glob = ["test_*.py"] if COMPILED else []

STRESS = os.environ.get("SHMROUTE_STRESS") == "1"
"""Whether to search for long (`make stress`)."""

_table: list[tuple[str, str, str, str]] = []


@pytest.fixture
def scaled() -> Callable[[int], int]:
    """Gives how many schedules to run, from how many a short search runs."""
    return lambda runs: runs * 40 if STRESS else runs


@pytest.fixture
def tell() -> Callable[[str, str, str, str], None]:
    """Takes (what, by which world, how many schedules, the schedule) for the table at the end."""
    return lambda *row: _table.append(row)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what was searched and which mutants were killed."""
    if not _table:
        return
    terminalreporter.section("schedules")
    for row in _table:
        terminalreporter.write_line("{:<52} {:<22} {:>10}  {}".format(*row))
