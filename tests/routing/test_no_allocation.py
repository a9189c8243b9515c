"""The hot path allocates nothing: no Python object, no traced memory, nothing of Numba's."""

from __future__ import annotations

import json
from typing import Any

import pytest
from runtimes import REPOSITORY, run_python

from shmroute.shared.atomic import COMPILED

PROGRAM = """
import gc, json, sys, tracemalloc
import numpy as np
from numba.core.runtime import rtsys
from runtimes import small_config, unique_name, Residency
from shmroute import create

from shmroute import RouterConfig

router = RouterConfig(**json.loads(sys.argv[1]))
with create(unique_name(), small_config(num_experts=64, top_k=4, router=router), progress=None) as runtime:
    Residency(runtime).load(0, 1, 2)
    route_into = runtime.router(0).route_into
    source = np.random.default_rng(0)
    for shape in ((), (17,)):
        logits = source.normal(size=(*shape, 64)).astype(np.float32)
        experts, weights = np.empty((*shape, 4), np.int32), np.empty((*shape, 4), np.float32)

        def route_often():
            for _ in repetitions:
                route_into(logits, experts, weights)

        repetitions = [None] * 500
        route_often()
        gc.disable()
        blocks = sys.getallocatedblocks()
        route_often()
        blocks = sys.getallocatedblocks() - blocks

        tracemalloc.start()
        route_often()
        before = tracemalloc.take_snapshot()
        route_often()
        traced = sum(stat.size_diff for stat in tracemalloc.take_snapshot().compare_to(before, "filename")
                     if "tracemalloc" not in stat.traceback[0].filename)
        tracemalloc.stop()

        cells = rtsys.get_allocation_stats().alloc
        route_often()
        cells = rtsys.get_allocation_stats().alloc - cells
        print("blocks", blocks < 10, "traced", traced < 500, "cells", cells)

    own = rtsys.get_allocation_stats().alloc
    import numba
    numba.njit(lambda array: array[0])(logits)
    print("the counter counts", rtsys.get_allocation_stats().alloc > own)
"""


@pytest.mark.skipif(not COMPILED, reason="interpreted kernels allocate")
@pytest.mark.parametrize(
    "router",
    [
        {},
        {"rule": "cache-prior", "top_j": 1, "renormalize": False},
        {"rule": "max-rank", "max_rank": 30, "cache_bonus": 1.0, "n_group": 4, "topk_group": 2},
        {
            "rule": "cumulative-threshold",
            "scoring": "sigmoid",
            "n_group": 4,
            "topk_group": 2,
            "group_score": "top2-sum",
        },
        {"rule": "probability", "routed_scaling_factor": 2.5},
    ],
    ids=lambda router: router.get("rule", "absolute"),
)
def test_routing_into_given_arrays_allocates_nothing(router: dict[str, Any]) -> None:
    done = run_python(PROGRAM, json.dumps(router), NUMBA_NRT_STATS="1", PYTHONPATH=str(REPOSITORY / "tests"))
    nothing = "blocks True traced True cells 0\n"
    assert done.stdout == nothing + nothing + "the counter counts True\n"
