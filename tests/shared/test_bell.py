"""Bells: who is woken, and who is left in peace."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from runtimes import unique_name

from shmroute.shared.atomic import load
from shmroute.shared.bell import Semaphore, arm, disarm, heard, listen, mark, ring, unlink_semaphore
from shmroute.shared.words import ARMED, AWAKE, HUNGRY, RUNG, bell_epoch, bell_state


@pytest.fixture
def bell(memory: Callable[[int], int]) -> int:
    """A bell that never rang."""
    return memory(8)


@pytest.fixture
def semaphore() -> Iterator[Semaphore]:
    """A named semaphore, removed at the end."""
    made = Semaphore(unique_name())
    yield made
    made.close()
    unlink_semaphore(made.name)


def test_nobody_rings_for_one_who_is_awake(bell: int) -> None:
    assert listen(bell, 0) == 0
    arm(bell, 0)
    disarm(bell)
    assert bell_state(load(bell)) == AWAKE
    assert listen(bell, 0) == 0


def test_a_sleeper_is_heard_until_somebody_has_rung(bell: int) -> None:
    arm(bell, 0)
    word = listen(bell, 0)
    assert word == heard(bell, 0) == load(bell)
    assert bell_state(word) == ARMED
    mark(bell, word)
    assert bell_state(load(bell)) == RUNG
    assert listen(bell, 0) == 0


def test_each_sleep_is_an_epoch_of_its_own(bell: int) -> None:
    for epoch in range(1, 4):
        arm(bell, 0)
        assert bell_epoch(load(bell)) == epoch
        disarm(bell)
        assert bell_epoch(load(bell)) == epoch


def test_a_late_mark_does_not_silence_the_next_sleep(bell: int) -> None:
    arm(bell, 0)
    late = listen(bell, 0)
    disarm(bell)
    arm(bell, 0)
    mark(bell, late)
    assert listen(bell, 0) != 0


def test_a_late_mark_does_not_reach_one_who_is_awake(bell: int) -> None:
    arm(bell, 0)
    late = listen(bell, 0)
    disarm(bell)
    mark(bell, late)
    assert bell_state(load(bell)) == AWAKE


@pytest.mark.parametrize(("hungry", "rings"), [(0, False), (HUNGRY, True)])
def test_a_freed_slot_rings_only_for_the_hungry(bell: int, hungry: int, rings: bool) -> None:
    arm(bell, hungry)
    assert bool(listen(bell, HUNGRY)) == rings
    assert listen(bell, 0) != 0


def test_a_mark_keeps_the_hunger(bell: int) -> None:
    arm(bell, HUNGRY)
    mark(bell, listen(bell, 0))
    assert load(bell) & HUNGRY
    assert bell_state(load(bell)) == RUNG


def test_hunger_ends_with_the_sleep(bell: int) -> None:
    arm(bell, HUNGRY)
    disarm(bell)
    assert not load(bell) & HUNGRY
    arm(bell, 0)
    assert listen(bell, HUNGRY) == 0


def test_ringing_posts_once_a_sleep(bell: int, semaphore: Semaphore) -> None:
    assert not ring(bell, semaphore)
    arm(bell, 0)
    assert ring(bell, semaphore)
    assert not ring(bell, semaphore)
    assert semaphore.sleep(10)
    assert not semaphore.sleep(0.01)


def test_a_post_before_the_sleep_keeps_from_sleeping(semaphore: Semaphore) -> None:
    semaphore.post()
    assert semaphore.sleep(10)


def test_draining_forgets_all_posts(semaphore: Semaphore) -> None:
    for _ in range(3):
        semaphore.post()
    semaphore.drain()
    assert not semaphore.sleep(0.01)


def test_a_sleep_of_no_length_takes_no_post(semaphore: Semaphore) -> None:
    assert not semaphore.sleep(0)


def test_a_signal_does_not_end_a_sleep(semaphore: Semaphore) -> None:
    caught: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: caught.append(number))
    try:
        main = threading.main_thread().ident
        assert main is not None
        threading.Timer(0.05, signal.pthread_kill, (main, signal.SIGUSR1)).start()
        threading.Timer(0.3, semaphore.post).start()
        assert semaphore.sleep(30)
        assert caught == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_semaphores_are_for_this_user_only_and_go_when_unlinked() -> None:
    semaphore = Semaphore(unique_name())
    file = Path(f"/dev/shm/sem.{semaphore.name}")
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.stat().st_uid == os.geteuid()
    semaphore.close()
    unlink_semaphore(semaphore.name)
    assert not file.exists()
    unlink_semaphore(semaphore.name)
