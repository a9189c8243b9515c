"""Whole models: speed and memory of Transformers' models on the shared cache, and as Transformers itself runs them.

A model of Qwen3-MoE's architecture (`shmroute.bench.models_checkpoint`) is written to a temporary folder, and workers
decode greedily from prompts of their own, one thread each. One worker, then several:

- on one shared cache, with everything (pager, slots, workers) in a control group whose limit is below half of the
  experts' bytes, without a bonus and with the default one;
- by Transformers with the file mapped, as it does by itself, in a group with the same limit;
- by Transformers with a copy in each worker's memory, without a limit. (So it is by itself for experts that are stored
  one by one, which most are: it joins them when it loads.)

Loading is not timed. The file's pages are dropped from the page cache before the processes start and again before they
decode (``posix_fadvise``; a virtual machine's host may remember them all the same), so whoever reads from the file
waits for the disk the first time.

How a mapped file fares under a limit is decided by how much the kernel reads at a fault, the disk's read-ahead, which
the table names: 128 KiB as a rule, but some disks have megabytes (``/sys/block/*/queue/read_ahead_kb``), and then most
of what is read is dropped unused. Compare on a disk whose read-ahead is what the model will be served from.

Contestants decode the same number of tokens, but stop after `Setting.seconds`: one that thrashes would take minutes.
One that the limit kills has a speed of 0, and no memory.

This writes 3 GiB and takes about five minutes a round, so it runs only if it is named. Libraries are imported before
workers are forked, by all contestants alike: what one more worker takes is then its own and not torch's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from shmroute.bench.checkpoints import disk_folder, forget_pages
from shmroute.bench.measuring import Contestant, Summary, contest, ratios, unpinned
from shmroute.bench.memory_limit import ControlGroup, MemoryCharge, MemoryLimitError, control_group
from shmroute.bench.models_checkpoint import ModelShape, model_checkpoint, weights_of
from shmroute.bench.models_tasks import COPIED, MAPPED, SHARED, CrewReport, CrewTask
from shmroute.bench.partners import PartnerError
from shmroute.bench.report import HIGHER, LOWER, Table, summary_figure
from shmroute.bench.stage import Bench
from shmroute.extras import missing_packages

MIB = 1 << 20

SHAPE = ModelShape(layers=8, experts=128, top_k=8, hidden=1024, inner=512, heads=8, key_value_heads=2, vocabulary=4096)
LIMIT = int(0.48 * SHAPE.experts_bytes)
RESERVED, RESERVED_EACH = 470 * MIB, 90 * MIB
"""Of the limit, what is not for slots: Python, torch and so on once, and what each worker takes besides."""

PATIENCE = 600.0
"""Seconds after which a crew will never answer."""

LEAVES = 10.0

SPARE_MEMORY = 1 << 30
"""What a contestant without a limit leaves to others."""

OWN_MEMORY = 400 * MIB
"""What a worker takes besides its copy of the experts."""


@dataclass(frozen=True)
class Setting:
    """What is measured.

    Attributes
    ----------
    shape : ModelShape
    limit : int
        Bytes for all processes of a contestant that has a limit.
    budgets : mapping of int to int
        For each number of workers, the bytes of slots.
    prompt, tokens : int
        Of each worker.
    seconds : float
        After which workers stop decoding.
    rounds : int
    """

    shape: ModelShape
    limit: int
    budgets: Mapping[int, int]
    prompt: int
    tokens: int
    seconds: float
    rounds: int


FULL = Setting(
    SHAPE, LIMIT, {count: LIMIT - RESERVED - count * RESERVED_EACH for count in (1, 4)}, prompt=16, tokens=64,
    seconds=30.0, rounds=3,
)  # fmt: skip
QUICK = dataclasses.replace(FULL, tokens=32, seconds=15.0, rounds=2)


@dataclass(frozen=True)
class Outcome:
    """What one sample of a contestant gave.

    Attributes
    ----------
    report : CrewReport or None
        None if the limit killed a process of it.
    charge : MemoryCharge or None
        At the end of decoding; None where no control group can be made.
    """

    report: CrewReport | None
    charge: MemoryCharge | None

    @property
    def rate(self) -> float:
        """Tokens per second of all workers."""
        return 0.0 if self.report is None else sum(map(len, self.report.ids)) / self.report.seconds


@dataclass(frozen=True)
class Entrant:
    """A contestant, and what its samples gave.

    Attributes
    ----------
    name : str
    task : CrewTask
    limit : int or None
        Bytes.
    outcomes : list of Outcome
        Filled by `sample`.
    """

    name: str
    task: CrewTask
    limit: int | None
    outcomes: list[Outcome] = dataclasses.field(default_factory=list)

    def sample(self, limits: bool) -> float:
        """Tokens per second of one run; `limits`: whether there are control groups here."""
        forget_pages(weights_of(Path(self.task.folder)))
        with control_group(self.limit) if limits else contextlib.nullcontext() as group:
            self.outcomes.append(run_crew(self.task, group))
        return self.outcomes[-1].rate


def measure(bench: Bench) -> Iterator[Table]:
    """Two tables for each number of workers: speed, and memory."""
    if missing := missing_packages("transformers"):
        bench.absent["models"] = f"needs {' and '.join(missing)}: pip install 'shmroute[transformers]'"
        return
    with unpinned():
        yield from measure_setting(bench, QUICK if bench.scale.quick else FULL)


def measure_setting(bench: Bench, setting: Setting) -> Iterator[Table]:
    """The same for any setting."""
    unlimited = why_no_limit()
    with model_checkpoint(disk_folder(), setting.shape) as folder:
        for count in setting.budgets:
            entrants = entrants_of(setting, str(folder), count)
            if unlimited is not None:
                name = f"models: Transformers with a mapped file under a memory limit, {count} of them"
                bench.absent[name] = unlimited
                entrants = [entrant for entrant in entrants if entrant.task.manner != MAPPED]
            wanted, free = count * (setting.shape.experts_bytes + OWN_MEMORY) + SPARE_MEMORY, free_memory()
            if wanted > free:
                name = f"models: {count} copies of the model"
                bench.absent[name] = f"they want {wanted / 1e9:.1f} GB of memory, and {free / 1e9:.1f} are free"
                entrants = [entrant for entrant in entrants if entrant.task.manner != COPIED]
            contest(
                [Contestant(one.name, partial(one.sample, unlimited is None)) for one in entrants],
                setting.rounds, warm=False,
            )  # fmt: skip
            yield from tables(setting, count, entrants, unlimited, read_ahead(folder))


def entrants_of(setting: Setting, folder: str, count: int) -> list[Entrant]:
    """Who takes part with so many workers; the first is the subject."""
    task = CrewTask(folder, SHARED, count, setting.prompt, setting.tokens, setting.seconds, setting.budgets[count], 0.0)
    mapped, copied = (dataclasses.replace(task, manner=manner, budget=0, bonus=None) for manner in (MAPPED, COPIED))
    kept = "all in memory" if count == 1 else "a copy in each one's memory"
    return [
        Entrant("one shared cache", task, setting.limit),
        Entrant("one shared cache, default bonus", dataclasses.replace(task, bonus=None), setting.limit),
        Entrant("Transformers, file mapped, same limit", mapped, setting.limit),
        Entrant(f"Transformers, {kept}, no limit", copied, None),
    ]


def run_crew(task: CrewTask, group: ControlGroup | None) -> Outcome:
    """Start the processes of a contestant, wait until they have decoded, and end them.

    Raises
    ------
    PartnerError
        If they fail, other than by the limit.
    """
    command = [sys.executable, "-m", "shmroute.bench.models_crew"]
    process = subprocess.Popen(
        command if group is None else group.command(command),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
        text=True,
        start_new_session=True,  # Ctrl-C is for the bench alone, which then ends it
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        with contextlib.suppress(BrokenPipeError):  # it has ended, and says nothing
            process.stdin.write(json.dumps(dataclasses.asdict(task)) + "\n")
            process.stdin.flush()
        if not select.select([process.stdout], [], [], PATIENCE)[0]:
            raise PartnerError(f"workers with {task.manner} experts did not answer within {PATIENCE:g} s")
        line = process.stdout.readline()
        charge = None if group is None else group.charge()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        code = process.wait(PATIENCE)
        if line:
            return Outcome(CrewReport(**json.loads(line)), charge)
        if charge is not None and charge.kills:
            return Outcome(None, charge)
        raise PartnerError(
            f"workers with {task.manner} experts ended with code {code}; their message is on standard error"
        )
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        if group is not None:
            _let_leave(group)


def _let_leave(group: ControlGroup) -> None:
    """Wait until the others have followed: a pager still has its segment to remove."""
    until = time.monotonic() + LEAVES
    while group.pids() and time.monotonic() < until:
        time.sleep(0.02)


def tables(
    setting: Setting, count: int, entrants: Sequence[Entrant], unlimited: str | None, ahead: str
) -> Iterator[Table]:
    """Speed and memory of the contestants with so many workers."""
    shape = setting.shape
    workers = f"{count} worker" + ("s" if count > 1 else "")
    model = f"{shape.experts_bytes / MIB:,.0f} MiB of experts"
    limit = f"a limit of {setting.limit / MIB:,.0f} MiB" if unlimited is None else "no limit (none can be set here)"
    rates = [[outcome.rate for outcome in entrant.outcomes] for entrant in entrants]
    yield Table(
        f"models/speed-{count}", f"{workers}, {model}, {limit}: speed", "tokens/s, all workers", HIGHER,
        tuple(
            summary_figure(entrant.name, Summary.of(own), Summary.of(ratios(own, rates[0])).median,
                           **_speed_details(entrant.outcomes))
            for entrant, own in zip(entrants, rates, strict=True)
        ),
        f"{setting.tokens} tokens of each worker after {setting.prompt} of a prompt, or as many as in "
        f"{setting.seconds:g} s; cold page cache; later: of the second half of the tokens; GB read: from the disk "
        f"meanwhile, whose read-ahead is {ahead}; slots: {setting.budgets[count] / MIB:,.0f} MiB",
    )  # fmt: skip
    alive = [entrant for entrant in entrants if all(outcome.report is not None for outcome in entrant.outcomes)]
    if not alive:
        return
    held = [[outcome.report.pss / MIB for outcome in one.outcomes if outcome.report is not None] for one in alive]
    yield Table(
        f"models/memory-{count}", f"{workers}, {model}, {limit}: memory", "MiB, PSS of all processes", LOWER,
        tuple(
            summary_figure(entrant.name, Summary.of(own), Summary.of(ratios(own, held[0])).median,
                           **_memory_details(entrant.outcomes))
            for entrant, own in zip(alive, held, strict=True)
        ),
        "at the end of decoding; PSS: each page divided by the number of processes that map it; charged: by the kernel "
        "to all of them, page cache and shared memory included, and the most that it ever was, when loading too",
    )  # fmt: skip


def _speed_details(outcomes: Sequence[Outcome]) -> dict[str, float]:
    reports = [outcome.report for outcome in outcomes if outcome.report is not None]
    details: dict[str, float] = {}
    if len(reports) < len(outcomes):
        details["killed"] = len(outcomes) - len(reports)
    if reports:
        details["later"] = _median([report.later_rate for report in reports])
        details["tokens each"] = _median([sum(map(len, one.ids)) / len(one.ids) for one in reports])
        details["GB read"] = _median([report.storage_bytes / 1e9 for report in reports])
    for name, values in (
        ("hit rate", [report.hit_rate for report in reports]),
        ("% changed", [None if report.changed is None else 100 * report.changed for report in reports]),
    ):
        known = [value for value in values if value is not None]
        if known:
            details[name] = _median(known)
    return details


def _memory_details(outcomes: Sequence[Outcome]) -> dict[str, float]:
    reports = [outcome.report for outcome in outcomes if outcome.report is not None]
    charges = [outcome.charge for outcome in outcomes if outcome.charge is not None]
    details = {"RSS": _median([report.rss / MIB for report in reports])}
    if charges:
        details["charged"] = _median([charge.used / MIB for charge in charges])
    peaks = [charge.peak / MIB for charge in charges if charge.peak is not None]
    if peaks:
        details["at most"] = max(peaks)
    details["processes"] = _median([report.processes for report in reports])
    return details


def _median(values: Sequence[float]) -> float:
    return Summary.of(values).median


def why_no_limit() -> str | None:
    """Why memory cannot be limited here; None if it can."""
    try:
        with control_group(SPARE_MEMORY):
            return None
    except MemoryLimitError as error:
        return str(error)


def free_memory() -> int:
    """Bytes that the kernel takes for available."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def read_ahead(folder: Path) -> str:
    """How much the kernel reads at a fault of a mapped file there."""
    device = folder.stat().st_dev
    try:
        text = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb").read_text()
    except OSError:  # a file system that spans several devices has none of its own
        return "not known"
    return f"{text.strip()} KiB"
