"""A budget that can hardly be served is said so, with the numbers."""

from __future__ import annotations

import warnings

import pytest
from runtimes import run_python, unique_name

import shmroute
from shmroute import RuntimeConfig
from shmroute.errors import SmallBudgetWarning
from shmroute.sources.synthetic import SyntheticSource

SOURCE = SyntheticSource(num_layers=3, num_experts=8, hidden_size=8, intermediate_size=8, top_k=2)

ATTACHED = """
import sys, warnings
import shmroute
runtime = shmroute.attach(sys.argv[1])
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    runtime.router(0)
print(*(f"{one.category.__name__}: {one.message}" for one in caught), sep="\\n")
"""


def config(slots: int) -> RuntimeConfig:
    return RuntimeConfig.from_checkpoint(SOURCE, f"{slots * 4096}", max_workers=4)


def test_a_budget_under_one_tokens_cycle_is_warned_of_when_the_cache_is_made() -> None:
    message = r"5 slots are fewer than one token's cycle of 3 layers × 2 experts = 6.*give 6 slots or more"
    with pytest.warns(SmallBudgetWarning, match=message), shmroute.create(unique_name(), config(5)):
        pass


@pytest.mark.filterwarnings("error")
def test_a_budget_of_one_tokens_cycle_is_not_warned_of() -> None:
    with shmroute.create(unique_name(), config(6)):
        pass


def test_a_worker_for_whom_there_is_no_slot_is_warned_when_it_comes() -> None:
    name = unique_name()
    with pytest.warns(SmallBudgetWarning, match="cycle"):
        runtime = shmroute.create(name, config(2))
    with runtime:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            runtime.router(0)
        said = run_python(ATTACHED, name).stdout
    assert said.startswith("SmallBudgetWarning: 2 slots are fewer than 2 workers + 1 = 3"), said


def test_routing_alone_needs_no_budget() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with shmroute.create(unique_name(), RuntimeConfig(3, 8, 2, expert_bytes=4096, slots=1)) as runtime:
            runtime.router(0)
