"""Deaths at the worst moment: of workers, of the owner, of the pager; and pagers that stop, leave and come back."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
from worlds import HERE, PATIENCE, Failed, World, eventually, process_gone

from shmroute.errors import ExpertTimeout, PagerUnavailable
from shmroute.shared.layout import HEADER_OWNER, HEADER_STANDBY
from shmroute.shared.words import LOADING, REQUESTED, RESIDENT
from shmroute.sources.faulty import Fault

# ------------------------------------------------------------------ workers


def test_the_slot_of_a_worker_killed_with_a_lease_becomes_evictable(world: World) -> None:
    runtime = world.create(slots=1)
    victim = world.worker()
    assert victim.do("lease", layer=0, expert=0) == world.truth(0, 0)
    victim.kill()
    with runtime.expert(1, 1, PATIENCE) as weights:
        assert weights.raw.nbytes == world.geometry.expert_bytes
    assert world.counter("reaped_lanes") == 1
    assert world.mask(0, 0) == 0


def test_a_worker_killed_while_it_waits_leaves_no_wait_word(world: World) -> None:
    runtime = world.create(slots=1)
    world.close_gate(0, 0)
    victim = world.worker()
    victim.start("lease", layer=0, expert=0)
    world.await_read(0, 0)
    eventually(lambda: world.awaited() == {(0, 0)})
    victim.kill()
    world.open_gate()
    with runtime.expert(1, 1, PATIENCE):  # needs the slot that was loaded for the dead
        assert world.awaited() == set()


def test_totals_survive_the_deaths_of_workers_and_are_also_counted_for_each(world: World) -> None:
    runtime = world.create()
    first, second = world.workers(2)
    first.do("route", layer=0, tokens=3)
    second.do("route", layer=0, tokens=5)
    second.do("route", layer=1, tokens=1)
    metrics = runtime.metrics()
    assert {worker.pid: worker.counters["tokens"] for worker in metrics.workers} == {first.pid: 3, second.pid: 6}
    for worker in metrics.workers:
        assert worker.counters["hits"] + worker.counters["misses"] == 2 * worker.counters["tokens"]
    before = metrics.total.counters
    first.kill()
    second.kill()
    eventually(lambda: not runtime.metrics().workers, "the reaping")
    after = runtime.metrics().total.counters
    assert (after["hits"], after["misses"], after["tokens"]) == (before["hits"], before["misses"], 9)
    third = world.worker()
    third.do("route", layer=0, tokens=2)
    metrics = runtime.metrics()
    assert [(worker.pid, worker.counters["tokens"]) for worker in metrics.workers] == [(third.pid, 2)]
    assert metrics.total.counters["tokens"] == 11


# ------------------------------------------------------------------ the owner

OWNER = """
import sys, shmroute
runtime = shmroute.create(sys.argv[1], shmroute.RuntimeConfig.from_json(sys.argv[2]), pager=True)
with runtime.expert(0, 0, 60):
    print("owning", runtime._pager.pid, flush=True)
    sys.stdin.read()
"""


def start_owner(world: World) -> tuple[subprocess.Popen[str], int]:
    """An owner that holds a lease; it and its pager's pid."""
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, world.name, world.config(slots=2).to_json()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    return owner, int(owner.stdout.readline().split()[1])


def end_of(owner: subprocess.Popen[str]) -> None:
    owner.kill()
    owner.wait(PATIENCE)
    for pipe in (owner.stdin, owner.stdout, owner.stderr):
        assert pipe is not None
        pipe.close()


def test_the_pager_of_a_killed_owner_serves_until_the_last_worker_leaves_then_removes_all(world: World) -> None:
    owner, pager = start_owner(world)
    worker = world.worker()
    assert worker.do("lease", layer=0, expert=1) == world.truth(0, 1)
    assert world.segment.uuid
    end_of(owner)  # its standard error, which is the pager's, goes with it
    worker.do("release")
    assert worker.do("visit", layer=1, experts=[2, 3, 4]) == {str(e): [world.truth(1, e)] for e in (2, 3, 4)}
    world.faults(Fault(error="EIO"))
    with pytest.raises(Failed, match="ExpertLoadError"):
        worker.do("lease", layer=1, expert=7)
    assert not process_gone(pager)  # although it had nobody to tell of the failed load
    worker.do("close")
    eventually(lambda: process_gone(pager), "the pager's end")
    assert world.files() == []


def test_the_pager_of_a_killed_owner_without_workers_removes_all(world: World) -> None:
    owner, pager = start_owner(world)
    assert world.segment.uuid
    end_of(owner)
    eventually(lambda: process_gone(pager), "the pager's end")
    assert world.files() == []


def test_an_owner_that_dies_while_it_destroys_is_finished_for(world: World) -> None:
    """Killed between its claim and the removal of the files."""
    world.create(pager=False)
    pager = world.pager()
    claim = (
        "import sys, os, signal; from shmroute.shared.kernel import load_kernels; load_kernels()\n"
        "from shmroute.shared.removal import claim_destruction\n"
        "from shmroute.shared.segment import attach_segment\n"
        "assert claim_destruction(attach_segment(sys.argv[1])); os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", claim, world.name], timeout=PATIENCE, check=False)
    assert done.returncode == -signal.SIGKILL
    pager.await_line("outcome CLOSED")
    assert world.files() == []


# ------------------------------------------------------------------ the pager


def test_a_standby_takes_over_a_killed_pagers_load_and_its_warm_cache(world: World) -> None:
    world.create(pager=False)
    pager = world.pager()
    worker = world.worker()
    worker.do("visit", layer=0, experts=[0, 1])
    standby = world.pager(standby=True)
    world.close_gate(0, 3)
    reply = worker.start("lease", layer=0, expert=3)
    world.await_read(0, 3)
    assert world.state(0, 3) == LOADING
    pager.kill()
    standby.await_line("serving")
    world.await_read(0, 3, count=2)
    assert reply.pending
    world.open_gate()
    assert reply.get() == world.truth(0, 3)
    worker.do("release")
    assert worker.do("visit", layer=0, experts=[0, 1]) == {"0": [world.truth(0, 0)], "1": [world.truth(0, 1)]}
    assert world.reads() == [(0, 0), (0, 1), (0, 3), (0, 3)]
    assert world.counter("takeovers") == 1
    assert world.metrics().pager.pid == standby.pid


def test_without_a_standby_a_waiter_is_told_and_the_next_pager_adopts_everything(world: World) -> None:
    runtime = world.create(pager=False)
    pager = world.pager()
    with runtime.expert(0, 0, PATIENCE):
        pass
    world.close_gate(0, 3)
    assert runtime.prefetch(0, [3]) == 1
    world.await_read(0, 3)
    pager.kill()
    with pytest.raises(PagerUnavailable, match="has no pager"), runtime.expert(0, 3, 0.3):
        pass
    assert world.state(0, 3) == LOADING
    world.open_gate()
    world.pager()
    with runtime.expert(0, 3, PATIENCE), runtime.expert(0, 0):
        pass
    assert world.reads() == [(0, 0), (0, 3), (0, 3)]
    assert [world.mask(0, e) for e in (0, 3)] == [0, 0]


def test_no_pager_at_all_is_an_error_after_the_timeout(world: World) -> None:
    runtime = world.create(pager=False)
    for timeout in (0, 0.2):
        with pytest.raises(PagerUnavailable, match="has no pager"), runtime.expert(0, 0, timeout):
            pass
    with pytest.raises(PagerUnavailable):
        list(runtime.experts(0, [1, 2], 0.2))
    assert world.awaited() == set()
    assert world.state(0, 0) == REQUESTED


def test_a_pager_that_works_but_is_slow_is_a_timeout(world: World) -> None:
    runtime = world.create()
    world.close_gate(0, 0)
    with pytest.raises(ExpertTimeout, match="at work"), runtime.expert(0, 0, 0.6):
        pass
    world.open_gate()
    with runtime.expert(0, 0, PATIENCE):
        pass
    assert world.reads() == [(0, 0)]


def test_a_stopped_pager_is_named_as_such_and_serves_when_continued(world: World) -> None:
    runtime = world.create(pager=False)
    pager = world.pager()
    pager.stop()
    with pytest.raises(PagerUnavailable, match=r"stopped.*kill -CONT"), runtime.expert(0, 0, 0.3):
        pass
    pager.resume()
    with runtime.expert(0, 0, PATIENCE):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_pager_told_to_stop_hands_a_warm_cache_to_its_standby(world: World, number: signal.Signals) -> None:
    runtime = world.create(pager=False)
    pager = world.pager()
    standby = world.pager(standby=True)
    with runtime.expert(0, 0, PATIENCE):
        pass
    pager.signal(number)
    pager.await_line("outcome HANDED_OVER")
    standby.await_line("serving")
    with runtime.expert(0, 0), runtime.expert(0, 0):
        pass
    with runtime.expert(0, 1, PATIENCE):
        pass
    assert world.reads() == [(0, 0), (0, 1)]
    assert world.segment.read(HEADER_STANDBY) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_pager_told_to_stop_without_a_standby_serves_its_workers_then_removes_all(
    world: World, number: signal.Signals
) -> None:
    owner, own_pager = start_owner(world)
    worker = world.worker()
    worker.do("visit", layer=0, experts=[0])
    end_of(owner)
    assert world.segment.read(HEADER_OWNER)
    subprocess.run(["kill", f"-{int(number)}", str(own_pager)], check=True)
    assert worker.do("visit", layer=1, experts=[4, 5, 6]) == {str(e): [world.truth(1, e)] for e in (4, 5, 6)}
    worker.kill()
    eventually(lambda: process_gone(own_pager), "the pager's end")
    assert world.files() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_makes_a_pager_leave_at_once_even_in_mid_load_and_the_next_adopts_its_segment(
    world: World, number: signal.Signals
) -> None:
    runtime = world.create(pager=False, slots=2)
    pager = world.pager()
    with runtime.expert(0, 0, PATIENCE):
        pass
    world.close_gate(0, 3)
    runtime.prefetch(0, [3])
    world.await_read(0, 3)
    pager.signal(number)
    pager.await_line("the owner lives on")
    assert pager.running
    pager.signal(number)
    pager.await_line("outcome LEFT")
    assert pager.wait() == 0
    assert world.state(0, 0) == RESIDENT
    world.open_gate()
    world.pager()
    with runtime.expert(0, 3, PATIENCE):
        pass
    assert world.reads() == [(0, 0), (0, 3), (0, 3)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_pager_told_to_stop_leaves_the_segment_of_a_living_owner(world: World, number: signal.Signals) -> None:
    runtime = world.create(pager=False)
    pager = world.pager()
    with runtime.expert(0, 0, PATIENCE):
        pass
    pager.signal(number)
    pager.await_line("outcome LEFT")
    assert pager.wait() == 0
    world.pager()
    with runtime.expert(0, 0, PATIENCE), runtime.expert(0, 0, PATIENCE):
        pass
    assert world.reads() == [(0, 0)]


def test_only_one_process_is_the_pager(world: World) -> None:
    world.create(pager=False)
    world.pager()
    second = subprocess.run(
        [sys.executable, str(HERE / "pager_program.py"), world.name],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert second.returncode != 0
    assert "has a pager already" in second.stderr


def test_a_standby_that_is_told_to_stop_leaves_the_pager_alone(world: World) -> None:
    world.create(pager=False)
    pager = world.pager()
    standby = world.pager(standby=True)
    eventually(lambda: world.segment.read(HEADER_STANDBY))
    standby.signal(signal.SIGTERM)
    standby.await_line("outcome NOT_NEEDED")
    assert world.segment.read(HEADER_STANDBY) == 0
    assert pager.running
