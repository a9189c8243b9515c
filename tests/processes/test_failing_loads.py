"""Loads that fail: who is told what, when it is tried again, and that nobody else notices."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from worlds import PATIENCE, Failed, World, eventually

import shmroute
from shmroute import PagerConfig, RuntimeConfig
from shmroute.errors import ExpertLoadError
from shmroute.shared.layout import HEADER_PAGER
from shmroute.shared.words import ABSENT, FAILED, identity_pid
from shmroute.sources.base import SourceSpec
from shmroute.sources.faulty import Fault

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-mixtral"
LONG = 30.0
"""A back-off that no test outlasts."""


def test_a_read_error_fails_that_expert_for_those_who_need_it_and_nobody_else(world: World) -> None:
    runtime = world.create(retry_after=LONG)
    world.faults(Fault(layer=0, expert=3, error="EIO"))
    workers = world.workers(2)
    replies = [worker.start("lease", layer=0, expert=3) for worker in workers]
    others = runtime.experts(0, [2, 4], PATIENCE)
    assert sorted(expert for expert, *_ in others) == [2, 4]
    for reply in replies:
        with pytest.raises(Failed, match=r"expert 3 of layer 0.*synthetic.*Input/output error") as failed:
            reply.get()
        assert failed.value.kind == "ExpertLoadError"
    with pytest.raises(ExpertLoadError) as caught, runtime.expert(0, 3, PATIENCE):
        pass
    assert (caught.value.layer, caught.value.expert, caught.value.reason) == (0, 3, "Input/output error")
    assert caught.value.path == world.source.location(0, 3)
    assert len(world.reads(0, 3)) == 1
    assert world.counter("failures") == 1
    assert world.state(0, 3) == FAILED


def test_a_demand_before_the_back_off_is_over_raises_at_once_and_reads_nothing(world: World) -> None:
    runtime = world.create(retry_after=LONG)
    world.faults(Fault(layer=0, expert=3, error="EIO"))
    for _ in range(3):
        with pytest.raises(ExpertLoadError), runtime.expert(0, 3, PATIENCE):
            pass
    world.faults()
    with pytest.raises(ExpertLoadError), runtime.expert(0, 3, 0):
        pass
    assert runtime.prefetch(0, [3]) == 0
    assert len(world.reads(0, 3)) == 1
    assert world.metrics().total.counters["load_errors"] == 4


def test_a_demand_after_the_back_off_tries_again_and_then_works(world: World) -> None:
    runtime = world.create(retry_after=0.05)
    world.faults(Fault(layer=0, expert=3, error="EIO"))
    with pytest.raises(ExpertLoadError), runtime.expert(0, 3, PATIENCE):
        pass
    world.faults()
    assert lease_in_the_end(runtime, 0, 3) == world.geometry.expert_bytes
    assert len(world.reads(0, 3)) == 2


def lease_in_the_end(runtime: shmroute.Runtime, layer: int, expert: int) -> int:
    """Demand an expert until its back-off is over; its bytes."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with runtime.expert(layer, expert, PATIENCE) as weights:
                return weights.raw.nbytes
        except ExpertLoadError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_each_failure_in_a_row_doubles_the_back_off(world: World) -> None:
    runtime = world.create(retry_after=0.02)
    world.faults(Fault(layer=0, expert=3, error="EIO"))
    pauses = []
    for attempt in range(1, 5):
        eventually(lambda: demand_was_read(world, runtime, attempt))  # noqa: B023
        failure = world.segment.read(world.segment.layout.row(world.segment.layout.failures, 0) + 3 * 8)
        pauses.append((failure & ((1 << 44) - 1)) - time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1_000_000)
    assert pauses[-1] > 20  # 160 ms less what the test itself took; the first was 20 ms
    assert world.counter("failures") == 4


def demand_was_read(world: World, runtime: shmroute.Runtime, count: int) -> bool:
    with pytest.raises(ExpertLoadError), runtime.expert(0, 3, PATIENCE):
        pass
    return world.counter("failures") >= count


def test_bytes_that_differ_from_the_first_load_are_refused_until_they_are_right_again(world: World) -> None:
    runtime = world.create(slots=1, retry_after=0.05)
    for expert in (0, 1):
        with runtime.expert(0, expert, PATIENCE):
            pass
    assert world.state(0, 0) == ABSENT
    world.faults(Fault(layer=0, expert=0, corrupt=True))
    with pytest.raises(ExpertLoadError, match="checksum mismatch"), runtime.expert(0, 0, PATIENCE):
        pass
    assert world.counter("checksum_mismatches") == 1
    world.faults()
    lease_in_the_end(runtime, 0, 0)
    worker = world.worker()
    assert worker.do("lease", layer=0, expert=0) == world.truth(0, 0)
    assert world.counter("checksum_mismatches") == 1


def test_checksums_are_kept_over_takeovers(world: World) -> None:
    runtime = world.create(pager=False, slots=1, retry_after=LONG)
    pager = world.pager()
    for expert in (0, 1):
        with runtime.expert(0, expert, PATIENCE):
            pass
    pager.kill()
    world.faults(Fault(layer=0, expert=0, corrupt=True))
    world.pager()
    with pytest.raises(ExpertLoadError, match="checksum mismatch"), runtime.expert(0, 0, PATIENCE):
        pass


def test_a_truncated_file_is_named_as_such(world: World) -> None:
    runtime = world.create(retry_after=LONG)
    world.faults(Fault(layer=1, expert=2, truncate=True))
    with pytest.raises(ExpertLoadError, match="truncated"), runtime.expert(1, 2, PATIENCE):
        pass
    with runtime.expert(1, 3, PATIENCE):
        pass


def test_a_failed_load_of_a_loop_leaves_the_others_to_be_handed_out(world: World) -> None:
    runtime = world.create(retry_after=LONG)
    world.faults(Fault(layer=0, expert=1, error="EIO"))
    handed = []
    with pytest.raises(ExpertLoadError, match="expert 1 of layer 0"):
        for expert, *_ in runtime.experts(0, [0, 1, 2], PATIENCE):
            handed.append(expert)
    assert 1 not in handed
    assert [world.mask(0, e) for e in range(3)] == [0] * 3


WEIRD = """
from shmroute.sources.synthetic import SyntheticSource

class Unprintable(Exception):
    def __str__(self):
        raise RuntimeError("no words for it")

KINDS = [Unprintable, KeyError, SystemExit, KeyboardInterrupt, GeneratorExit, MemoryError, StopIteration]

class WeirdSource(SyntheticSource):
    def __init__(self):
        super().__init__(2, 8, 16, 24)

    def read_into(self, layer, expert, buffer, filled=None):
        if layer == 0 and expert < len(KINDS):
            raise KINDS[expert]()
        super().read_into(layer, expert, buffer, filled)

    def location(self, layer, expert):
        if layer == 0 and expert == 1:
            raise ZeroDivisionError
        return super().location(layer, expert)
"""


def test_whatever_a_source_raises_fails_the_expert_and_not_the_pager(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "weird_source_of_a_test.py").write_text(textwrap.dedent(WEIRD))
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    world.spec = SourceSpec("weird_source_of_a_test:WeirdSource")
    runtime = world.create(io_threads=1, retry_after=LONG)
    pager = world.metrics().pager.pid
    for expert in (0, 2, 3, 4, 5, 6):
        with pytest.raises(ExpertLoadError, match="unexpected error"), runtime.expert(0, expert, PATIENCE):
            pass
    runtime.prefetch(0, [1])
    eventually(lambda: world.state(0, 1) == FAILED)
    with runtime.expert(1, 0, PATIENCE):
        pass
    assert world.counter("failures") == 7
    assert world.metrics().pager.pid == pager


@pytest.fixture
def checkpoint(tmp_path: Path) -> Iterator[Path]:
    """A copy of the example whose file may be spoiled."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(EXAMPLE / name, folder / name)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("change", ["touch", "overwrite", "truncate"])
def test_a_file_that_changes_while_it_is_served_fails_with_its_path(
    world: World, checkpoint: Path, change: str
) -> None:
    settings = PagerConfig(prefetch=0, tick=0.1, retry_after=LONG)
    config = RuntimeConfig.from_checkpoint(checkpoint, "50%", pager=settings, max_workers=4)
    runtime = world.keep(shmroute.create(world.name, config, pager=True))
    with runtime.expert(0, 0, PATIENCE) as before:
        assert before["gate"].shape[0] > 0
    weights = checkpoint / "model.safetensors"
    if change == "touch":
        os.utime(weights, (1, 1))
    elif change == "overwrite":
        with weights.open("r+b") as file:
            file.seek(-8, os.SEEK_END)
            file.write(b"\0" * 8)
        os.utime(weights, (2, 2))  # a kernel's clock may be too coarse for the test's pace
    else:
        os.truncate(weights, weights.stat().st_size // 2)
    with pytest.raises(ExpertLoadError, match="changed after it was opened") as caught, runtime.expert(1, 1, PATIENCE):
        pass
    assert str(weights) in str(caught.value)
    with runtime.expert(0, 0, PATIENCE) as still:  # what was loaded before stays
        assert still["gate"].shape[0] > 0
    assert world.metrics().pager.pid == identity_pid(world.segment.read(HEADER_PAGER))
