"""Runs of the benchmarks that are as short as they can be: no figure of theirs means anything."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator

import pytest
from bench_runs import Result, left_by
from typer.testing import CliRunner

from shmroute.bench import suite
from shmroute.bench.measuring import Scale
from shmroute.cli import app
from shmroute.shared.kernel import load_kernels

SHORTEST = Scale(quick=True, rounds=2, loop_seconds=0.0001, calls=10)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    """Run ``shmroute bench --quick …`` in this process; nothing of it is left afterwards."""
    load_kernels()
    monkeypatch.setattr(suite, "QUICK", SHORTEST)
    monkeypatch.setattr(suite, "warm_up", lambda seconds: None)
    handler = signal.getsignal(signal.SIGTERM)
    cores = os.sched_getaffinity(0)
    yield lambda *arguments: CliRunner().invoke(
        app, ["bench", "--quick", *map(str, arguments)], env={"COLUMNS": "200"}, catch_exceptions=False
    )
    signal.signal(signal.SIGTERM, handler)
    assert os.sched_getaffinity(0) == cores
    assert left_by(os.getpid()) == []
