"""Control groups: found, made, limited, joined and removed; on made-up trees, and for real where that is permitted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shmroute.bench import memory_limit
from shmroute.bench.memory_limit import (
    PREFIX,
    ControlGroup,
    Hierarchy,
    MemoryLimitError,
    control_group,
    find_hierarchy,
)

NOBODY = 2**22 + 1
"""Larger than any pid."""

VERSION_1 = ("9:name=systemd:/\n4:cpu,memory:/jobs/mine\n0::/elsewhere\n", "cgroup", "rw,cpu,memory", "/")
VERSION_2 = ("0::/user.slice/mine\n", "cgroup2", "rw", "/")


@pytest.fixture
def proc(tmp_path: Path) -> Callable[..., Path]:
    """``proc(cgroup, kind, options, root)``: a ``/proc/self`` whose hierarchy is mounted at ``tmp_path / "top"``."""

    def make(cgroup: str, kind: str, options: str, root: str) -> Path:
        folder = tmp_path / "proc"
        folder.mkdir()
        (folder / "cgroup").write_text(cgroup)
        (folder / "mountinfo").write_text(
            "22 1 0:5 / /proc rw shared:2 - proc proc rw\n"
            "30 1 0:25 / /sys/fs/cgroup/cpuset rw - cgroup cgroup rw,cpuset\n"
            f"31 1 0:26 {root} {tmp_path / 'top'} rw,relatime shared:9 - {kind} {kind} {options}\n"
        )
        (tmp_path / "top").mkdir(exist_ok=True)
        (tmp_path / "top" / "cgroup.controllers").write_text("cpu memory pids")
        return folder

    return make


def test_the_first_version_is_found_by_its_controller(tmp_path: Path, proc: Callable[..., Path]) -> None:
    found = find_hierarchy(proc(*VERSION_1))
    assert found == Hierarchy(1, tmp_path / "top", tmp_path / "top/jobs/mine")


def test_the_second_version_is_found_where_it_has_the_controller(tmp_path: Path, proc: Callable[..., Path]) -> None:
    folder = proc(*VERSION_2)
    assert find_hierarchy(folder) == Hierarchy(2, tmp_path / "top", tmp_path / "top/user.slice/mine")
    (tmp_path / "top" / "cgroup.controllers").write_text("cpu pids")
    with pytest.raises(MemoryLimitError, match=r"no control group of memory is mounted.*systemd-run"):
        find_hierarchy(folder)


def test_a_mount_of_a_part_of_the_hierarchy(tmp_path: Path, proc: Callable[..., Path]) -> None:
    """As in a container: the process is where the mount begins."""
    folder = proc("0::/docker/abc\n", "cgroup2", "rw", "/docker/abc")
    assert find_hierarchy(folder).own == tmp_path / "top"


@pytest.fixture
def joined_by_anybody(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[list[str]]]:
    """In a made-up tree there is no kernel that a process could tell of itself. What was run."""
    ran: list[list[str]] = []

    def run(command: list[str], **rest: object) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(memory_limit.subprocess, "run", run)
    monkeypatch.setattr(memory_limit, "remove", lambda group: None)
    yield ran


def test_the_second_version_makes_groups_where_the_controller_is_on_for_children(
    tmp_path: Path, joined_by_anybody: list[list[str]]
) -> None:
    own = tmp_path / "slice" / "scope"
    own.mkdir(parents=True)
    for folder, controllers in ((tmp_path, "cpu memory"), (own.parent, "memory pids"), (own, "")):
        (folder / "cgroup.subtree_control").write_text(controllers)
    with control_group(5 << 20, Hierarchy(2, tmp_path, own)) as group:
        assert group.path.parent == own.parent
        assert (group.path / "memory.max").read_text() == str(5 << 20)
        assert not (group.path / "memory.swap.max").exists()  # this kernel does not count swap
        assert [command[:2] for command in joined_by_anybody] == [["sh", "-c"]]
        assert str(group.path / "cgroup.procs") in joined_by_anybody[0]


def test_groups_are_not_made_above_the_mount(tmp_path: Path) -> None:
    (tmp_path / "cgroup.subtree_control").write_text("memory")
    top = tmp_path / "top"
    (top / "own").mkdir(parents=True)
    with (
        pytest.raises(MemoryLimitError, match="controller is on for no group"),
        control_group(None, Hierarchy(2, top, top / "own")),
    ):
        pytest.fail("it was made")


def test_a_folder_that_is_not_writable_is_refused_with_what_would_permit_it(tmp_path: Path) -> None:
    with (
        pytest.raises(MemoryLimitError, match=r"can be made: .*No such file.*run this as root"),
        control_group(None, Hierarchy(1, tmp_path, tmp_path / "absent")),
    ):
        pytest.fail("it was made")


def test_a_group_that_nobody_can_join_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    removed = []
    monkeypatch.setattr(memory_limit, "remove", removed.append)
    monkeypatch.setattr(
        memory_limit.subprocess, "run",
        lambda command, **rest: subprocess.CompletedProcess(command, 2, "", "sh: Permission denied\n"),
    )  # fmt: skip
    with (
        pytest.raises(MemoryLimitError, match=r"no process can be moved to .*Permission denied.*systemd-run"),
        control_group(None, Hierarchy(1, tmp_path, tmp_path)),
    ):
        pytest.fail("it was made")
    assert len(removed) == 1


def test_orphans_are_removed_and_others_groups_are_not(tmp_path: Path, joined_by_anybody: list[list[str]]) -> None:
    dead, alive = tmp_path / f"{PREFIX}{NOBODY}-0", tmp_path / f"{PREFIX}{os.getppid()}-0"
    dead.mkdir()
    alive.mkdir()
    with control_group(None, Hierarchy(1, tmp_path, tmp_path)):
        assert alive.exists()
        assert not dead.exists()


@pytest.mark.parametrize(
    ("version", "files", "peak"),
    [
        (1, {"memory.usage_in_bytes": "7\n", "memory.max_usage_in_bytes": "9\n",
             "memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"}, 9),
        (2, {"memory.current": "7\n", "memory.peak": "9\n", "memory.events": "low 0\noom 3\noom_kill 2\n"}, 9),
        (2, {"memory.current": "7\n", "memory.events": "low 0\noom 3\noom_kill 2\n"}, None),
    ],
)  # fmt: skip
def test_what_is_charged(tmp_path: Path, version: int, files: dict[str, str], peak: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    charge = ControlGroup(tmp_path, version).charge()
    assert (charge.used, charge.peak, charge.kills) == (7, peak, 2)


@pytest.fixture
def limited() -> Iterator[ControlGroup]:
    """A real group of 64 MiB."""
    try:
        with control_group(64 << 20) as group:
            yield group
    except MemoryLimitError as error:
        pytest.skip(f"no memory can be limited here: {error}")
    assert not group.path.exists()


def test_a_program_is_in_its_group_from_its_first_instruction_on(limited: ControlGroup) -> None:
    code = "print(open('/proc/self/cgroup').read())"
    done = subprocess.run(limited.command([sys.executable, "-c", code]), capture_output=True, text=True, check=True)
    assert re.search(rf"memory.*/{limited.path.name}$|^0::.*/{limited.path.name}$", done.stdout, re.MULTILINE)


def test_who_exceeds_the_limit_is_killed_and_that_is_counted(limited: ControlGroup) -> None:
    assert limited.charge().kills == 0
    code = "bytearray(b'1') * (16 << 20)"
    assert subprocess.run(limited.command([sys.executable, "-c", code]), check=False).returncode == 0
    peak = limited.charge().peak
    assert peak is None or peak > 16 << 20
    code = "bytearray(b'1') * (256 << 20)"
    assert subprocess.run(limited.command([sys.executable, "-c", code]), check=False).returncode == -9
    assert limited.charge().kills == 1


def test_who_is_left_in_a_group_is_killed_with_it(limited: ControlGroup) -> None:
    """The fixture sees that the group is gone."""
    process = subprocess.Popen(limited.command(["sh", "-c", "echo in; exec sleep 600"]), stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout:
        process.stdout.readline()
    assert process.pid in limited.pids()
    memory_limit.remove(limited)
    assert process.wait() == -9
