"""Workers that die, fail and are replaced, and what becomes of the jobs that they were at."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path

import pytest

from shmroute.errors import ServingError
from shmroute.serving import crew as crew_module
from shmroute.serving.completion import Completion
from shmroute.serving.crew import Crew
from shmroute.serving.messages import Job
from shmroute.serving.protocol import ApiError

PROGRAM = Path(__file__).with_name("worker_program.py")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(crew_module, "FIRST_PAUSE", 0.01)


class Stage:
    """A crew of fake workers, and what it told."""

    def __init__(self, folder, count):
        self.folder, self.told = folder, []
        self.crew = Crew([sys.executable, str(PROGRAM), str(folder)], count, 1, self.told.append)

    def ask(self, *prompts, **fields):
        return Completion(self.crew, [Job(number=0, prompt=prompt, **fields) for prompt in prompts], 1)

    async def text(self, prompt, **fields):
        completion = self.ask(prompt, **fields)
        async for _ in completion.progress():
            pass
        return completion.choices[0].text

    def workers_of(self, number):
        return {name.name.split("-")[-1] for name in self.folder.glob(f"job-{number}-of-*")}


def run(folder, test, count=2):
    async def play():
        stage = Stage(folder, count)
        async with stage.crew.at_work():
            await stage.crew.started(lambda ready: None)
            await test(stage)

    asyncio.run(asyncio.wait_for(play(), 60))


def upto(count):
    return "".join(f"{token}," for token in range(count))


def test_jobs_are_spread_over_workers(tmp_path):
    async def test(stage):
        completion = stage.ask("5 wait 2", "5", "3 wait 1")
        async for progress in completion.progress():
            if progress.index == 1 and progress.finish_reason:
                break
        completion.cancel()
        assert completion.choices[1].text == upto(5)
        assert stage.workers_of(1) != stage.workers_of(2)

    run(tmp_path, test)


@pytest.mark.parametrize("command", ["die", "retry"])
def test_another_worker_continues_after_the_tokens_that_were_given(tmp_path, command):
    async def test(stage):
        assert await stage.text(f"9 {command} 4 1", echo=True) == f"9 {command} 4 1" + upto(9)
        assert stage.crew.counters.retries == 1
        assert stage.crew.counters.deaths == (command == "die")
        assert len(stage.workers_of(1)) == 2

    run(tmp_path, test)


@pytest.mark.parametrize(("command", "status"), [("die", 500), ("retry", 503)])
def test_a_job_is_retried_once(tmp_path, command, status):
    async def test(stage):
        with pytest.raises(ApiError) as caught:
            await stage.text(f"9 {command} 4 2")
        assert caught.value.status == status
        assert stage.crew.counters.retries == 1
        assert await stage.text("4") == upto(4)  # the crew is as good as before

    run(tmp_path, test)


def test_a_death_costs_other_jobs_nothing(tmp_path):
    async def test(stage):
        other = stage.ask("6 wait 4")
        with pytest.raises(ApiError):
            await stage.text("6 die 3 2")
        pieces = [progress.text async for progress in until(other, "3,")]
        assert "".join(pieces) == upto(4)
        other.cancel()

    run(tmp_path, test, count=3)


async def until(completion, text):
    """Progress up to that which has this text."""
    async for progress in completion.progress():
        yield progress
        if progress.text == text:
            return


def test_what_is_refused_or_failed_for_good_is_not_retried(tmp_path):
    async def test(stage):
        for prompt, status in (("4 refuse 0", 400), ("4 fail 2", 500)):
            with pytest.raises(ApiError) as caught:
                await stage.text(prompt)
            assert caught.value.status == status
        assert stage.crew.counters.retries == 0
        assert stage.crew.counters.deaths == 0

    run(tmp_path, test)


def test_a_cancelled_job_frees_its_worker(tmp_path):
    async def test(stage):
        completion = stage.ask("5 wait 2")
        async for _ in until(completion, "1,"):
            pass
        completion.cancel()
        assert await stage.text("3") == upto(3)

    run(tmp_path, test, count=1)


def test_a_cancelled_job_that_waits_is_never_begun(tmp_path):
    async def test(stage):
        first, second = stage.ask("5 wait 2"), stage.ask("5")
        assert stage.crew.waiting == 1
        second.cancel()
        assert stage.crew.waiting == 0
        first.cancel()
        assert await stage.text("3") == upto(3)
        assert stage.workers_of(2) == set()

    run(tmp_path, test, count=1)


def test_an_idle_worker_that_dies_is_replaced(tmp_path):
    async def test(stage):
        assert await stage.text("3") == upto(3)
        (pid,) = stage.workers_of(1)
        os.kill(int(pid), signal.SIGKILL)
        assert await stage.text("4") == upto(4)
        assert stage.workers_of(2) != {pid}
        assert any("SIGKILL" in line for line in stage.told)

    run(tmp_path, test, count=1)


def test_what_no_worker_can_load_is_told_at_once(tmp_path):
    (tmp_path / "unable").touch()
    with pytest.raises(ServingError, match="wanted to be unable"):
        run(tmp_path, lambda stage: pytest.fail("it started"))


def test_workers_that_never_come_up_end_the_start(tmp_path):
    (tmp_path / "crash").touch()
    with pytest.raises(ServingError, match="no worker came up"):
        run(tmp_path, lambda stage: pytest.fail("it started"))


def test_the_pause_grows_while_workers_die_before_they_did_anything(tmp_path):
    (tmp_path / "crash").touch()

    async def play():
        stage = Stage(tmp_path, 1)
        async with stage.crew.at_work():
            while len(stage.told) < 5:
                await asyncio.sleep(0.01)
        assert [line.rsplit(maxsplit=2)[1] for line in stage.told[:5]] == ["0.01", "0.02", "0.04", "0.08", "0.16"]
        assert "exit code 3" in stage.told[0]

    asyncio.run(asyncio.wait_for(play(), 60))


def test_workers_end_with_the_server(tmp_path):
    pids = set()

    async def test(stage):
        await stage.text("3")
        pids.update(int(pid) for pid in stage.workers_of(1))

    run(tmp_path, test, count=1)
    (pid,) = pids
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
