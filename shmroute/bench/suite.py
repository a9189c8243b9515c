"""The groups of measurements, and how a run goes through them."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from shmroute.bench import concurrency, curves, idle, leases, models, paging, ring, routing, scaling, sizes, startup
from shmroute.bench.measuring import FULL, QUICK, Contestant, Loop, contest, cpus, pinned, warm_up, yardstick
from shmroute.bench.report import Report, Table, table
from shmroute.bench.stage import Bench
from shmroute.errors import ConfigError, ShmrouteError
from shmroute.shared.atomic import COMPILED

GROUPS: dict[str, Callable[[Bench], Iterator[Table]]] = {
    "sizes": sizes.measure,
    "routing": routing.measure,
    "concurrency": concurrency.measure,
    "scaling": scaling.measure,
    "ring": ring.measure,
    "leases": leases.measure,
    "paging": paging.measure,
    "startup": startup.measure,
    "idle": idle.measure,
    "models": models.measure,
}

ON_REQUEST = ("models",)
"""Groups that run only if they are named: they take many minutes, or much of the disk."""

PEER_PACKAGES = ("torch", "transformers", "pyzmq", "faster-fifo", "iceoryx2", "safetensors", "posix-ipc")


class Watch:
    """Hears how a run goes. These do nothing."""

    def begins(self, group: str) -> None:
        """A group is about to be measured."""

    def measured(self, one: Table) -> None:
        """A table is complete."""

    def curve(self, curve: dict[str, Any]) -> None:
        """A curve is complete."""

    def failed(self, group: str, reason: str) -> None:
        """A group could not be measured to its end."""


def chosen_groups(only: str | None) -> list[str]:
    """The groups that ``--only`` names, in the suite's order; without it, all but those that run on request only.

    Raises
    ------
    ConfigError
        If there is no such group.
    """
    if only is None:
        return [name for name in GROUPS if name not in ON_REQUEST]
    names = [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in names if name not in GROUPS]
    if unknown or not names:
        what = f"there is no group {unknown[0]!r}" if unknown else "--only names no group"
        raise ConfigError(f"{what}; the groups are {', '.join(GROUPS)}")
    return [name for name in GROUPS if name in names]


def run(groups: Iterable[str], *, quick: bool, with_curves: bool = False, watch: Watch | None = None) -> Report:
    """Measure some groups.

    A group that fails leaves what it had measured, and the others go on.

    Raises
    ------
    ConfigError
        If kernels are interpreted in this process: what would be measured is nothing that anybody runs.
    """
    if not COMPILED:
        raise ConfigError("kernels are interpreted here, and would be what is measured; unset NUMBA_DISABLE_JIT")
    watch = watch or Watch()
    began = time.monotonic()
    bench = Bench(QUICK if quick else FULL)
    bench.shared["cpus"] = cpus()
    report = Report(version("shmroute"), quick, describe_machine(), absent=bench.absent)
    # Until the end one thread of this process measures, on one core; partners have the others.
    with bench.resources, pinned(bench.shared["cpus"][0]):
        warm_up(0.3 if quick else 2.0)
        for group in groups:
            watch.begins(group)
            done = report.tables.setdefault(group, [])
            try:
                for one in GROUPS[group](bench):
                    done.append(one)
                    watch.measured(one)
            except (ShmrouteError, OSError, subprocess.CalledProcessError) as error:
                report.failures[group] = f"{type(error).__name__}: {error}"
                watch.failed(group, report.failures[group])
        if with_curves:
            watch.begins("curves")
            try:
                for curve in curves.measure(bench):
                    report.curves.append(curve)
                    watch.curve(curve)
            except (ShmrouteError, OSError) as error:
                report.failures["curves"] = f"{type(error).__name__}: {error}"
                watch.failed("curves", report.failures["curves"])
        watch.begins("machine")
        report.tables["machine"] = [_yardstick(bench)]
        watch.measured(report.tables["machine"][0])
    report.seconds = time.monotonic() - began
    return report


def _yardstick(bench: Bench) -> Table:
    """How fast the machine was, by what no change of this package touches; see `shmroute.bench.measuring`."""
    results = contest(
        [Contestant("yardstick: arithmetic in plain Python", Loop(yardstick, bench.scale.loop_seconds))],
        bench.scale.rounds,
    )
    return table(
        "machine/yardstick", "how fast this machine was", "ns", results,
        note="if it differs from another run's, so may everything else",
    )  # fmt: skip


def describe_machine() -> dict[str, Any]:
    """What figures depend on besides the package."""
    packages = {}
    for name in ("numpy", "numba", "atomics", *PEER_PACKAGES):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": len(cpus()),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
        **packages,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
