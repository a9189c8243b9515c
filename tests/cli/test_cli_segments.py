"""`shmroute ls` and `shmroute destroy`, and the frame around all commands."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import uuid

import pytest
from cli_programs import companions

import shmroute
from shmroute.shared.identity import own_identity
from shmroute.shared.layout import HEADER_ABI, HEADER_STATE
from shmroute.shared.segment import SHM, segment_path
from shmroute.shared.words import DESTROYING


def listed(cli, name):
    """What `ls --json` says of a segment; others may be there."""
    result = cli("ls", "--json")
    assert result.exit_code == 0, result.stderr
    return next((one for one in json.loads(result.stdout)["segments"] if one["name"] == name), None)


# ------------------------------------------------------------------ ls


def test_a_segment_with_an_owner_and_no_pager(cli, segment, name):
    found = listed(cli, name)
    assert found["state"] == "no pager"
    assert (found["bytes"], found["slots"]) == (len(segment.buffer), 24)
    assert found["owner"] == {"pid": os.getpid(), "state": "alive"}
    line = next(line for line in cli("ls").stdout.splitlines() if line.startswith(name))
    assert "no pager" in line and str(os.getpid()) in line


def test_a_segment_that_is_being_destroyed(cli, segment, name):
    former = segment.read(HEADER_STATE)
    segment.write(HEADER_STATE, own_identity(DESTROYING))
    found = listed(cli, name)
    segment.write(HEADER_STATE, former)
    assert found["state"] == "closing"
    assert str(os.getpid()) in found["reason"]


def test_a_segment_whose_processes_died(cli, leftover, name):
    found = listed(cli, name)
    assert found["state"] == "abandoned"
    assert found["owner"]["state"] == "dead"
    assert cli("destroy", name).exit_code == 0, "nobody uses it, so nobody must be asked"


def test_a_file_that_is_no_segment(cli, foreign, name):
    found = listed(cli, name)
    assert found["state"] == "foreign"
    assert "magic" in found["reason"]


def test_a_segment_that_others_may_write(cli, segment, name):
    segment_path(name).chmod(0o666)
    found = listed(cli, name)
    assert found["state"] == "unreadable"
    assert found["reason"].startswith("SegmentPermissionError: ")


def test_orphans_are_listed_and_removed(cli, environment):
    path = SHM / f"shmroute-{uuid.uuid4().hex}.lock"
    path.touch(0o600)
    assert str(path) in json.loads(cli("ls", "--json").stdout)["orphans"]
    assert f"orphan: {path}" in cli("ls").stdout
    assert cli("destroy", "--orphans").exit_code == 0
    assert not path.exists()


# ------------------------------------------------------------------ destroy


def test_destroying_what_is_used_needs_force(cli, segment, name):
    refused = cli("destroy", name)
    assert refused.exit_code == 1
    assert f"in use by owner {os.getpid()}" in refused.stderr and "--force" in refused.stderr
    assert segment_path(name).exists()
    assert cli("destroy", name, "--force").exit_code == 0
    assert not segment_path(name).exists()
    assert companions(segment.uuid) == []


@pytest.mark.parametrize("answer, code", [(b"n\n", 1), (b"y\n", 0)])
def test_on_a_terminal_destroying_what_is_used_asks(environment, segment, name, answer, code):
    terminal, inside = pty.openpty()
    os.write(terminal, answer)
    command = [sys.executable, "-m", "shmroute", "destroy", name]
    done = subprocess.run(command, stdin=inside, capture_output=True, env=environment, check=False)
    os.close(terminal)
    os.close(inside)
    assert done.returncode == code, done.stderr
    assert b"Remove it nevertheless?" in done.stdout + done.stderr
    assert segment_path(name).exists() == (code != 0)


def test_a_segment_of_another_version_is_removed_by_force_only(cli, leftover, name):
    with segment_path(name).open("r+b") as file:
        file.seek(HEADER_ABI)
        file.write((999).to_bytes(8, "little"))
    assert companions(leftover), "a lock file and a semaphore go with it"
    refused = cli("destroy", name)
    assert refused.exit_code == 1
    assert "ABI version 999" in refused.stderr and "--force" in refused.stderr
    assert cli("destroy", name, "--force").exit_code == 0
    assert not segment_path(name).exists()
    assert companions(leftover) == []


def test_what_is_no_segment_is_never_removed(cli, foreign, name):
    result = cli("destroy", name, "--force")
    assert result.exit_code == 1
    assert result.stderr.startswith("shmroute: SegmentForeignError: ")
    assert foreign.exists()


def test_destroying_nothing(cli, name):
    assert cli("destroy", name).exit_code == 1
    assert cli("destroy").exit_code == 2
    assert cli("destroy", "a/b").exit_code == 2


# ------------------------------------------------------------------ all commands


def test_version_and_help(cli):
    assert cli("--version").stdout == f"shmroute {shmroute.__version__}\n"
    for command in ("pager", "stat", "ls", "destroy", "doctor"):
        text = cli(command, "--help").stdout
        assert f"Example: shmroute {command}" in text
    assert '"orphans": [path, …]' in cli("ls", "--help").stdout, "brackets are no markup here"
    assert cli("nonsense").exit_code == 2
    assert cli("stat").exit_code == 2


def test_a_reader_that_goes_away_is_no_error(environment):
    pipeline = f"{sys.executable} -m shmroute doctor --json | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", pipeline], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() in ("0", "1")
    assert done.stderr == ""


def test_the_module_runs_too(environment):
    done = subprocess.run(
        [sys.executable, "-m", "shmroute", "--version"], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("shmroute ")
