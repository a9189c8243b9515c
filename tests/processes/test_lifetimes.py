"""Lanes and segments over the lives of their processes: claims, leftovers, names, and the end."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest
from worlds import PATIENCE, Failed, World, eventually, falling_logits

import shmroute
from shmroute.errors import (
    ExpertTimeout,
    NoWorkerLane,
    RuntimeClosedError,
    SegmentClosingError,
    SegmentExistsError,
    SegmentNotFoundError,
)
from shmroute.shared.lanes import lane_identities
from shmroute.shared.segment import SHM, attach_segment, segment_path


def test_the_exit_of_an_attached_process_never_removes_the_segment(world: World) -> None:
    runtime = world.create(pager=False)
    orderly, leaving, killed = world.workers(3)
    for worker in (orderly, leaving, killed):
        worker.do("route", layer=0)
    assert orderly.popen.stdin is not None
    orderly.popen.stdin.close()  # the program's end
    assert orderly.wait() == 0
    leaving.start("leave")
    assert leaving.wait() == 3
    killed.kill()
    assert segment_path(world.name).exists()
    world.worker().do("route", layer=0)
    assert runtime.metrics().total.counters["tokens"] == 4


MANY_DEATHS = """
import os, signal, sys
import numpy as np
import shmroute
from shmroute.shared.kernel import load_kernels
load_kernels()
logits = np.linspace(1, -1, 8, dtype=np.float32)
for _ in range(int(sys.argv[2])):
    child = os.fork()
    if child == 0:
        try:
            runtime = shmroute.attach(sys.argv[1])
            runtime.router(0).route(logits)
            os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status == -signal.SIGKILL, status
"""


def test_a_hundred_workers_killed_in_turn_do_not_exhaust_four_lanes_without_a_pager(world: World) -> None:
    world.create(pager=False, max_workers=4)
    arguments = [sys.executable, "-c", MANY_DEATHS, world.name, "100"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert world.metrics().total.counters["tokens"] == 100


def test_a_process_out_of_descriptors_takes_nobody_for_dead(world: World) -> None:
    world.create(pager=False, max_workers=2)
    first, second, *starved = world.workers(6)
    for worker in (first, second):
        worker.do("route", layer=0)
    before = lane_identities(world.segment)
    for spare, worker in enumerate(starved):
        worker.do("starve", spare=spare)
        with pytest.raises(Failed, match="NoWorkerLane"):
            worker.do("route", layer=0)
    assert lane_identities(world.segment) == before
    first.do("route", layer=0)
    second.do("close")
    with pytest.raises(Failed, match="OSError"):  # there is a lane now, but no descriptor for its semaphore
        starved[0].do("route", layer=0)
    assert len(lane_identities(world.segment)) == 1


def test_all_lanes_taken_by_the_living_is_an_error_that_ends_with_one_of_them(world: World) -> None:
    runtime = world.create(pager=False, max_workers=1)
    worker = world.worker()
    worker.do("route", layer=0)
    with pytest.raises(NoWorkerLane, match="max_workers"):
        runtime.router(0)
    assert runtime.metrics().total.counters["tokens"] == 1  # looking needs no lane
    worker.do("close")
    runtime.router(0).route(falling_logits())


def test_a_process_that_execs_itself_claims_its_own_lane_again(world: World) -> None:
    world.create(pager=True, max_workers=2)
    worker = world.worker()
    worker.do("lease", layer=0, expert=0)
    worker.do("route", layer=0)
    lane = worker.do("lane")
    worker.lines.clear()
    worker.start("reattach_by_execv")
    worker.await_line("ready")
    worker.do("route", layer=0)
    assert worker.do("lane") == lane
    assert list(lane_identities(world.segment)) == [lane]
    assert world.mask(0, 0) == 0


def test_the_name_of_a_living_segment_is_taken(world: World) -> None:
    world.create(pager=False)
    before = world.files()
    with pytest.raises(SegmentExistsError, match=world.name):
        shmroute.create(world.name, world.config())
    assert world.files() == before


ABANDON = """
import os, signal, sys, shmroute
runtime = shmroute.create(sys.argv[1], shmroute.RuntimeConfig.from_json(sys.argv[2]), pager=False)
runtime.router(0)
os.kill(os.getpid(), signal.SIGKILL)
"""


def abandon_segment(world: World) -> None:
    """Leave a segment, with a lane, whose owner was killed."""
    arguments = [sys.executable, "-c", ABANDON, world.name, world.config().to_json()]
    assert subprocess.run(arguments, timeout=PATIENCE, check=False).returncode == -signal.SIGKILL
    assert segment_path(world.name).exists()


def test_a_name_whose_users_are_all_dead_is_reclaimed(world: World) -> None:
    abandon_segment(world)
    former = attach_segment(world.name)
    leftovers = [path for path in segment_path("x").parent.iterdir() if former.uuid in path.name]
    assert leftovers
    runtime = world.create(pager=False)
    runtime.router(0).route(falling_logits())
    assert runtime._attachment.segment.uuid != former.uuid
    assert not any(path.exists() for path in leftovers)
    former.close()


def test_a_name_whose_owner_is_dead_but_a_worker_lives_is_taken(world: World) -> None:
    abandon_segment(world)
    worker = world.worker()
    worker.do("route", layer=0)
    with pytest.raises(SegmentExistsError):
        shmroute.create(world.name, world.config())
    worker.do("route", layer=0)


def test_a_name_whose_owner_is_dead_but_a_pager_lives_is_taken(world: World) -> None:
    abandon_segment(world)
    world.pager()
    with pytest.raises(SegmentExistsError):
        shmroute.create(world.name, world.config())


def test_a_worker_that_waits_while_the_owner_closes_is_told(world: World) -> None:
    runtime = world.create()
    world.close_gate()
    worker = world.worker()
    waiting = [worker.start("lease", thread=str(e), layer=0, expert=e, timeout=10 * PATIENCE) for e in (0, 1)]
    world.await_read(0, 0)
    opener = threading.Timer(0.3, world.open_gate)  # the owner's pager finishes its loads
    opener.start()
    runtime.close()
    opener.join()
    for reply in waiting:
        with pytest.raises(Failed, match="SegmentClosingError"):
            reply.get()
    assert world.files() == []


def test_a_worker_that_waits_is_told_of_a_destruction_within_its_recheck(world: World) -> None:
    world.create(pager=False)
    worker = world.worker()
    reply = worker.start("lease", layer=0, expert=0, timeout=10 * PATIENCE)
    eventually(lambda: world.awaited() == {(0, 0)})
    shmroute.destroy(world.name)
    with pytest.raises(Failed, match="SegmentClosingError"):
        reply.get()
    assert world.files() == []


def test_destroying_a_segment_in_use_ends_its_pager_and_its_name(world: World) -> None:
    runtime = world.create(pager=False, tick=5)
    pager = world.pager()
    with runtime.expert(0, 0, PATIENCE):
        shmroute.destroy(world.name)
        assert not segment_path(world.name).exists()
    pager.await_line("outcome CLOSED")
    with pytest.raises(SegmentClosingError):
        runtime.expert(0, 1).__enter__()
    with pytest.raises(SegmentNotFoundError):
        shmroute.attach(world.name)
    runtime.close()
    assert world.files() == []


def test_a_pager_that_wakes_waiters_after_its_segment_is_destroyed_leaves_no_semaphore(world: World) -> None:
    """The files are unlinked under a pager in mid-load, which then wakes a waiter for the first time."""
    runtime = world.create(pager=False)
    pager = world.pager()
    world.close_gate()
    worker = world.worker()
    reply = worker.start("lease", layer=0, expert=0)
    world.await_read(0, 0)
    worker.stop()  # so that its wait word stays
    runtime.close()
    world.open_gate()
    pager.await_line("outcome CLOSED")
    assert world.files() == []
    worker.resume()
    with pytest.raises(Failed, match="SegmentClosingError"):
        reply.get()


def test_closing_ends_the_waits_of_other_threads(world: World) -> None:
    runtime = world.create(pager=False)
    caught: list[BaseException] = []

    def wait(expert: int) -> None:
        try:
            runtime.expert(0, expert, PATIENCE).__enter__()
        except (RuntimeClosedError, ExpertTimeout, SegmentClosingError) as error:
            caught.append(error)

    threads = [threading.Thread(target=wait, args=(expert,)) for expert in range(3)]
    for thread in threads:
        thread.start()
    eventually(lambda: world.awaited())
    runtime.close()
    for thread in threads:
        thread.join(PATIENCE)
    assert [type(error) for error in caught].count(RuntimeClosedError) + [type(error) for error in caught].count(
        SegmentClosingError
    ) == 3
    with pytest.raises(RuntimeClosedError):
        runtime.expert(0, 0)


def test_attaching_and_closing_in_many_threads_keeps_one_lane_for_all(world: World) -> None:
    """A closing attachment is no leftover of an earlier program to the next one."""
    world.create(pager=False, max_workers=3)
    stranger = world.worker()
    stranger.do("route", layer=0)
    wrong: list[str] = []

    def come_and_go() -> None:
        for _ in range(20):
            with shmroute.attach(world.name) as runtime:
                runtime.router(0).route(falling_logits())
                if len(lane_identities(world.segment)) > 2:
                    wrong.append("a second lane")

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert not wrong
    stranger.do("route", layer=0)
    assert world.metrics().total.counters["tokens"] == 82


def test_an_attachment_that_is_being_closed_is_waited_for_by_the_next(world: World) -> None:
    abandon_segment(world)
    first = shmroute.attach(world.name)
    first.router(0)
    entered = threading.Event()
    order: list[str] = []

    def slow_close() -> None:
        entered.set()
        time.sleep(0.2)
        order.append("closed")

    first._attachment.before_close(slow_close)
    closer = threading.Thread(target=first.close)
    closer.start()
    assert entered.wait(PATIENCE)
    with shmroute.attach(world.name) as second:
        order.append("attached")
        second.router(0).route(falling_logits())
        assert second._attachment is not first._attachment
    closer.join(PATIENCE)
    assert order == ["closed", "attached"]


@pytest.mark.parametrize("milliseconds", [1, 2, 4, 8, 16])
def test_an_owner_killed_while_it_closes_leaves_nothing(world: World, milliseconds: int) -> None:
    code = (
        "import os, sys, threading, shmroute\n"
        "from shmroute import RuntimeConfig; from shmroute.sources import SyntheticSource\n"
        "source = SyntheticSource(1, 4, 8, 8)\n"
        "config = RuntimeConfig.from_checkpoint(source, '50%', max_workers=4)\n"
        "runtime = shmroute.create(sys.argv[1], config, pager=True)\n"
        "print(runtime._attachment.segment.uuid, flush=True)\n"
        "threading.Timer(int(sys.argv[2]) / 1000, os.kill, (os.getpid(), 9)).start()\n"
        "runtime.close()\n"
        "threading.Event().wait()\n"
    )
    command = [sys.executable, "-c", code, world.name, str(milliseconds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, timeout=PATIENCE)
    uuid = done.stdout.strip()
    eventually(lambda: not [path for path in SHM.iterdir() if uuid in path.name or path.name.endswith(world.name)])


def test_a_new_worker_waits_until_the_pager_has_buried_the_dead(world: World) -> None:
    world.create(tick=2, max_workers=1)
    first = world.worker()
    first.do("visit", layer=0, experts=[0])
    first.kill()
    assert world.worker().do("visit", layer=0, experts=[1]) == {"1": [world.truth(0, 1)]}


def test_a_thread_that_queues_behind_a_waiting_one_gets_what_arrives_meanwhile(world: World) -> None:
    runtime = world.create(io_threads=2)
    world.close_gate(0, 1)
    slow = threading.Thread(target=lambda: runtime.expert(0, 1, PATIENCE).__enter__())
    slow.start()
    world.await_read(0, 1)
    eventually(lambda: world.awaited() == {(0, 1)})
    with runtime.expert(0, 5, PATIENCE) as w:
        assert w.raw.size == runtime.config.expert_bytes
    assert world.awaited() == {(0, 1)}
    world.open_gate()
    slow.join()
