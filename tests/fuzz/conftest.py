"""How hard the fuzz tests try, and what ends a process that hangs in a kernel."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import fuzzing
import pytest
from hypothesis import HealthCheck, settings

from shmroute.shared.kernel import load_kernels

STRESS = os.environ.get("SHMROUTE_STRESS") == "1"
"""Search for some minutes instead of seconds."""

settings.register_profile(
    "fuzz",
    deadline=None,  # `fuzzing.bounded` has one that also ends what never returns
    max_examples=1000 if STRESS else 100,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A long search may take long."""
    for item in items:
        if STRESS and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.timeout(3600))


@pytest.fixture(scope="session", autouse=True)
def hangs_are_reported(pytestconfig: pytest.Config) -> Iterator[None]:
    """Give `fuzzing.bounded` the real standard error: what pytest has captured dies with the process."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")
    assert capture is not None
    with capture.global_and_fixture_disabled():
        fuzzing.report_to = os.dup(2)
    yield
    os.close(fuzzing.report_to)
    fuzzing.report_to = 2


@pytest.fixture(scope="session", autouse=True)
def kernels() -> None:
    """Loaded before memory is measured."""
    load_kernels()


@pytest.fixture(autouse=True)
def watch_ends() -> Iterator[None]:
    """What comes after a test may take its time."""
    yield
    fuzzing.unwatch()
