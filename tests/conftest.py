"""Fixtures that all tests share, and the check that none of them leaves anything in ``/dev/shm``."""

from __future__ import annotations

import contextlib
import signal
import types
import uuid
from collections.abc import Callable, Iterator

import hypothesis
import pytest
from runtimes import TEST_PREFIX, Memory, small_config, unique_name

import shmroute.shared.segment
from shmroute.config import RuntimeConfig
from shmroute.lifecycle import create
from shmroute.runtime import Runtime
from shmroute.shared.kernel import load_kernels
from shmroute.shared.segment import PREFIX, SHM

# Whoever runs the tests in the background ignores these for all its children; the tests send them to theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

hypothesis.settings.register_profile("shared machine", deadline=None)
hypothesis.settings.load_profile("shared machine")


def pytest_sessionstart() -> None:
    """Compile the kernels before the first test's clock runs."""
    load_kernels()


@pytest.fixture(scope="session", autouse=True)
def nothing_is_left_in_shared_memory() -> Iterator[None]:
    """At the end there is no segment of this test process, and no lock or semaphore of one that it made."""
    made: list[str] = []

    def recorded() -> uuid.UUID:
        made.append((identifier := uuid.uuid4()).hex)
        return identifier

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shmroute.shared.segment, "uuid_module", types.SimpleNamespace(uuid4=recorded))
        yield
    left = [path.name for path in SHM.iterdir()]
    assert not [file for file in left if file.startswith(f"{PREFIX}{TEST_PREFIX}")]
    assert not [file for file in left if any(f"shmroute-{identifier}" in file for identifier in made)]


@pytest.fixture
def name() -> str:
    """A fresh segment name."""
    return unique_name()


@pytest.fixture
def make_runtime() -> Iterator[Callable[..., Runtime]]:
    """Creates runtimes that are closed when the test ends; takes what `small_config` takes, or a `config`."""
    with contextlib.ExitStack() as stack:

        def make(config: RuntimeConfig | None = None, **settings: object) -> Runtime:
            return stack.enter_context(create(unique_name(), config or small_config(**settings), progress=None))

        yield make


@pytest.fixture
def memory() -> Iterator[Callable[[int], int]]:
    """Gives the address of so many zeroed bytes."""
    blocks: list[Memory] = []

    def make(size: int) -> int:
        blocks.append(Memory(size))
        return blocks[-1].address

    yield make
    for block in blocks:
        block.close()
