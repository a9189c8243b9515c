"""What there is in ``/dev/shm``, and who uses it. Looking takes no worker lane and changes nothing."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, dataclass
from typing import Any

from shmroute.errors import ConfigError, SegmentError, SegmentForeignError, SegmentNotFoundError
from shmroute.shared.identity import is_dead, is_stopped
from shmroute.shared.lanes import lane_identities
from shmroute.shared.layout import HEADER_OWNER, HEADER_PAGER, HEADER_STANDBY, HEADER_STATE
from shmroute.shared.removal import segment_names
from shmroute.shared.segment import PREFIX, SHM, Segment, attach_segment
from shmroute.shared.words import NOBODY, identity_pid, identity_state

LIVE = "live"
NO_PAGER = "no pager"
ABANDONED = "abandoned"
CLOSING = "closing"
FOREIGN = "foreign"
UNREADABLE = "unreadable"


@dataclass(frozen=True)
class Process:
    """A process that a segment names.

    Attributes
    ----------
    pid : int or None
    state : str
        ``alive``, ``stopped`` (by a signal or a debugger), ``dead``, or ``none`` if nobody is named.
    """

    pid: int | None
    state: str

    @classmethod
    def of(cls, identity: int) -> Process:
        """The process of an identity word."""
        if identity_state(identity) == NOBODY:
            return cls(None, "none")
        if is_dead(identity):
            return cls(identity_pid(identity), "dead")
        return cls(identity_pid(identity), "stopped" if is_stopped(identity) else "alive")

    @property
    def lives(self) -> bool:
        """Whether it has not ended."""
        return self.state in ("alive", "stopped")

    def __str__(self) -> str:
        if self.pid is None:
            return "-"
        return str(self.pid) if self.state == "alive" else f"{self.pid} ({self.state})"


@dataclass(frozen=True)
class Users:
    """The processes of one segment: its owner, pager, standby, and the workers by lane."""

    owner: Process
    pager: Process
    standby: Process
    workers: dict[int, Process]

    @classmethod
    def of(cls, segment: Segment) -> Users:
        """Who uses a segment now."""
        return cls(
            Process.of(segment.read(HEADER_OWNER)),
            Process.of(segment.read(HEADER_PAGER)),
            Process.of(segment.read(HEADER_STANDBY)),
            {lane: Process.of(identity) for lane, identity in lane_identities(segment).items()},
        )

    @property
    def live_workers(self) -> list[Process]:
        """Workers that have not ended."""
        return [worker for worker in self.workers.values() if worker.lives]

    def living(self) -> list[str]:
        """Who lives, in words; empty for an abandoned segment."""
        roles = (("owner", self.owner), ("pager", self.pager), ("standby", self.standby))
        # A segment made by `shmroute pager` is owned by its pager: one process, named once.
        words = [f"{role} {one}" for role, one in roles if one.lives and (role != "owner" or one != self.pager)]
        if workers := self.live_workers:
            words.append(f"{len(workers)} worker{'s' * (len(workers) > 1)} ({', '.join(map(str, workers))})")
        return words


@dataclass(frozen=True)
class Found:
    """One file that claims to be a segment.

    Attributes
    ----------
    name : str
    state : str
        ``live`` (a pager serves it), ``no pager`` (it has other users), ``abandoned`` (owner, pager, standby and
        workers are dead, or a process that was removing it), ``closing`` (it is being removed), ``foreign`` (no
        segment) or ``unreadable``.
    bytes : int
        Size of the file.
    slots : int or None
        None if it cannot be read.
    users : Users or None
    reason : str or None
        Why it cannot be read, or who removes it.
    """

    name: str
    state: str
    bytes: int
    slots: int | None = None
    users: Users | None = None
    reason: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON types only: what `shmroute ls --json` prints for each segment."""
        users = self.users
        return {
            "name": self.name,
            "state": self.state,
            "bytes": self.bytes,
            "slots": self.slots,
            "owner": asdict(users.owner) if users else None,
            "pager": asdict(users.pager) if users else None,
            "standby": asdict(users.standby) if users else None,
            "workers": [{"lane": lane, **asdict(one)} for lane, one in users.workers.items()] if users else [],
            "reason": self.reason,
        }


def look_at(name: str) -> Found | None:
    """One segment, None if there is none of that name. The kernels must have been loaded."""
    try:
        size = (SHM / f"{PREFIX}{name}").lstat().st_size
        segment = attach_segment(name, closing=True)
    except (SegmentNotFoundError, FileNotFoundError):
        return None
    except (SegmentForeignError, ConfigError) as error:
        return Found(name, FOREIGN, size, reason=str(error))
    except SegmentError as error:
        return Found(name, UNREADABLE, size, reason=f"{type(error).__name__}: {error}")
    with contextlib.closing(segment):
        users = Users.of(segment)
        state, reason = _state_of(segment, users)
        return Found(name, state, size, segment.config.slots, users, reason)


def _state_of(segment: Segment, users: Users) -> tuple[str, str | None]:
    if segment.closing:
        remover = Process.of(segment.read(HEADER_STATE))
        if remover.lives:
            return CLOSING, f"process {remover} removes it"
        return ABANDONED, f"process {remover.pid} died while it removed it"
    if users.pager.lives:
        return LIVE, None
    return (NO_PAGER if users.living() else ABANDONED), None


def survey() -> list[Found]:
    """All segments, by name. The kernels must have been loaded."""
    return [found for name in segment_names() if (found := look_at(name)) is not None]
