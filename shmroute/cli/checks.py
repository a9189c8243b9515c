"""What `shmroute doctor` checks of the machine. Each check is a function that looks at one thing and says how it is."""

from __future__ import annotations

import configparser
import contextlib
import os
import platform
import pwd
import resource
import sys
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import posix_ipc

from shmroute.cli.output import human_bytes
from shmroute.shared.segment import SHM, pid_namespace

OK = "ok"
WARNING = "warning"
PROBLEM = "problem"

MIN_PYTHON = (3, 11)
SMALL_SHM = 1 << 28
"""Containers give 64 MiB unless told otherwise; below this size no useful budget fits."""

MIN_DESCRIPTORS = 256
"""A pager holds one for each worker and each file of the checkpoint, and some more."""

SYSTEM_UID_MAX = 999
"""systemd's default boundary: IPC objects of users up to here are never removed."""


@dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes
    ----------
    name : str
    status : str
        ``ok``, ``warning`` or ``problem``.
    detail : str
    remedy : str
        What to do; empty when there is nothing to do.
    """

    name: str
    status: str
    detail: str
    remedy: str = ""


# ------------------------------------------------------------------ system


def check_system() -> Check:
    """Linux and Python's version."""
    detail = f"{platform.system()} {platform.release()} {platform.machine()}, Python {platform.python_version()}"
    if not sys.platform.startswith("linux"):
        return Check("system", PROBLEM, detail, "run on Linux: pidfds, O_TMPFILE and /dev/shm are needed")
    if sys.version_info < MIN_PYTHON:
        return Check("system", PROBLEM, detail, "use Python 3.11 or newer")
    return Check("system", OK, detail)


def check_cpu() -> Check:
    """CPU features; nothing depends on them but speed."""
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve")
    flags: set[str] = set()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                flags = set(value.split())
                break
    found = [flag for flag in wanted if flag in flags]
    return Check("cpu", OK, f"{os.cpu_count()} CPUs, {', '.join(found) or 'no vector extensions known here'}")


def check_descriptors() -> Check:
    """RLIMIT_NOFILE."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    detail = f"RLIMIT_NOFILE is {soft} (hard {hard})"
    if soft != resource.RLIM_INFINITY and soft < MIN_DESCRIPTORS:
        return Check("descriptors", WARNING, detail, f"raise it: ulimit -n {MIN_DESCRIPTORS} or more")
    return Check("descriptors", OK, detail)


def check_pid_namespace() -> Check:
    """The pid namespace, in which all processes of a runtime must be."""
    detail = f"inode {pid_namespace()}"
    try:
        status = Path("/proc/self/status").read_text()
        levels = next((line.split()[1:] for line in status.splitlines() if line.startswith("NSpid:")), [])
    except OSError:
        levels = []
    nested = len(levels) > 1 or Path("/.dockerenv").exists() or Path("/run/.containerenv").exists()
    if nested:
        detail += "; a container's: workers in other containers need the same one (--pid) and the same /dev/shm (--ipc)"
    return Check("pid namespace", OK, detail)


def check_pidfd() -> Check:
    """Whether pidfds can be opened."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except (AttributeError, OSError) as error:
        return Check("pidfd_open", PROBLEM, str(error), "Linux 5.3 or newer is needed; a seccomp filter may forbid it")
    return Check("pidfd_open", OK, "works")


# ------------------------------------------------------------------ /dev/shm


def _mount_of_shm() -> tuple[str, set[str]]:
    """Type and options of the file system at ``/dev/shm``; an empty type if nothing is mounted there."""
    found: tuple[str, set[str]] = ("", set())
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        fields, (kind, _, superblock) = left.split(), right.split(maxsplit=2)
        if fields[4] == str(SHM):
            found = (kind, {*fields[5].split(","), *superblock.split(",")})  # a later mount hides an earlier one
    return found


def check_shm() -> Check:
    """Whether ``/dev/shm`` is a writable tmpfs, and how much fits."""
    try:
        kind, options = _mount_of_shm()
        statistics = os.statvfs(SHM)
    except OSError as error:
        return Check(str(SHM), PROBLEM, str(error), f"mount one: mount -t tmpfs -o mode=1777 tmpfs {SHM}")
    size, free = statistics.f_blocks * statistics.f_frsize, statistics.f_bavail * statistics.f_frsize
    detail = f"{kind or 'no file system of its own'}, {human_bytes(size)}, {human_bytes(free)} free"
    if kind != "tmpfs":
        return Check(str(SHM), PROBLEM, detail, f"mount a tmpfs: mount -t tmpfs -o mode=1777 tmpfs {SHM}")
    if "ro" in options or not os.access(SHM, os.W_OK | os.X_OK):
        return Check(str(SHM), PROBLEM, f"{detail}, not writable", f"mount -o remount,rw,mode=1777 {SHM}")
    if size < SMALL_SHM:
        remedy = f"mount -o remount,size=… {SHM}, or in a container --shm-size=…"
        return Check(str(SHM), WARNING, f"{detail}: too small for most budgets", remedy)
    return Check(str(SHM), OK, detail)


def check_publishing() -> Check:
    """Whether a file can be made without a name, reserved, and then named: how a segment is created."""
    name = f".shmroute-doctor-{uuid.uuid4().hex}"
    step = "open"
    directory = fd = -1
    try:
        directory = os.open(SHM, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        step = "O_TMPFILE"
        fd = os.open(SHM, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        step = "posix_fallocate"
        os.posix_fallocate(fd, 0, 4096)
        step = "linkat"
        os.link(f"/proc/self/fd/{fd}", SHM / name, src_dir_fd=directory, follow_symlinks=True)
        (SHM / name).unlink()
    except OSError as error:
        remedy = {
            "posix_fallocate": f"{SHM} is full: remove leftovers (shmroute ls), or make it larger",
            "linkat": "mount /proc: the file is named through it",
        }.get(step, f"{SHM} must be a tmpfs of Linux 3.11 or newer")
        return Check("creating", PROBLEM, f"{step} in {SHM}: {error}", remedy)
    finally:
        for descriptor in (fd, directory):
            if descriptor >= 0:
                os.close(descriptor)
    return Check("creating", OK, "O_TMPFILE, posix_fallocate and linkat work")


def check_semaphores() -> Check:
    """Whether POSIX semaphores work."""
    name = f"/shmroute-doctor-{uuid.uuid4().hex}"
    try:
        semaphore = posix_ipc.Semaphore(name, posix_ipc.O_CREX, mode=0o600)
        semaphore.unlink()
        semaphore.release()
        semaphore.acquire(0)
        semaphore.close()
    except (OSError, posix_ipc.Error) as error:
        return Check("semaphores", PROBLEM, str(error), f"POSIX semaphores live in {SHM}: see its check")
    return Check("semaphores", OK, "POSIX semaphores work")


# ------------------------------------------------------------------ systemd


def logind_files(root: Path = Path("/")) -> list[Path]:
    """The files that set up systemd-logind, in the order in which later ones win."""
    main = [root / where / "systemd/logind.conf" for where in ("etc", "run", "usr/local/lib", "usr/lib")]
    files = [path for path in main if path.is_file()][:1]
    drop_ins: dict[str, Path] = {}
    for where in ("usr/lib", "usr/local/lib", "run", "etc"):  # of one name, that of the last directory counts
        for path in (root / where / "systemd/logind.conf.d").glob("*.conf"):
            drop_ins[path.name] = path
    return files + [drop_ins[name] for name in sorted(drop_ins)]


def _remove_ipc_of(path: Path) -> str | None:
    """RemoveIPC as one file sets it, None if it does not."""
    parser = configparser.ConfigParser(strict=False, interpolation=None, allow_no_value=True)
    with contextlib.suppress(OSError, UnicodeDecodeError, configparser.Error):
        parser.read_string(path.read_text())
        return parser.get("Login", "RemoveIPC", fallback=None)
    return None


def removes_ipc(root: Path = Path("/")) -> tuple[bool, str]:
    """Whether logind removes a user's shared memory at logout, and the file that says so (``default`` if none does)."""
    removes, where = True, "default"
    for path in logind_files(root):
        value = _remove_ipc_of(path)
        if value is not None:
            removes, where = value.strip().lower() not in ("no", "false", "0", "off", "n", "f"), str(path)
    return removes, where


def check_remove_ipc(root: Path = Path("/"), uid: int | None = None) -> Check:
    """Whether systemd would remove the segments at logout."""
    uid = os.geteuid() if uid is None else uid
    if not (root / "run/systemd/system").is_dir():
        return Check("RemoveIPC", OK, "not systemd: nothing removes shared memory at logout")
    removes, where = removes_ipc(root)
    if not removes:
        return Check("RemoveIPC", OK, f"off ({where})")
    if uid <= SYSTEM_UID_MAX:
        return Check("RemoveIPC", OK, f"on ({where}), but not for system users such as {uid}")
    with contextlib.suppress(KeyError):
        if (root / "var/lib/systemd/linger" / pwd.getpwuid(uid).pw_name).exists():
            return Check("RemoveIPC", OK, f"on ({where}), but user {uid} lingers")
    return Check(
        "RemoveIPC",
        WARNING,
        f"on ({where}): all segments of user {uid} are removed when the last session ends, in use or not",
        "set RemoveIPC=no in /etc/systemd/logind.conf.d/shmroute.conf under [Login], run loginctl enable-linger, or "
        "run as a system user",
    )


MACHINE: tuple[Callable[[], Check], ...] = (
    check_system,
    check_cpu,
    check_shm,
    check_publishing,
    check_semaphores,
    check_pidfd,
    check_pid_namespace,
    check_descriptors,
    check_remove_ipc,
)
