"""Lanes: claimed by one worker at a time, clean whenever they are free."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from runtimes import Residency, run_python

from shmroute.errors import NoWorkerLane
from shmroute.lifecycle import attach
from shmroute.pager import reaper
from shmroute.runtime import Runtime
from shmroute.shared import lanes
from shmroute.shared.atomic import WORD, load, store
from shmroute.shared.experts import lease
from shmroute.shared.identity import own_identity, process_stat
from shmroute.shared.lanes import claim, free_lane, free_own_leftovers, lane_identities, live_lanes, reap, vacate
from shmroute.shared.layout import LANE_BASELINE, LANE_IDENTITY, LANE_SHARD, LANE_WAIT
from shmroute.shared.metrics import LANE_SHARD_WORDS
from shmroute.shared.words import (
    LIVE,
    NOBODY,
    expert_mask,
    identity_generation,
    identity_pid,
    identity_state,
    pack_identity,
    pack_wait,
)

LANE = LANE_BASELINE + LANE_SHARD_WORDS * WORD
"""Bytes of a lane."""
LOGITS = np.arange(8, dtype=np.float32)


def identity(pid: int) -> int:
    """Of a process that need not exist."""
    return pack_identity(LIVE, 0, 1000 + pid, pid)


def test_lanes_are_claimed_from_the_lowest_until_there_are_none(memory: Callable[[int], int]) -> None:
    lanes = memory(3 * LANE)
    assert [claim(lanes, LANE, 3, identity(pid)) for pid in (10, 11, 12, 13)] == [0, 1, 2, -1]
    assert [identity_pid(load(lanes + lane * LANE)) for lane in range(3)] == [10, 11, 12]


def test_a_vacated_lane_is_clean_and_of_the_next_generation(memory: Callable[[int], int]) -> None:
    lanes, experts = memory(LANE), memory(64)
    for generation in range(1, 4):
        assert claim(lanes, LANE, 1, identity(9)) == 0
        assert identity_generation(load(lanes)) == generation - 1
        store(experts + WORD, 3 << 58 | 0b101)
        store(lanes + LANE_WAIT, pack_wait(0, 1))
        store(lanes + LANE_SHARD + (LANE_SHARD_WORDS - 1) * WORD, 100 + generation)
        vacate(lanes, experts, 64, 1, 1)
        assert expert_mask(load(experts + WORD)) == 0b100
        assert load(lanes + LANE_WAIT) == 0
        assert load(lanes + LANE_BASELINE + (LANE_SHARD_WORDS - 1) * WORD) == 100 + generation
        word = load(lanes + LANE_IDENTITY)
        assert (identity_state(word), identity_pid(word)) == (NOBODY, 0)
        assert identity_generation(word) == generation


def test_generations_wrap(memory: Callable[[int], int]) -> None:
    lanes, experts = memory(LANE), memory(64)
    store(lanes, pack_identity(NOBODY, 4095, 0, 0))
    assert claim(lanes, LANE, 1, identity(9)) == 0
    vacate(lanes, experts, 64, 1, 1)
    assert load(lanes) == 0


DIES_HOLDING_A_LEASE = """
import os, signal, sys
import shmroute
runtime = shmroute.attach(sys.argv[1], progress=None)
lane = runtime._attachment.lane()
segment = runtime._attachment.segment
from shmroute.shared.experts import lease
from shmroute.shared.words import pack_wait
assert lease(segment.address + segment.layout.experts, lane.bit) >= 0
segment.write(lane.wait - segment.address, pack_wait(0, 3))
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_dead_worker_is_reaped_with_its_lease_and_its_wait(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime()
    segment, residency = runtime._attachment.segment, Residency(runtime)
    residency.load(0, 0)
    assert run_python(DIES_HOLDING_A_LEASE, runtime.name, check=False).returncode == -signal.SIGKILL
    dead = lane_identities(segment)
    assert list(dead) == [0]
    assert live_lanes(segment) == []
    assert lease(residency.word_at(0, 0), 2) >= 0
    assert expert_mask(residency.word(0, 0)) == 0b11
    assert reap(segment) == 1
    assert lane_identities(segment) == {}
    assert expert_mask(residency.word(0, 0)) == 0b10
    assert segment.read(segment.layout.lane(0) + LANE_WAIT) == 0
    assert reap(segment) == 0


def test_a_live_worker_is_not_reaped(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime()
    runtime.router(0)
    segment = runtime._attachment.segment
    assert reap(segment) == 0
    assert live_lanes(segment) == [0]
    assert identity_pid(lane_identities(segment)[0]) == os.getpid()


def test_who_finds_no_lane_takes_that_of_a_dead_worker(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime(max_workers=1)
    Residency(runtime).load(0, 0)
    run_python(DIES_HOLDING_A_LEASE, runtime.name, check=False)
    runtime.router(0).route(LOGITS)
    assert runtime.metrics().workers[0].pid == os.getpid()


def test_who_finds_all_lanes_taken_by_the_living_is_told_so(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime(max_workers=1)
    program = "import sys, shmroute as r; t = r.attach(sys.argv[1]); t.router(0); print(flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program, runtime.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as worker:
        assert worker.stdout is not None
        worker.stdout.readline()
        with pytest.raises(NoWorkerLane, match=r"all 1 worker lanes .* taken by live processes"):
            runtime.router(0)
        assert len(runtime.metrics().workers) == 1
        worker.communicate("\n")
    runtime.router(0)


def test_a_process_holds_one_lane_however_often_it_attaches(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime(num_layers=2)
    with attach(runtime.name) as again:
        runtime.router(0)
        again.router(1)
        assert len(runtime.metrics().workers) == 1


def test_a_process_frees_the_lane_that_it_left_before_execv(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime(max_workers=1)
    program = """
import os, sys
import shmroute
runtime = shmroute.attach(sys.argv[1])
runtime.router(0)
if len(sys.argv) == 2:
    os.execv(sys.executable, [sys.executable, "-c", os.environ["PROGRAM"], sys.argv[1], "again"])
print(runtime._attachment.lane().number)
"""
    assert run_python(program, runtime.name, PROGRAM=program).stdout == "0\n"


def test_only_this_processs_own_leftovers_are_freed(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime()
    segment = runtime._attachment.segment
    for lane, who in enumerate((own_identity(), identity(7))):
        segment.write(segment.layout.lane(lane) + LANE_IDENTITY, who)
    free_own_leftovers(segment, own_identity())
    assert list(lane_identities(segment)) == [1]
    segment.write(segment.layout.lane(1) + LANE_IDENTITY, 0)


def test_the_second_worker_of_a_lane_starts_at_zero_and_the_total_keeps_all(
    make_runtime: Callable[..., Runtime],
) -> None:
    runtime = make_runtime(max_workers=1)
    program = """
import sys
import numpy as np
import shmroute
with shmroute.attach(sys.argv[1]) as runtime:
    for _ in range(5):
        runtime.router(0).route(np.arange(8, dtype=np.float32))
    print(runtime.metrics().workers[0].counters["tokens"])
"""
    for _ in range(2):
        assert run_python(program, runtime.name).stdout == "5\n"
    runtime.router(0)
    assert not any(runtime.metrics().workers[0].counters.values())
    runtime.router(0).route(LOGITS)
    metrics = runtime.metrics()
    assert metrics.workers[0].counters["tokens"] == metrics.workers[0].route.total == 1
    assert metrics.total.counters["tokens"] == metrics.total.route.total == 11


def test_a_lane_that_changed_hands_is_not_freed_for_its_former_worker(
    make_runtime: Callable[..., Runtime], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker may vacate, end, and be succeeded between a reaper's look at the lanes and its look at the dead."""
    segment = make_runtime()._attachment.segment
    ended = subprocess.Popen(["sleep", "60"])
    former = pack_identity(LIVE, 0, process_stat(ended.pid)[1], ended.pid)
    ended.kill()
    ended.wait()
    layout = segment.layout
    lane = claim(segment.address + layout.lanes, layout.lane_bytes, segment.config.max_workers, own_identity())
    held = lane_identities(segment)
    for module, bury in ((lanes, lambda: reap(segment)), (reaper, reaper.Reaper(segment).reap)):
        monkeypatch.setattr(module, "lane_identities", lambda _: {lane: former})
        assert bury() == 0
        monkeypatch.undo()
    assert lane_identities(segment) == held
    assert free_lane(segment, lane, held[lane])
