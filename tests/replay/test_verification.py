"""A cache-biased run, replayed exactly: real workers, real kills, the shipped model."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from runtimes import REPOSITORY, Residency, unique_name
from typer.testing import CliRunner, Result

from shmroute.cli import app
from shmroute.config import RouterConfig, RuntimeConfig, TraceConfig
from shmroute.errors import TraceError
from shmroute.lifecycle import create
from shmroute.replay.choices import verify
from shmroute.traces import Trace, save_trace
from shmroute.traces.merging import merge
from shmroute.traces.recorded_files import read_run

CHECKPOINT = REPOSITORY / "examples" / "tiny-mixtral"
DOMAINS = ("kjv", "faq", "python")
TOKENS = 150


def start(name: str, domain: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [
            sys.executable, "-m", "shmroute.demo.worker", name, "--data", str(CHECKPOINT), "--domain", domain,
            "--tokens", str(TOKENS), "--outputs", str(folder / f"{domain}.npz"),
        ],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip


@dataclasses.dataclass
class Run:
    """A run of three workers, of which the last was killed in the middle."""

    folder: Path
    trace: Trace
    killed: int
    counters: dict[str, int]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    outputs = tmp_path_factory.mktemp("outputs")
    config = RuntimeConfig.from_checkpoint(
        CHECKPOINT, "50%", router=RouterConfig(cache_bonus=0.5), trace=TraceConfig(str(folder), logits=True)
    )
    with create(unique_name(), config, pager=True, progress=None) as runtime:
        workers = [start(runtime.name, domain, outputs) for domain in DOMAINS]
        victim = workers[-1]
        try:
            for worker in workers:
                assert worker.stdout is not None
                assert worker.stdout.readline() == "ready\n"
            for worker in workers:
                assert worker.stdin is not None
                worker.stdin.write("go\n")
                worker.stdin.flush()
            routed = 0
            while routed < TOKENS * config.num_layers // 3:
                mine = runtime.metrics().worker_of(victim.pid)
                routed = 0 if mine is None else mine.counters["tokens"]
                time.sleep(0.001)
            victim.send_signal(signal.SIGKILL)
            for worker in workers:
                worker.wait()
        finally:
            for worker in workers:
                worker.kill()
                worker.communicate()
        counters = runtime.metrics().total.counters
    assert [worker.returncode for worker in workers] == [0, 0, -signal.SIGKILL]
    return Run(folder, merge(folder), victim.pid, counters)


def test_every_choice_of_a_biased_run_is_chosen_again_exactly(run: Run) -> None:
    found = verify(run.trace)
    assert found.exact
    assert found.first is None
    assert found.choices == run.counters["recorded"]
    assert run.counters["unrecorded"] == 0
    assert run.counters["changed"] > 0, "the bonus changed nothing, so this shows little"


@pytest.mark.parametrize(
    "router",
    [
        RouterConfig(rule="cache-prior", cache_bonus=0.4, top_j=1),
        RouterConfig(rule="max-rank", cache_bonus=1.0, top_j=1, max_rank=5),
        RouterConfig(rule="cumulative-threshold", cache_bonus=0.7, top_j=1),
        RouterConfig(rule="probability", cache_bonus=0.1, renormalize=False),
        RouterConfig(cache_bonus=0.5, n_group=4, topk_group=2, routed_scaling_factor=2.5),
        RouterConfig(cache_bonus=0.5, quality_budget=0.01),
    ],
    ids=lambda router: f"{router.rule} {router.n_group} {router.quality_budget}",
)
def test_every_rule_is_chosen_by_again_exactly(router: RouterConfig, tmp_path: Path) -> None:
    config = RuntimeConfig(
        2, 16, 3, expert_bytes=8, slots=16, max_workers=2, router=router,
        trace=TraceConfig(str(tmp_path), logits=True),
    )  # fmt: skip
    random = np.random.default_rng(1)
    with create(unique_name(), config, progress=None) as runtime:
        residency = Residency(runtime)
        for layer in range(2):
            residency.load(layer, *range(layer, 16, 2))
        for tokens in (1, 7, 40, 1, 300):
            for layer in range(2):
                runtime.router(layer).route(random.standard_normal((tokens, 16)).astype(np.float32))
        changed = runtime.metrics().total.counters["changed"]
    trace = merge(tmp_path)
    found = verify(trace)
    assert found.exact, found.first
    assert found.choices == 2 * 349
    assert changed > 0
    if router.rule == "cache-prior":
        assert trace.spread is not None
        assert len(np.unique(trace.spread[:, 0])) == 5  # one for each call: the first knew none
        assert not verify(dataclasses.replace(trace, spread=trace.spread * 0)).exact


def test_sigmoid_scores_are_refused_since_their_bias_is_not_recorded(run: Run) -> None:
    router = run.trace.meta["router"] | {"scoring": "sigmoid"}
    with pytest.raises(TraceError, match="correction bias"):
        verify(dataclasses.replace(run.trace, meta=run.trace.meta | {"router": router}))


def test_the_killed_worker_left_all_but_its_last_calls(run: Run) -> None:
    files = {file.pid: file for file in read_run(run.folder)}
    assert [file.ended for pid, file in files.items() if pid != run.killed] == [True, True]
    victim = files[run.killed]
    assert not victim.ended
    assert victim.unfinished <= 1, "it routes one token at a time"
    routed = sum(len(file.kind(1)) for file in files.values())
    # A kill may come between a call's ticks and its record, or its record and the count of it.
    assert run.counters["recorded"] <= routed <= run.counters["recorded"] + 1
    assert routed <= run.counters["tokens"] + 1
    assert run.counters["tokens"] <= routed + 1


def test_what_workers_waited_for_is_all_in_the_trace(run: Run) -> None:
    assert run.trace.stall_ns is not None
    waited = int(run.trace.stall_ns.sum())
    assert run.trace.meta["stall_elsewhere_ns"] == 0
    assert run.counters["wait_ns"] >= waited > 0
    survivors = [file for file in read_run(run.folder) if file.pid != run.killed]
    assert sum(int(file.kind(2)["moment"].sum()) for file in survivors) <= waited
    assert int((run.trace.stall_ns > 0).sum()) <= run.counters["waits"]


def test_misses_are_those_that_the_runtime_counted(run: Run) -> None:
    missed = int(run.trace.misses().sum())
    assert abs(missed - run.counters["misses"]) <= 2, "but for the killed worker's last token"


@pytest.fixture
def saved(run: Run, tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "run.npz"
    save_trace(run.trace, path)
    yield path


def replayed(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["replay", *map(str, arguments)])


def test_the_command_verifies_a_folder_and_a_file_alike(run: Run, saved: Path) -> None:
    for path in (run.folder, saved):
        result = replayed(path, "--verify")
        assert result.exit_code == 0, result.output
        assert "all exactly as recorded" in result.stdout
    found = json.loads(replayed(saved, "--verify", "--json").stdout)["traces"][0]
    assert found["exact"]
    assert found["choices"] == run.counters["recorded"]


@pytest.mark.parametrize("what", ["ids", "weights", "strength", "resident"])
def test_a_difference_is_found_and_told(run: Run, tmp_path: Path, what: str) -> None:
    trace = run.trace
    assert trace.weights is not None
    assert trace.strength is not None
    assert trace.resident is not None
    changed = getattr(trace, what).copy()
    if what == "ids":
        changed[7, 3] = changed[7, 3, ::-1]
    elif what == "weights":
        changed[7, 3, 1] = np.nextafter(changed[7, 3, 1], np.float32(1))
    else:
        # Every bonus, or every snapshot: some choice must depend on it.
        changed[:] = 0 if what == "strength" else ~changed
    path = tmp_path / "changed.npz"
    save_trace(dataclasses.replace(trace, **{what: changed}), path)
    result = replayed(path, "--verify", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)["traces"][0]
    if what in ("ids", "weights"):
        assert (found["different_ids"], found["different_weights"]) == ((1, 0) if what == "ids" else (0, 1))
        assert (found["first"]["token"], found["first"]["layer"]) == (7, 3)
    else:
        assert found["different_ids"] > 0
    told = replayed(path, "--verify")
    assert told.exit_code == 1
    assert "first in token" in told.stdout


@pytest.mark.parametrize(
    ("without", "complaint"),
    [("logits", "recorded without logits"), ("resident", "no residency"), ("strength", "bonus"), ("spread", "spread")],
)
def test_a_trace_that_lacks_what_choices_depend_on_is_refused(run: Run, without: str, complaint: str) -> None:
    with pytest.raises(TraceError, match=complaint):
        verify(dataclasses.replace(run.trace, **{without: None}))


def test_a_recorded_trace_is_replayed_like_any_other(saved: Path, run: Run) -> None:
    result = replayed(saved, "--workers", "3", "--slots", "50%", "--policies", "lru,belady", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["traces"][0]
    assert found["machine"]["expert_bytes"] == 196_608, "the trace says how large its experts are"
    lru, belady = found["results"]
    assert 0.5 < lru["hit_rate"] < belady["hit_rate"] < 1
