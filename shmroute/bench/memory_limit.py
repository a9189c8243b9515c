"""Control groups: a limit of memory for some processes together, and what the kernel charged to them.

Anonymous memory, page cache and shared memory all count, and count for the group of the process that touched a page
first. So a process has to be in the group before it allocates anything: `ControlGroup.command` has a shell write its
own pid into the group and then become the program.

The controller's first version (a hierarchy of its own) and the second (the unified hierarchy) are both used. Which
permits what:

- version 1: a group is made below one's own, for which that folder has to be writable: root's, as a rule.
- version 2: a group can be made where the controller is on for children (``cgroup.subtree_control``), in one's own
  group or above it, and a process can be moved to it only by who may write to what both have in common. That is so for
  root, and for anybody within ``systemd-run --user --scope``.

A group is removed at the end of its block, after whatever is left in it was killed. Groups of processes that are no
longer there (they were killed) are removed by the next who makes one.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from shmroute.errors import ShmrouteError

PROC = Path("/proc/self")
PREFIX = "shmroute-bench-"
REMEDY = "run this as root or, on a system with systemd, within: systemd-run --user --scope"
PATIENCE = 10.0
"""Seconds within which killed processes are gone."""

_numbers = itertools.count()


class MemoryLimitError(ShmrouteError):
    """Memory cannot be limited here; the message says what would permit it."""


@dataclass(frozen=True)
class Hierarchy:
    """Where the memory controller is, and this process in it.

    Attributes
    ----------
    version : int
        1 or 2.
    top, own : Path
        The mounted hierarchy, and this process's group.
    """

    version: int
    top: Path
    own: Path


@dataclass(frozen=True)
class MemoryCharge:
    """What is charged to a group, in bytes.

    Attributes
    ----------
    used : int
        Now.
    peak : int or None
        The most at any time; None if the kernel does not tell (version 2 before Linux 5.19).
    kills : int
        Processes that were killed because the limit was reached.
    """

    used: int
    peak: int | None
    kills: int


@dataclass(frozen=True)
class ControlGroup:
    """A group that exists.

    Attributes
    ----------
    path : Path
    version : int
    """

    path: Path
    version: int

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The command that runs a program in the group from its first instruction on."""
        return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.path / "cgroup.procs"), *arguments]

    def pids(self) -> list[int]:
        """Who is in it."""
        return [int(pid) for pid in (self.path / "cgroup.procs").read_text().split()]

    def charge(self) -> MemoryCharge:
        """What is charged to it."""
        names = {
            1: ("memory.usage_in_bytes", "memory.max_usage_in_bytes", "memory.oom_control"),
            2: ("memory.current", "memory.peak", "memory.events"),
        }
        used, peak, events = (self.path / name for name in names[self.version])
        kills = re.search(r"^oom_kill (\d+)$", events.read_text(), re.MULTILINE)
        return MemoryCharge(
            int(used.read_text()), int(peak.read_text()) if peak.exists() else None, int(kills[1]) if kills else 0
        )


def find_hierarchy(proc: Path = PROC) -> Hierarchy:
    """Find the memory controller by ``mountinfo`` and ``cgroup`` of `proc`.

    Raises
    ------
    MemoryLimitError
        If there is none.
    """
    own = {}
    for line in (proc / "cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        own[controllers] = path
    for version, kind in ((1, "cgroup"), (2, "cgroup2")):
        for line in (proc / "mountinfo").read_text().splitlines():
            mount, _, system = line.partition(" - ")
            root, top = mount.split()[3:5]
            name, _, options = system.split()[:3]
            if name != kind or (version == 1 and "memory" not in options.split(",")):
                continue
            if version == 2 and "memory" not in _words(Path(top) / "cgroup.controllers"):
                continue
            path = next(path for names, path in own.items() if version == 2 or "memory" in names.split(","))
            return Hierarchy(version, Path(top), Path(os.path.normpath(f"{top}/{os.path.relpath(path, root)}")))
    raise MemoryLimitError(f"no control group of memory is mounted here, so no memory can be limited; {REMEDY}")


@contextmanager
def control_group(limit: int | None = None, hierarchy: Hierarchy | None = None) -> Iterator[ControlGroup]:
    """Make a group, and remove it afterwards with all who are still in it.

    Parameters
    ----------
    limit : int, optional
        Bytes that its processes may use together, without swap. By default memory is counted only.
    hierarchy : Hierarchy, optional
        By default where this process is.

    Raises
    ------
    MemoryLimitError
        If it cannot be made, limited or joined by this user's processes.
    """
    hierarchy = hierarchy or find_hierarchy()
    group = _make(hierarchy)
    try:
        if limit is not None:
            _set_limit(group, limit)
        joined = subprocess.run(group.command(["true"]), capture_output=True, text=True, check=False)
        if joined.returncode:
            raise MemoryLimitError(f"no process can be moved to {group.path} ({joined.stderr.strip()}); {REMEDY}")
        yield group
    finally:
        remove(group)


def _make(hierarchy: Hierarchy) -> ControlGroup:
    candidates = [hierarchy.own]
    if hierarchy.version == 2:
        above = [hierarchy.own, *hierarchy.own.parents]
        candidates = [
            path
            for path in above
            if path.is_relative_to(hierarchy.top) and "memory" in _words(path / "cgroup.subtree_control")
        ]
    problem = "the memory controller is on for no group from this process's upwards"
    for candidate in candidates:
        _remove_orphans(candidate)
        path = candidate / f"{PREFIX}{os.getpid()}-{next(_numbers)}"
        try:
            path.mkdir()
        except OSError as error:
            problem = f"{error}"
            continue
        return ControlGroup(path, hierarchy.version)
    raise MemoryLimitError(f"no control group of memory can be made: {problem}; {REMEDY}")


def _set_limit(group: ControlGroup, limit: int) -> None:
    # The first version limits memory and swap together, once memory by itself is limited.
    settings = {
        1: (("memory.limit_in_bytes", limit), ("memory.memsw.limit_in_bytes", limit)),
        2: (("memory.max", limit), ("memory.swap.max", 0)),
    }
    for name, value in settings[group.version]:
        file = group.path / name
        if "sw" in name and not file.exists():  # a kernel that does not count swap has none of these
            continue
        try:
            file.write_text(str(value))
        except OSError as error:
            raise MemoryLimitError(f"{file} cannot be set to {value:,}: {error.strerror}; {REMEDY}") from error


def remove(group: ControlGroup) -> None:
    """Kill who is in a group, and remove it.

    Raises
    ------
    OSError
        If somebody stays in it.
    """
    until = time.monotonic() + PATIENCE
    while group.path.exists():
        with contextlib.suppress(FileNotFoundError):  # in between
            for pid in group.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        try:
            group.path.rmdir()
        except OSError:
            if time.monotonic() > until:
                raise
            time.sleep(0.01)


def _remove_orphans(folder: Path) -> None:
    """Remove the groups whose makers are no longer there, as far as nobody is in them."""
    for path in folder.glob(f"{PREFIX}*-*"):
        maker = path.name.removeprefix(PREFIX).split("-")[0]
        if maker.isdigit() and not Path(f"/proc/{maker}").exists():
            with contextlib.suppress(OSError):
                path.rmdir()


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []
