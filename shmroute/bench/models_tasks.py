"""What a crew of workers is asked to do with a model, and what it reports; see `shmroute.bench.models_crew`."""

from __future__ import annotations

from dataclasses import dataclass

SHARED, MAPPED, COPIED = "shared", "mapped", "copied"
"""How workers come by experts: from one shared cache; from the file, mapped by each; from a copy of each one's own."""


@dataclass(frozen=True)
class CrewTask:
    """What to do.

    Attributes
    ----------
    folder : str
        The model.
    manner : str
        `SHARED`, `MAPPED` or `COPIED`.
    workers : int
    prompt, tokens : int
        Each worker decodes `tokens` after a prompt of its own of `prompt` tokens.
    seconds : float
        After which it stops decoding all the same; the first token is always decoded.
    budget : int
        Bytes of slots, for `SHARED`.
    bonus : float or None
        Likewise; None is the default.
    """

    folder: str
    manner: str
    workers: int
    prompt: int
    tokens: int
    seconds: float
    budget: int = 0
    bonus: float | None = None


@dataclass(frozen=True)
class CrewReport:
    """What was done.

    Attributes
    ----------
    ids : list of list of int
        What each worker decoded.
    seconds : float
        From the moment when all were told to start until the last was done.
    later_rate : float
        Tokens per second of all workers together, in the second half of each one's tokens.
    storage_bytes : int
        What the kernel fetched from disks for them meanwhile.
    pss, rss : int
        Memory of all processes together at the end: of the workers, of the one that they were forked from, and of the
        pager.
    processes : int
    hit_rate, changed : float or None
        For `SHARED`: the share of choices that were resident, and of those that the bonus changed.
    """

    ids: list[list[int]]
    seconds: float
    later_rate: float
    storage_bytes: int
    pss: int
    rss: int
    processes: int
    hit_rate: float | None = None
    changed: float | None = None
