"""The simulation of workers on many cores, and the measurements that it rests on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from bench_runs import Result, report_of

from shmroute.bench.contention import Load, Machine, simulate
from shmroute.bench.measuring import cpus
from shmroute.shared.atomic import COMPILED

Command = Callable[..., Result]

pytestmark = pytest.mark.skipif(not COMPILED, reason="the simulation is a compiled loop")

FAST = Machine("whose lines cost nothing", 8, 32, 0.0, 0.0, 0.0)
SLOW = Machine("of two sockets", 8, 32, 23.0, 107.0, 197.0)
AT_ONCE = Load(1, 64, 6, together=1, private=300.0, ahead=30.0, changing=90.0)
TOGETHER = replace(AT_ONCE, together=16, ahead=80.0, changing=800.0)


@pytest.mark.parametrize("load", [AT_ONCE, TOGETHER], ids=["at once", "together"])
def test_one_worker_waits_for_nobody(load: Load) -> None:
    alone = simulate(SLOW, 1, load)
    assert alone.wait == alone.clock == alone.use == 0
    assert alone.routes_per_ms == pytest.approx(1e6 / load.private, rel=0.02)


@pytest.mark.parametrize("load", [AT_ONCE, TOGETHER], ids=["at once", "together"])
def test_where_lines_cost_nothing_everybody_is_as_fast_as_one(load: Load) -> None:
    one, many = simulate(FAST, 1, load), simulate(FAST, 64, load)
    assert many.wait == 0
    assert many.routes_per_ms == pytest.approx(64 * one.routes_per_ms, rel=0.05)


def test_a_clock_that_everybody_changes_at_once_is_the_limit() -> None:
    """Each token needs the line once, and it is on its way for as long as a transfer takes."""
    flat = Machine("of one socket, without chiplets", 64, 64, 100.0, 100.0, 100.0)
    crowded = simulate(flat, 64, AT_ONCE)
    assert crowded.clock > 0.95
    assert crowded.routes_per_ms <= 1e6 / 100.0


def test_the_clock_is_less_busy_if_tokens_are_published_together() -> None:
    assert simulate(SLOW, 64, TOGETHER).clock < simulate(SLOW, 64, AT_ONCE).clock / 2


def test_a_worker_waits_longer_where_lines_cost_more() -> None:
    near, far = replace(SLOW, cores_per_chiplet=2), replace(SLOW, cores_per_chiplet=1)  # 23 and 107 ns apart
    assert 0 < simulate(near, 2, AT_ONCE).wait < simulate(far, 2, AT_ONCE).wait


def test_workers_on_as_many_layers_seldom_meet() -> None:
    """Each goes through all of them, so it still takes lines that another one has changed."""
    spread = simulate(SLOW, 64, replace(AT_ONCE, layers=61))
    assert spread.clock < simulate(SLOW, 64, AT_ONCE).clock / 2
    assert spread.wait > 0


def test_the_same_is_simulated_each_time() -> None:
    assert simulate(SLOW, 7, TOGETHER) == simulate(SLOW, 7, TOGETHER)


@pytest.mark.skipif(len(cpus()) < 2, reason="two processes need a core each")
def test_what_is_simulated_says_so_and_stands_beside_what_is_measured(bench: Command) -> None:
    done = bench("--only", "scaling", "--json")
    assert done.exit_code == 0, done.stderr
    tables = {table["key"]: table for table in report_of(done)["tables"]["scaling"]}
    beyond = [table for key, table in tables.items() if key.startswith("scaling/simulated-")]
    assert len(beyond) == 4
    for table in beyond:
        assert table["title"].startswith("SIMULATED")
        assert [figure["name"] for figure in table["figures"]][-1] == "64 cores"
    names = [figure["name"] for figure in tables["scaling/validation"]["figures"]]
    assert [name.rpartition(": ")[2] for name in names] == ["measured", "simulated"] * 2


@pytest.mark.skipif(len(cpus()) < 2, reason="two processes need a core each")
def test_who_shares_a_layer_puts_tokens_off_and_nobody_else_does(bench: Command) -> None:
    figures = report_of(bench("--only", "concurrency", "--json"))["tables"]["concurrency"][0]["figures"]
    put_off = {figure["name"]: figure["details"]["put off"] for figure in figures}
    assert put_off["2 processes, all on one layer"] > 0  # how much depends on when the scheduler lets both run
    # Another process had the layer in the sample before: that costs one publication.
    assert max(share for name, share in put_off.items() if "on one layer" not in name) < 0.05
