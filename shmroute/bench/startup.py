"""Starting: from nothing to the first routed token, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from shmroute.bench.measuring import Contestant, contest, unpinned
from shmroute.bench.report import Table, table
from shmroute.bench.stage import Bench, routing_runtime
from shmroute.shared.kernel import cache_directory

FIRST_ROUTE = """
import sys, time
began = time.monotonic()
import numpy as np
import shmroute
imported = time.monotonic()
with shmroute.attach(sys.argv[1], progress=None) as runtime:
    attached = time.monotonic()
    k, experts = runtime.config.top_k, runtime.config.num_experts
    runtime.router(0).route_into(np.zeros(experts, np.float32), np.zeros(k, np.int32), np.zeros(k, np.float32))
    routed = time.monotonic()
print(imported - began, attached - imported, routed - attached)
"""

STAGES = ("import", "attach", "first route")


def measure(bench: Bench) -> Iterator[Table]:
    """One table."""
    stages: dict[str, list[list[float]]] = {"cached": [], "uncached": []}
    with routing_runtime(64, 6) as runtime, unpinned():
        cached = str(cache_directory().parents[1])
        contestants = [
            Contestant(
                "import shmroute, attach, route one token",
                partial(_first_route, runtime.name, cached, stages["cached"]),
                partial(_means, stages["cached"]),
            ),
            Contestant("import numpy, numba", partial(_run, "import numpy, numba")),
            Contestant("python -c pass", partial(_run, "pass")),
        ]
        rounds = 2 if bench.scale.quick else bench.scale.few_rounds
        yield table(
            "startup/first-route", "a process from its start to its end", "ms", contest(contestants, rounds),
            note="kernels from the cache; import, attach and first route in ms, as the process itself saw them",
        )  # fmt: skip
        if not bench.scale.quick:
            stages["cached"].clear()
            once = Contestant(
                "… with an empty cache: every kernel compiled",
                partial(_uncached, runtime.name, stages["uncached"]),
                partial(_means, stages["uncached"]),
            )
            yield table(
                "startup/uncached", "the same, once for each version", "ms",
                contest([once, contestants[0]], 1, warm=False),
            )  # fmt: skip


def _means(samples: list[list[float]]) -> dict[str, float]:
    measured = samples[1:] or samples  # the first one warmed up
    return {stage: sum(own) / len(own) * 1000 for stage, own in zip(STAGES, zip(*measured, strict=True), strict=True)}


def _uncached(name: str, stages: list[list[float]]) -> float:
    with tempfile.TemporaryDirectory(prefix="shmroute-bench-") as folder:
        return _first_route(name, folder, stages)


def _first_route(name: str, cache: str, stages: list[list[float]]) -> float:
    began = time.monotonic()
    printed = _python(FIRST_ROUTE, name, SHMROUTE_CACHE_DIR=cache)
    elapsed = time.monotonic() - began
    stages.append([float(seconds) for seconds in printed.split()])
    return elapsed * 1000


def _run(code: str) -> float:
    began = time.monotonic()
    _python(code)
    return (time.monotonic() - began) * 1000


def _python(code: str, *arguments: str, **settings: str) -> str:
    """Run a program that finds this package where this process found it."""
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": path} | settings, stdout=subprocess.PIPE, check=True, text=True,
    ).stdout  # fmt: skip
