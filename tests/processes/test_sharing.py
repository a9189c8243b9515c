"""Many workers, one cache: reads are shared, slots are shared, bytes under a lease are the source's."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from worlds import PATIENCE, World, eventually

import shmroute
from shmroute.errors import LeaseHeldError
from shmroute.shared.lease_table import COUNTS
from shmroute.shared.words import ABSENT, RESIDENT


def test_two_workers_that_miss_the_same_expert_cause_one_read(world: World) -> None:
    world.create()
    world.close_gate(0, 3)
    workers = world.workers(2)
    replies = [worker.start("lease", layer=0, expert=3) for worker in workers]
    eventually(lambda: len(world.metrics().workers) == 2)
    world.await_read(0, 3)
    world.open_gate()
    assert [reply.get() for reply in replies] == [world.truth(0, 3)] * 2
    assert world.reads() == [(0, 3)]
    assert world.mask(0, 3).bit_count() == 2


def test_one_slot_serves_four_workers_that_need_different_experts(world: World) -> None:
    world.create(slots=1)
    workers = world.workers(4)
    rounds = 5
    replies = [
        worker.start("visit", layer=i % 2, experts=[2 * i, 2 * i + 1], rounds=rounds)
        for i, worker in enumerate(workers)
    ]
    for i, reply in enumerate(replies):
        assert reply.get() == {str(e): [world.truth(i % 2, e)] for e in (2 * i, 2 * i + 1)}
    assert world.metrics().resident == 1


def test_a_loop_over_more_experts_than_slots_hands_out_each_once(world: World) -> None:
    runtime = world.create(slots=1)
    seen = {}
    for expert, rows, ranks, weights in runtime.experts(1, [[5, 2], [2, 7], [0, 5]]):
        seen[expert] = (rows.tolist(), ranks.tolist(), bytes(weights.raw) == expert_bytes(world, 1, expert))
    assert seen == {
        5: ([0, 2], [0, 1], True),
        2: ([0, 1], [1, 0], True),
        7: ([1], [1], True),
        0: ([2], [0], True),
    }


def expert_bytes(world: World, layer: int, expert: int) -> bytes:
    buffer = bytearray(world.geometry.expert_bytes)
    world.source.read_into(layer, expert, memoryview(buffer))
    return bytes(buffer)


def test_threads_of_one_process_share_one_lane(world: World) -> None:
    runtime = world.create()
    lanes: set[int | None] = set()

    def visit(expert: int) -> None:
        with runtime.expert(0, expert, PATIENCE):
            lanes.update(worker.lane for worker in world.metrics().workers)

    threads = [threading.Thread(target=visit, args=(expert,)) for expert in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert lanes == {0}
    assert world.attach()._attachment is runtime._attachment


def test_bytes_never_change_under_leases_of_many_threads_while_another_process_forces_evictions(world: World) -> None:
    runtime = world.create(slots=2)
    truth = expert_bytes(world, 0, 0)
    wrong: list[str] = []
    evictor = world.worker()
    over = threading.Event()

    def read_on() -> None:
        while not over.is_set():
            with runtime.expert(0, 0, PATIENCE) as weights:
                for _ in range(3):
                    if bytes(weights.raw) != truth:
                        wrong.append(threading.current_thread().name)

    readers = [threading.Thread(target=read_on) for _ in range(6)]
    for reader in readers:
        reader.start()
    evictor.do("visit", layer=1, experts=list(range(8)), rounds=12)
    over.set()
    for reader in readers:
        reader.join(PATIENCE)
    assert not wrong
    eventually(lambda: world.mask(0, 0) == 0)
    assert runtime._leases is not None
    assert not runtime._leases._table[COUNTS:].any()


def test_a_leased_expert_is_never_evicted(world: World) -> None:
    runtime = world.create(slots=2)
    with runtime.expert(0, 0, PATIENCE) as weights:
        before = bytes(weights.raw)
        world.worker().do("visit", layer=0, experts=[1, 2, 3, 4, 5], rounds=2)
        assert runtime.page_out(0, 0)
        assert world.state(0, 0) == RESIDENT
        assert bytes(weights.raw) == before
    assert world.reads(0, 0) == [(0, 0)]


def test_waiting_while_this_thread_holds_a_lease_is_refused(world: World) -> None:
    runtime = world.create()
    with runtime.expert(0, 0, PATIENCE):
        with pytest.raises(LeaseHeldError, match="expert 1 of layer 0"), runtime.expert(0, 1, PATIENCE):
            pass
        with runtime.expert(0, 0):  # resident: no wait, no error
            assert world.mask(0, 0).bit_count() == 1
        assert world.mask(0, 0).bit_count() == 1
    assert world.mask(0, 0) == 0


def test_a_lease_is_released_once(world: World) -> None:
    runtime = world.create()
    lease = runtime.expert(0, 0, PATIENCE)
    with lease, runtime.expert(0, 0):
        pass
    with pytest.raises(RuntimeError, match="expert 0 of layer 0 is not leased"):
        lease.__exit__(None, None, None)
    with runtime.expert(0, 0):
        assert world.mask(0, 0) == 1


class Interruption(Exception):
    pass


def test_every_way_out_of_a_loop_over_experts_releases_its_lease(world: World) -> None:
    runtime = world.create()
    for expert, *_ in runtime.experts(0, [0, 1]):
        assert world.mask(0, expert) == 1
        break
    assert [world.mask(0, e) for e in range(8)] == [0] * 8

    with pytest.raises(Interruption):
        for _ in runtime.experts(0, [0, 1]):
            raise Interruption
    assert [world.mask(0, e) for e in range(8)] == [0] * 8

    loop = runtime.experts(0, [0, 1])
    next(loop)
    assert sum(world.mask(0, e) for e in range(8)) == 1
    del loop
    assert [world.mask(0, e) for e in range(8)] == [0] * 8


def test_a_loop_that_is_collected_in_the_middle_of_another_lease_of_its_thread_does_no_harm(world: World) -> None:
    """Garbage collection may run anywhere, also where the lease count is being changed."""
    runtime = world.create()
    with runtime.expert(0, 0, PATIENCE):
        pass
    leases = runtime._leases
    assert leases is not None
    loop = runtime.experts(0, [0])
    next(loop)
    with leases._mutex:  # as in the middle of `try_lease`
        del loop
        assert world.mask(0, 0) == 0
        with runtime.expert(0, 0):
            assert world.mask(0, 0) == 1
    assert not leases.holds_any()
    assert not leases._table[COUNTS:].any()


def test_a_forked_child_neither_releases_its_parents_lease_nor_hangs(world: World) -> None:
    runtime = world.create()
    with runtime.expert(0, 0, PATIENCE):
        leases = runtime._leases
        assert leases is not None
        held, done = threading.Event(), threading.Event()

        def hold() -> None:
            with leases._mutex:
                held.set()
                done.wait(PATIENCE)

        holder = threading.Thread(target=hold)
        holder.start()
        held.wait(PATIENCE)
        child = os_fork_and_release(runtime)
        done.set()
        holder.join(PATIENCE)
        assert child == 0
        assert world.mask(0, 0) == 1
    assert world.mask(0, 0) == 0


def os_fork_and_release(runtime: shmroute.Runtime) -> int:
    """Fork; the child releases what it inherited and asks for a lease; its exit code."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            assert runtime._leases is not None
            runtime._leases.release(0, 0, runtime._leases.holder())
            try:
                runtime.expert(0, 0)
            except shmroute.errors.RuntimeClosedError:
                code = 0
        finally:
            os._exit(code)
    statuses: list[int] = []

    def ended() -> bool:
        gone, status = os.waitpid(pid, os.WNOHANG)
        if gone:
            statuses.append(status)
        return bool(gone)

    eventually(ended, "the child's end")
    return os.waitstatus_to_exitcode(statuses[0])


def test_weights_kept_beyond_the_block_stay_readable_memory(world: World) -> None:
    with pytest.warns(ResourceWarning, match="outlive"), world.create() as runtime:
        with runtime.expert(0, 0, PATIENCE) as kept:
            pass
        for _, _, _, last in runtime.experts(0, [1, 2], PATIENCE):  # noqa: B007 - the point is that it stays
            pass
    assert kept.raw.sum() >= 0
    assert last["gate"].shape == (24, 16)
    assert world.files() == []


SCRIPT = """
import sys, shmroute
from shmroute.config import RuntimeConfig
runtime = shmroute.create(sys.argv[1], RuntimeConfig.from_json(sys.argv[2]), pager=True)
with runtime.expert(0, 0, 60) as weights:
    print(weights.raw.nbytes)
{end}
"""


@pytest.mark.parametrize("end", ["runtime.close()", "", "raise SystemExit(0)"])
def test_a_script_without_a_main_guard_starts_a_pager_and_leaves_nothing(
    world: World, tmp_path: Path, end: str
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(end=end))
    arguments = [sys.executable, str(script), world.name, world.config().to_json()]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout) == (0, f"{world.geometry.expert_bytes}\n"), done.stderr
    assert world.files() == []


def test_page_out_makes_an_expert_the_next_victim(world: World) -> None:
    runtime = world.create(slots=3)
    for expert in (0, 1, 2):
        with runtime.expert(0, expert, PATIENCE):
            pass
    runtime.affinity(0).update([1])  # dear to the router, and still the next to go
    assert runtime.page_out(0, 1)
    with runtime.expert(0, 5, PATIENCE):
        pass
    assert [world.state(0, e) for e in (0, 1, 2, 5)] == [RESIDENT, ABSENT, RESIDENT, RESIDENT]
    assert world.counter("page_outs") == 1
    assert runtime.resident(0) == [0, 2, 5]
