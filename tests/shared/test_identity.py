"""Who is alive: the kernel's word counts, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Iterator

import pytest
from runtimes import run_python

from shmroute.shared.identity import DeathWatch, is_dead, is_stopped, own_identity, process_stat, same_process
from shmroute.shared.words import DESTROYING, LIVE, identity_pid, identity_start, identity_state, pack_identity


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that sleeps."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def identity_of(pid: int, state: int = LIVE) -> int:
    """The identity word of a process."""
    return pack_identity(state, 0, process_stat(pid)[1], pid)


def make_zombie(process: subprocess.Popen[bytes]) -> None:
    """Kill a child, without reaping it."""
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)


def test_this_process_is_alive() -> None:
    me = own_identity()
    assert (identity_state(me), identity_pid(me)) == (LIVE, os.getpid())
    assert not is_dead(me)
    assert not is_dead(own_identity(DESTROYING))


def test_nobody_is_dead() -> None:
    assert is_dead(0)
    assert is_dead(pack_identity(0, 5, 0, 0))


def test_pid_zero_is_no_process_that_could_be_told_dead() -> None:
    assert not is_dead(pack_identity(LIVE, 0, 0, 0))


def test_a_zombie_is_dead(child: subprocess.Popen[bytes]) -> None:
    identity = identity_of(child.pid)
    assert not is_dead(identity)
    make_zombie(child)
    assert process_stat(child.pid)[0] == "Z"
    assert is_dead(identity)


def test_a_reaped_process_is_dead(child: subprocess.Popen[bytes]) -> None:
    identity = identity_of(child.pid)
    child.kill()
    child.wait()
    assert is_dead(identity)


def test_a_recycled_pid_is_not_the_process_that_had_it() -> None:
    me = own_identity()
    former = pack_identity(LIVE, 0, identity_start(me) - 1, os.getpid())
    assert is_dead(former)
    assert not same_process(me, former)


def test_a_pid_that_is_a_thread_by_now_is_not_the_process_that_had_it() -> None:
    thread = next(int(name) for name in os.listdir("/proc/self/task") if int(name) != os.getpid())
    assert is_dead(pack_identity(LIVE, 0, process_stat(os.getpid())[1] - 1, thread))


@pytest.fixture(autouse=True)
def another_thread() -> Iterator[None]:
    """This process has a second thread."""
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    yield
    done.set()
    thread.join()


def test_a_stopped_process_is_alive(child: subprocess.Popen[bytes]) -> None:
    identity = identity_of(child.pid)
    assert not is_stopped(identity)
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WNOWAIT)
    assert is_stopped(identity)
    assert not is_dead(identity)


def test_whose_state_and_generation_differ_is_the_same_process() -> None:
    assert same_process(own_identity(LIVE, 3), own_identity(DESTROYING, 4))
    assert not same_process(own_identity(), identity_of(os.getppid()))


def test_without_descriptors_nobody_counts_as_dead() -> None:
    program = """
import os, resource
from shmroute.shared.identity import DeathWatch, is_dead, own_identity
from shmroute.shared.words import LIVE, identity_start, pack_identity
former = pack_identity(LIVE, 0, identity_start(own_identity()) - 1, os.getpid())
assert is_dead(former)
watch = DeathWatch()
highest = max(int(fd) for fd in os.listdir("/proc/self/fd"))
resource.setrlimit(resource.RLIMIT_NOFILE, (3, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
try:
    open("/dev/null")
except OSError as error:
    print(error.errno)
print(is_dead(former))
watch.watch("a", former)
print(watch.dead())
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
watch.watch("a", former)
print(watch.dead() == [("a", former)])
"""
    assert run_python(program).stdout.split("\n")[:4] == ["24", "False", "[]", "True"]


def test_a_watch_tells_of_each_death_until_it_is_told_to_forget(child: subprocess.Popen[bytes]) -> None:
    watch: DeathWatch[str] = DeathWatch()
    identity = identity_of(child.pid)
    watch.watch("child", identity)
    watch.watch("me", own_identity())
    assert watch.dead() == []
    make_zombie(child)
    assert watch.dead() == [("child", identity)]
    assert watch.dead() == [("child", identity)]
    watch.forget("child")
    assert watch.dead() == []
    watch.close()


def test_a_watch_knows_who_was_dead_before_it_began(child: subprocess.Popen[bytes]) -> None:
    identity = identity_of(child.pid)
    child.kill()
    child.wait()
    watch: DeathWatch[int] = DeathWatch()
    watch.watch(1, identity)
    assert watch.dead() == [(1, identity)]
    watch.watch(1, own_identity())
    assert watch.dead() == []
    watch.close()


def test_a_watch_keeps_no_descriptor_open_once_closed() -> None:
    before = len(os.listdir("/proc/self/fd"))
    watch: DeathWatch[int] = DeathWatch()
    for key in range(5):
        watch.watch(key, own_identity())
        watch.watch(key, own_identity())
    assert len(os.listdir("/proc/self/fd")) == before + 5
    watch.close()
    assert len(os.listdir("/proc/self/fd")) == before
