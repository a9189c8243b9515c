"""The operating system that simulated processes see.

The runtime's Python runs as it is; what it asks of the system goes to stand-ins for the modules that it imported:

- `time`: the simulation's clock; sleeping lets others go on;
- `threading`, `queue`: threads of the simulated process, locks that switch;
- `posix_ipc`: semaphores, by name; `fcntl`: record locks, which go with the process that took them, and with *any*
  descriptor of the file that it closes;
- `os`, `select`, and what ``/proc`` says: who is who, and who has died. Files are real ones, in a folder of their own
  in ``/dev/shm``; opening, linking and unlinking them are switch points;
- `signal`: handlers of the simulated process, run in its first thread at its next step.

Every visible effect is announced by `Simulation.point` first. Module globals of which each process has one of its own
(`PER_PROCESS`) become one for each simulated process.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import io
import os
import pathlib
import queue
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import posix_ipc

import shmroute.attachment
import shmroute.lifecycle
import shmroute.pager.prefetch.usage
import shmroute.pager.process
import shmroute.pager_lock
import shmroute.runtime
import shmroute.shared.experts
import shmroute.shared.identity
import shmroute.shared.segment

from .simulation import Discarded, SimProcess, SimThread, Simulation

PIDFD_FROM = 1 << 30
"""Descriptors from here on are pidfds of simulated processes: this much above the pid."""

CLOCK_BEGINS = 1000.0

_folder = pathlib.Path(tempfile.mkdtemp(prefix="shmroute-interleaving-", dir="/dev/shm"))
atexit.register(shutil.rmtree, _folder, ignore_errors=True)


class StandIn:
    """A module, with some of its names replaced."""

    def __init__(self, real: ModuleType, **replaced: Any) -> None:
        self._real = real
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


class PerProcess:
    """A module global of which each simulated process has its own."""

    def __init__(self, host: Host, make: Callable[[], Any]) -> None:
        self._host, self._make = host, make

    def _own(self) -> Any:
        held = self._host.here().locals
        if self not in held:
            held[self] = self._make()
        return held[self]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own(), name)

    def __enter__(self) -> Any:
        return self._own().__enter__()

    def __exit__(self, *exception: Any) -> Any:
        return self._own().__exit__(*exception)

    def __contains__(self, key: Any) -> bool:
        return key in self._own()

    def __getitem__(self, key: Any) -> Any:
        return self._own()[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._own()[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._own()[key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._own())


# ------------------------------------------------------------------ threads


class Lock:
    """A lock of threads of one process; re-entrant if `reentrant`."""

    def __init__(self, host: Host, reentrant: bool) -> None:
        self._host, self._reentrant = host, reentrant
        self._owner: SimThread | None = None
        self._count = 0

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        simulation, thread = self._host.simulation, self._host.simulation.current
        if thread is None:
            return True
        if self._reentrant and self._owner is thread:
            self._count += 1
            return True
        if len(thread.process.threads) > 1:
            simulation.point()
        if self._owner is not None:
            if not blocking or timeout == 0:
                return False
            if not simulation.wait(lambda: self._owner is None, None if timeout < 0 else timeout):
                return False
        self._owner, self._count = thread, 1
        return True

    def release(self) -> None:
        if self._host.simulation.current is None:
            return
        self._count -= 1
        if self._count == 0:
            self._owner = None

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *exception: Any) -> None:
        self.release()


class Condition:
    """A condition variable over a re-entrant lock."""

    def __init__(self, host: Host, lock: Lock) -> None:
        self._host, self._lock = host, lock
        self._notified = 0

    def wait(self) -> None:
        seen, owner, count = self._notified, self._lock._owner, self._lock._count
        self._lock._owner, self._lock._count = None, 0
        self._host.simulation.wait(lambda: self._notified != seen and self._lock._owner is None)
        self._lock._owner, self._lock._count = owner, count

    def notify_all(self) -> None:
        self._notified += 1


class Event:
    """An event."""

    def __init__(self, host: Host) -> None:
        self._host, self._set = host, False

    def set(self) -> None:
        self._set = True

    def wait(self, timeout: float | None = None) -> bool:
        return self._host.simulation.wait(lambda: self._set, timeout)


class Thread:
    """A thread of the simulated process that starts it."""

    def __init__(self, host: Host, *, target: Callable[..., None], name: str = "", daemon: bool = False) -> None:
        self._host, self._target, self._name, self._daemon = host, target, name, daemon
        self._thread: SimThread | None = None

    def start(self) -> None:
        self._thread = self._host.simulation.thread(self._host.here(), self._target, self._name, daemon=self._daemon)

    def join(self) -> None:
        assert self._thread is not None
        thread = self._thread
        self._host.simulation.wait(lambda: thread.finished)


class ThreadLocal:
    """`threading.local`, for simulated threads."""

    def __init__(self, host: Host) -> None:
        self.__dict__["_host"], self.__dict__["_values"] = host, {}

    def _own(self) -> dict[str, Any]:
        own: dict[str, Any] = self.__dict__["_values"].setdefault(self.__dict__["_host"].simulation.current, {})
        return own

    def __getattr__(self, name: str) -> Any:
        try:
            return self._own()[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self._own()[name] = value


class SimpleQueue:
    """`queue.SimpleQueue`."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._items: deque[Any] = deque()

    def put(self, item: Any) -> None:
        self._host.simulation.point()
        self._items.append(item)

    def get(self) -> Any:
        self._host.simulation.wait(lambda: bool(self._items))
        return self._items.popleft()


# ------------------------------------------------------------------ semaphores, paths, polls


class Semaphore:
    """A handle of a named semaphore."""

    def __init__(self, host: Host, name: str, flags: int = 0, mode: int = 0o600, initial_value: int = 0) -> None:
        host.simulation.point()
        if name not in host.semaphores:
            if not flags & posix_ipc.O_CREAT:
                raise posix_ipc.ExistentialError(f"no semaphore {name}")
            host.semaphores[name] = [initial_value]
        self._host, self._count = host, host.semaphores[name]

    def release(self) -> None:
        self._host.simulation.point()
        self._host.simulation.changed()
        self._count[0] += 1

    def acquire(self, timeout: float | None = None) -> None:
        simulation = self._host.simulation
        simulation.point()
        if self._count[0] == 0:
            if timeout == 0 or simulation.current is None:
                raise posix_ipc.BusyError("nothing to take")
            if not simulation.wait(lambda: self._count[0] > 0, timeout):
                raise posix_ipc.BusyError("timed out")
        simulation.changed()
        self._count[0] -= 1

    def close(self) -> None:
        """The semaphore lives on."""


class SharedPath(pathlib.PosixPath):
    """A path whose removal and status are switch points."""

    def unlink(self, missing_ok: bool = False) -> None:
        host = _installed()
        host.simulation.point()
        host.simulation.changed()
        super().unlink(missing_ok)

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:
        _installed().simulation.point()
        return super().stat(follow_symlinks=follow_symlinks)


class Poll:
    """`select.poll` over pidfds."""

    def __init__(self, host: Host) -> None:
        self._host, self._descriptors = host, list[int]()

    def register(self, descriptor: int, events: int) -> None:
        self._descriptors.append(descriptor)

    def unregister(self, descriptor: int) -> None:
        self._descriptors.remove(descriptor)

    def poll(self, timeout: int) -> list[tuple[int, int]]:
        self._host.simulation.point()
        dead = {process.pid + PIDFD_FROM for process in self._host.simulation.processes if process.done}
        return [(descriptor, select.POLLIN) for descriptor in self._descriptors if descriptor in dead]


# ------------------------------------------------------------------ the host


class Host:
    """What the processes of one run share, and the stand-ins through which they see it.

    Parameters
    ----------
    simulation : Simulation

    Attributes
    ----------
    semaphores : dict
        Name -> [count] of every semaphore that has not been unlinked.
    """

    def __init__(self, simulation: Simulation) -> None:
        self.simulation = simulation
        self.semaphores: dict[str, list[int]] = {}
        self._locks: dict[tuple[int, int], SimProcess] = {}
        self._outside = SimProcess(0, "outside the run", mortal=False)
        self._outside.pid = os.getpid()
        self._outside.start = shmroute.shared.identity.process_stat(os.getpid())[1]
        self._stand_ins: list[tuple[Any, Any]] = [
            (time, StandIn(
                time, monotonic=self._now, monotonic_ns=self._now_ns, time=self._now, sleep=self._sleep,
                perf_counter=self._now, clock_gettime_ns=lambda clock: self._now_ns(), thread_time=self._now,
                thread_time_ns=self._now_ns, process_time_ns=self._now_ns,
            )),
            (threading, StandIn(
                threading, Lock=lambda: Lock(self, False), RLock=lambda: Lock(self, True),
                Condition=lambda lock: Condition(self, lock), Event=lambda: Event(self),
                Thread=lambda **settings: Thread(self, **settings), local=lambda: ThreadLocal(self),
                get_ident=lambda: id(self.simulation.current),
            )),
            (queue, StandIn(queue, SimpleQueue=lambda: SimpleQueue(self))),
            (posix_ipc, StandIn(
                posix_ipc, Semaphore=lambda *arguments, **named: Semaphore(self, *arguments, **named),
                unlink_semaphore=self._unlink_semaphore,
            )),
            (fcntl, StandIn(fcntl, lockf=self._lockf)),
            (sys, StandIn(sys, stderr=io.StringIO())),
            (select, StandIn(select, poll=lambda: Poll(self))),
            (signal, StandIn(signal, signal=self._set_handler, getsignal=lambda number: signal.SIG_DFL)),
            (os, StandIn(
                os, getpid=lambda: self.here().pid, pidfd_open=self._pidfd_open, open=self._open, close=self._close,
                link=self._link,
            )),
            (shmroute.shared.segment.SHM, SharedPath(_folder)),
            (shmroute.shared.identity.process_stat, self._process_stat),
            (shmroute.shared.experts.monotonic_ns, self._now_ns),
            (shmroute.pager.prefetch.usage.STAT, _folder / "no-stat"),  # whether cores idle is not told
            (shmroute.attachment._registry, PerProcess(self, dict)),
            (shmroute.attachment._registry_mutex, PerProcess(self, lambda: Lock(self, True))),
            (shmroute.pager_lock._held_here, PerProcess(self, set)),
            (shmroute.pager_lock._mutex, PerProcess(self, lambda: Lock(self, False))),
            (shmroute.runtime._open_runtimes, PerProcess(self, set)),
        ]  # fmt: skip

    def here(self) -> SimProcess:
        """The process at work."""
        thread = self.simulation.current
        return self._outside if thread is None else thread.process

    # ------------------------------------------------------ putting it in place

    def install(self) -> Callable[[], None]:
        """Have the runtime's modules see this host; returns what undoes that."""
        reals = {id(real): stand_in for real, stand_in in self._stand_ins}
        if not _places:
            _places.extend(
                (vars(module), name, value)
                for module_name, module in list(sys.modules.items())
                if module_name.split(".")[0] == "shmroute"
                for name, value in vars(module).items()
                if id(value) in reals
            )
        for space, name, real in _places:
            space[name] = reals[id(real)]
        _hosts.append(self)

        def remove() -> None:
            _hosts.pop()
            for space, name, real in _places:
                space[name] = real

        return remove

    def signal(self, process: SimProcess, number: int) -> None:
        """Send a signal: its handler runs in the process's first thread, at its next step."""
        handler = process.locals.get(("signal", number))
        if handler is not None:
            process.signals.append(lambda: handler(number, None))

    # ------------------------------------------------------ the stand-ins' functions

    def _now(self) -> float:
        return CLOCK_BEGINS + self.simulation.now

    def _now_ns(self) -> int:
        return int(self._now() * 1e9)

    def _sleep(self, seconds: float) -> None:
        if self.simulation.unwinding:
            raise Discarded
        if self.simulation.current is not None:
            self.simulation.sleep(seconds)

    def _unlink_semaphore(self, name: str) -> None:
        self.simulation.point()
        self.simulation.changed()
        if self.semaphores.pop(name, None) is None:
            raise posix_ipc.ExistentialError(f"no semaphore {name}")

    def _set_handler(self, number: int, action: Any) -> Any:
        held = self.here().locals
        former = held.get(("signal", number), signal.SIG_DFL)
        held["signal", number] = action if callable(action) else None
        return former

    def _pidfd_open(self, pid: int) -> int:
        self.simulation.point()
        if self._process(pid) is None:
            raise ProcessLookupError(errno.ESRCH, "no such process")
        return PIDFD_FROM + pid

    def _process_stat(self, pid: int) -> tuple[str, int]:
        if pid != self.here().pid:
            self.simulation.point()
        process = self._process(pid)
        if process is None:
            raise FileNotFoundError(errno.ENOENT, "no such process")
        return "R", process.start

    def _process(self, pid: int) -> SimProcess | None:
        for process in (*self.simulation.processes, self._outside):
            if process.pid == pid and (not process.done or process is self._outside):
                return process
        return None

    def _open(self, path: Any, flags: int, mode: int = 0o777, **named: Any) -> int:
        self.simulation.point()
        return os.open(path, flags, mode, **named)

    def _link(self, *arguments: Any, **named: Any) -> None:
        self.simulation.point()
        self.simulation.changed()
        os.link(*arguments, **named)

    def _close(self, fd: int) -> None:
        if fd >= PIDFD_FROM:
            return
        if not self.simulation.unwinding:
            status = os.fstat(fd)
            key = status.st_dev, status.st_ino
            if self._locks.get(key) is self.here():
                self.simulation.point()
                self.simulation.changed()
                self._locks.pop(key, None)
        os.close(fd)

    def _lockf(self, fd: int, flags: int) -> None:
        assert flags == fcntl.LOCK_EX | fcntl.LOCK_NB
        self.simulation.point()
        status = os.fstat(fd)
        key = status.st_dev, status.st_ino
        holder = self._locks.get(key)
        if holder is not None and holder is not self.here() and not holder.done:
            raise BlockingIOError(errno.EAGAIN, "held by another process")
        self._locks[key] = self.here()
        self.simulation.changed()


_hosts: list[Host] = []
_places: list[tuple[dict[str, Any], str, Any]] = []
"""(module's globals, name, real value) of every global that a stand-in takes the place of."""


def _installed() -> Host:
    return _hosts[-1]


def step() -> None:
    """Announce a step of whichever simulated thread is at work."""
    _installed().simulation.point()


def files() -> list[str]:
    """What is in the folder of the simulated hosts."""
    return sorted(os.listdir(_folder))


def clear_files() -> None:
    """Remove them."""
    for name in os.listdir(_folder):
        os.unlink(_folder / name)
