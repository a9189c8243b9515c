"""`shmroute pager`, as two terminals see it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys

from cli_programs import CHECKPOINT, companions

from shmroute.cli.pager import differences
from shmroute.config import AffinityConfig, RuntimeConfig
from shmroute.errors import CheckpointError
from shmroute.pager import process
from shmroute.shared.segment import attach_segment, segment_path


def stat(cli, name):
    result = cli("stat", name, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_serves_a_worker_and_removes_the_segment_at_sigterm(pager, worker, cli, name):
    first = pager("--io-threads", "3", "--bonus", "0.25", "--max-workers", "4", "--keep-page-cache")
    first.says("serving")
    assert f"created '{name}'" in first.messages
    client = worker()
    assert client.ask("2 5") == "leased 2 5"
    shot = stat(cli, name)
    assert shot["pager"] == {"pid": first.pid, "state": "alive"}
    assert shot["owner"] == shot["pager"]
    assert [(one["pid"], one["state"], one["leases"]) for one in shot["workers"]] == [(client.pid, "alive", 1)]
    assert shot["max_workers"] == 4
    assert [layer["bonus"] for layer in shot["layers"]] == [0.25] * 6
    assert client.leave() == 0
    assert first.stop() == 0
    assert "no worker was left; the segment was removed" in first.messages
    assert not segment_path(name).exists()
    assert companions(shot["uuid"]) == []


def test_serves_a_segment_of_another_rule_and_adopts_it_by_the_command_that_says_so(pager, name):
    options = ("--rule", "max-rank", "--top-j", "1", "--max-rank", "5", "--bonus", "1")
    first = pager(*options)
    first.says("serving")
    with contextlib.closing(attach_segment(name)) as segment:
        router = segment.config.router
        command = segment.config.pager_command(name)
    assert (router.rule, router.top_j, router.max_rank, router.cache_bonus) == ("max-rank", 1, 5, 1.0)
    assert "--rule max-rank --top-j 1 --max-rank 5" in command
    assert first.stop() == 0


def test_serves_on_after_sigterm_until_the_last_worker_leaves(pager, worker, name):
    only = pager()
    only.says("serving")
    client = worker()
    client.ask("0 0")
    only.process.send_signal(signal.SIGTERM)
    only.says("serving until they leave")
    assert client.ask("1 1") == "leased 1 1"
    client.leave()
    assert only.process.wait(60) == 0
    assert not segment_path(name).exists()


def test_a_second_pager_is_an_error_that_says_why(pager, name):
    first = pager()
    first.says("serving")
    second, other = pager(), pager("--io-threads", "5", budget="25%")
    assert (second.process.wait(60), other.process.wait(60)) == (1, 1)
    assert "PagerStartError" in second.messages and "--standby" in second.messages
    line = other.messages.strip().splitlines()[-1]
    assert line.startswith("shmroute: SegmentExistsError: ")
    for part in ("slots is 24 there, 12 wanted", "pager.io_threads is 2 there, 5 wanted", "shmroute destroy"):
        assert part in line
    assert first.process.poll() is None, "the first one must not notice"
    assert first.stop() == 0


def test_adopts_a_warm_cache_whose_pager_was_killed(pager, worker, cli, name):
    first = pager()
    first.says("serving")
    client = worker()
    client.ask("3 1")
    client.leave()
    first.kill()
    second = pager()
    second.says("serving")
    assert f"found '{name}'" in second.messages
    shot = stat(cli, name)
    assert shot["layers"][3]["resident"] >= 1
    assert shot["pager_counters"]["takeovers"] == 1
    assert second.stop() == 0


def test_replaces_an_abandoned_segment_of_other_settings(pager, cli, name):
    first = pager()
    first.says("serving")
    first.kill()
    second = pager(budget="25%")
    second.says("serving")
    assert "removed an abandoned segment" in second.messages
    assert stat(cli, name)["slots"] == 12
    assert second.stop() == 0


def test_a_standby_takes_over_from_a_killed_pager(pager, worker, cli, name):
    first = pager("--standby")  # nobody there: it creates the segment and serves
    first.says("serving")
    client = worker()
    client.ask("0 3")
    second = pager("--standby")
    second.says("standing by")
    assert stat(cli, name)["standby"] == {"pid": second.pid, "state": "alive"}
    first.kill()
    second.says("serving")
    assert client.ask("4 4") == "leased 4 4"
    shot = stat(cli, name)
    assert shot["pager"] == {"pid": second.pid, "state": "alive"}
    assert shot["owner"] == {"pid": first.pid, "state": "dead"}
    client.leave()
    assert second.stop() == 0
    assert not segment_path(name).exists()


def test_sigterm_hands_over_to_a_standby(pager, name):
    first = pager()
    first.says("serving")
    second = pager("--standby")
    second.says("standing by")
    assert first.stop() == 0
    assert "a standby takes over" in first.messages
    second.says("serving")
    assert second.stop(signal.SIGINT) == 0
    assert not segment_path(name).exists()


def test_a_standby_can_be_stopped(pager, cli, name):
    first = pager()
    first.says("serving")
    second = pager("--standby")
    second.says("standing by")
    assert second.stop() == 0
    assert stat(cli, name)["standby"]["state"] == "none"
    assert first.stop() == 0


def test_destroying_ends_pager_and_standby(pager, cli, name):
    first = pager()
    first.says("serving")
    second = pager("--standby")
    second.says("standing by")
    assert cli("destroy", name, "--force").exit_code == 0
    assert first.process.wait(60) == 0
    assert second.process.wait(60) == 0
    assert "the segment was destroyed" in first.messages


def test_a_checkpoint_that_vanishes_leaves_no_segment(cli, name, monkeypatch):
    """The segment is created before its pager opens the source: what goes wrong then must not leave it behind."""

    def refuse(config):
        raise CheckpointError("gone", "is not there")

    monkeypatch.setattr(process, "open_configured_source", refuse)
    result = cli("pager", str(CHECKPOINT), "--name", name, "--budget", "50%")
    assert result.exit_code == 1
    assert "CheckpointError" in result.stderr
    assert not segment_path(name).exists()


def test_a_pager_whose_terminal_went_away_serves_on(worker, environment, name):
    command = [sys.executable, "-m", "shmroute", "pager", str(CHECKPOINT), "--name", name, "--budget", "50%"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, env=environment) as alone:
        assert b"created" in alone.stderr.readline()
        alone.stderr.close()
        client = worker()
        assert client.ask("0 0") == "leased 0 0"
        alone.terminate()  # said to nobody: that a worker is still there
        assert client.ask("0 1") == "leased 0 1"
        client.leave()
        assert alone.wait(60) == 0
    assert not segment_path(name).exists()


def test_wrong_settings_have_exit_code_2(cli, name):
    for options in (
        ["--budget", "1B"],
        ["--budget", "50%", "--io-threads", "0"],
        ["--budget", "50%", "--bonus", "-1"],
        ["--budget", "50%", "--rule", "nonsense"],
        ["--budget", "50%", "--top-j", "1"],
        ["--budget", "50%", "--rule", "max-rank", "--max-rank", "9"],
    ):
        result = cli("pager", str(CHECKPOINT), "--name", name, *options)
        assert (result.exit_code, result.stderr.startswith("shmroute: ConfigError: ")) == (2, True)
    assert cli("pager", str(CHECKPOINT), "--name", "a/b", "--budget", "50%").exit_code == 2
    assert cli("pager", str(CHECKPOINT), "--name", name).exit_code == 2


def test_no_checkpoint_has_exit_code_1(cli, name, tmp_path):
    result = cli("pager", str(tmp_path), "--name", name, "--budget", "50%")
    assert result.exit_code == 1
    assert result.stderr.startswith("shmroute: CheckpointError: ")


def test_differences_are_told_field_by_field():
    there = RuntimeConfig(num_layers=2, num_experts=8, top_k=2, expert_bytes=64, slots=4, source_fingerprint="a")
    wanted = RuntimeConfig(
        num_layers=2,
        num_experts=8,
        top_k=1,
        expert_bytes=64,
        slots=4,
        affinity=AffinityConfig(decay=0.5),
        source_fingerprint="a",
    )
    assert differences(there, wanted) == "affinity.decay is 0.99 there, 0.5 wanted, top_k is 2 there, 1 wanted"


def test_adopts_the_segment_of_a_live_owner(pager, worker, cli, segment, name):
    only = pager()
    only.says("serving")
    assert f"found '{name}'" in only.messages
    client = worker()
    assert client.ask("5 7") == "leased 5 7"
    shot = stat(cli, name)
    assert (shot["owner"]["pid"], shot["pager"]["pid"]) == (os.getpid(), only.pid)
    client.leave()
    assert cli("destroy", name, "--force").exit_code == 0
    assert only.process.wait(60) == 0


def test_a_budget_under_one_tokens_cycle_is_warned_of(pager):
    small = pager(budget=str(11 * 196608))
    small.says("serving")
    assert "WARNING: 11 slots are fewer than one token's cycle of 6 layers × 2 experts = 12" in small.messages
    assert small.stop() == 0
