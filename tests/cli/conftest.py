"""Real processes of the command line, segments with names of their own, and a cache of kernels of their own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_programs import CHECKPOINT, KILLED_CREATOR, WORKER, Program, companions
from typer.testing import CliRunner

from shmroute.cli import app
from shmroute.config import RuntimeConfig
from shmroute.errors import SegmentError
from shmroute.shared.kernel import cache_directory, load_kernels
from shmroute.shared.removal import claim_destruction, unlink_segment
from shmroute.shared.segment import Segment, attach_segment, create_segment, segment_path


@pytest.fixture(scope="session")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Of subprocesses: kernels are found, in a cache that a test may change."""
    load_kernels()
    root = tmp_path_factory.mktemp("cache")
    shutil.copytree(cache_directory(), root / "kernels" / cache_directory().name)
    return os.environ | {"SHMROUTE_CACHE_DIR": str(root), "COLUMNS": "200"}


@pytest.fixture
def name() -> Iterator[str]:
    """A name for a segment, which is gone at the end of the test, and all that goes with it."""
    chosen = f"test-cli-{uuid.uuid4().hex[:12]}"
    yield chosen
    with contextlib.suppress(SegmentError), contextlib.closing(attach_segment(chosen, closing=True)) as segment:
        claim_destruction(segment)
        unlink_segment(segment)
        pytest.fail(f"the test left {segment.name!r} behind")
    assert not segment_path(chosen).exists()


@pytest.fixture
def segment(name: str) -> Iterator[Segment]:
    """A segment that this process owns, without a pager."""
    load_kernels()
    made = create_segment(name, RuntimeConfig.from_checkpoint(CHECKPOINT, "50%"))
    yield made
    if segment_path(name).exists():
        claim_destruction(made)
        unlink_segment(made)
    made.close()
    assert companions(made.uuid) == []


@pytest.fixture
def foreign(name: str) -> Iterator[Path]:
    """A file under a segment's name that is none."""
    path = segment_path(name)
    path.write_bytes(b"not a segment")
    path.chmod(0o600)
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def start(environment: dict[str, str], tmp_path: Path, name: str) -> Iterator[Callable[..., Program]]:
    """Start ``shmroute …``; it is killed at the end of the test if it still runs."""
    started: list[Program] = []

    def run(*arguments: str, command: tuple[str, ...] = ("-m", "shmroute")) -> Program:
        log = tmp_path / f"{len(started)}.log"
        program = Program([sys.executable, *command, *arguments], log, environment)
        started.append(program)
        return program

    yield run
    for program in started:
        if program.process.poll() is None:
            program.kill()
        for stream in (program.process.stdin, program.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                stream and stream.close()


@pytest.fixture
def pager(start: Callable[..., Program], name: str) -> Callable[..., Program]:
    """Start ``shmroute pager`` for the example checkpoint."""

    def run(*options: str, budget: str = "50%") -> Program:
        return start("pager", str(CHECKPOINT), "--name", name, "--budget", budget, *options)

    return run


@pytest.fixture
def worker(start: Callable[..., Program], name: str) -> Callable[[], Program]:
    """Start a worker: a line "LAYER EXPERT" makes it take and give back a lease."""
    return lambda: start(name, command=("-c", WORKER))


@pytest.fixture
def leftover(name: str, environment: dict[str, str]) -> str:
    """UUID of a segment, under `name`, whose creator was killed."""
    load_kernels()
    done = subprocess.run(
        [sys.executable, "-c", KILLED_CREATOR, name], env=environment, stdout=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    return done.stdout.strip()


@pytest.fixture
def cli() -> Callable[..., object]:
    """Run a command in this process; the result has exit_code, stdout and stderr."""
    return lambda *arguments: CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})
