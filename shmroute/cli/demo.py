"""``shmroute demo``: the runtime end to end on a real checkpoint, checked against a dense reference."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from shmroute.cli.rule_options import MaxRank, Rule, SparedLayers, TopJ
from shmroute.config import RouterConfig
from shmroute.demo.run import Demo, Progress, RunReport, WorkerReport, shortcomings
from shmroute.errors import ConfigError

PLAIN_INTERVAL = 1.0
"""Seconds between progress lines where there is no terminal."""


def default_folder() -> Path:
    """The checkpoint of the examples: beside the package in a source checkout, else under this folder."""
    beside = Path(__file__).resolve().parents[2] / "examples" / "tiny-mixtral"
    return beside if beside.is_dir() else Path("examples/tiny-mixtral")


def demo(
    data: Annotated[
        Path | None, typer.Option(help="Folder with a Mixtral checkpoint and its activations.npz.", show_default=False)
    ] = None,
    budget: Annotated[str, typer.Option(help="What the slots may hold: a share or a size.")] = "50%",
    bonus: Annotated[float, typer.Option(help="Cache bonus of the second run; the first has none.")] = 0.5,
    rule: Rule = RouterConfig.rule,
    top_j: TopJ = RouterConfig.top_j,
    max_rank: MaxRank = RouterConfig.max_rank,
    spared_layers: SparedLayers = RouterConfig.spared_layers,
    tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens of each domain.")] = 1_000_000,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="Record what is routed into this folder, and merge it: bonus-0.npz, and that of the other bonus.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the reports as one JSON object.")] = False,
) -> None:
    """Run a pager and four workers on one cache of a trained model's experts, without and with a cache bonus.

    Without a bonus every output must equal a dense reference; with one, you see what the hit rate gains and what the
    outputs lose. Exits with 1 if the runs do not show that.

    Example: shmroute demo --budget 25%
    """
    console = Console(stderr=as_json)
    folder = data or default_folder()
    if not folder.is_dir():
        raise ConfigError(f"no checkpoint at {folder}: run this from a source checkout, or give its folder with --data")
    router = RouterConfig(cache_bonus=bonus, rule=rule, top_j=top_j, max_rank=max_rank, spared_layers=spared_layers)
    show = Demo(folder, budget, tokens, router)  # refused now, if it does not fit, rather than after the first run
    config = show.config
    # As Ctrl-C does: leave the `with` blocks, which end the workers and remove the cache.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    total = config.num_layers * config.num_experts
    console.print(
        f"{os.path.relpath(folder)}: {config.num_layers} layers × {config.num_experts} experts, top-{config.top_k}; "
        f"{config.slots} slots for {total} experts ({config.budget_bytes:,} bytes)",
        highlight=False,
        soft_wrap=True,
    )
    console.print("computing the dense reference …")
    show.compute_reference()
    runs = []
    for value in (0.0, bonus):
        with _display(console, value) as watch:
            runs.append(show.run(value, watch, None if trace is None else trace / f"bonus-{value:g}"))
        console.print(_run_table(runs[-1]))
    plain, biased = runs
    console.print(_comparison(plain, biased))
    problems = shortcomings(plain, biased)
    if as_json:
        json.dump({"runs": [run.as_dict() for run in runs], "shortcomings": problems}, sys.stdout)
        print()
    for problem in problems:
        console.print(Text(f"FAILED: {problem}", style="bold red"))
    if problems:
        raise typer.Exit(1)


# ------------------------------------------------------------------ while it runs


@contextmanager
def _display(console: Console, bonus: float) -> Iterator[Callable[[Progress], None]]:
    """What to call with a run's progress: a live display on a terminal, lines elsewhere."""
    if not console.is_terminal:
        yield _PlainLines(console, bonus)
        return
    bars = Bars(TextColumn("{task.description:>9}"), BarColumn(), MofNCompleteColumn(), console=console)
    tasks: dict[str, Any] = {}

    def watch(progress: Progress) -> None:
        for domain, total in progress.expected.items():
            if domain not in tasks:
                tasks[domain] = bars.add_task(domain, total=total)
            bars.update(tasks[domain], completed=progress.done[domain])
        live.update(Group(Text(f"bonus {bonus:g}  {_status(progress)}"), bars))

    with Live(console=console, refresh_per_second=8) as live:
        yield watch


class _PlainLines:
    def __init__(self, console: Console, bonus: float) -> None:
        self._console, self._bonus = console, bonus
        self._next = 0.0

    def __call__(self, progress: Progress) -> None:
        finished = progress.done == progress.expected
        if time.monotonic() < self._next and not finished:
            return
        self._next = time.monotonic() + PLAIN_INTERVAL
        done = "  ".join(f"{domain} {count}/{progress.expected[domain]}" for domain, count in progress.done.items())
        self._console.print(f"bonus {self._bonus:g}  {done}  {_status(progress)}", highlight=False, soft_wrap=True)


def _status(progress: Progress) -> str:
    metrics = progress.metrics
    rate = metrics.hit_rate
    pager = metrics.pager.counters
    return (
        f"hit rate {'–' if rate is None else f'{rate:.3f}'}  resident {metrics.resident}/{metrics.slots}  "
        f"queue {pager['queued']}  loads {pager['loads']}  evictions {pager['evictions']}"
    )


# ------------------------------------------------------------------ afterwards


def _table(title: str, padding: int | tuple[int, int]) -> Table:
    return Table(title=title, title_justify="left", caption_justify="left", box=SIMPLE_HEAD, padding=padding)


def _run_table(run: RunReport) -> Table:
    """Per worker and in all: speed, hits, latency, paging, memory."""
    table = _table(f"bonus {run.bonus:g}", padding=0)
    table.add_column("worker", no_wrap=True)
    for heading in ("tokens/s", "hit rate", "p50 µs", "p99 µs", "loads", "evicted", "MB read", "MB held"):
        table.add_column(heading, justify="right", no_wrap=True)
    expert_bytes = run.metrics["pager"]["bytes_read"] // max(run.metrics["pager"]["loads"], 1)
    for worker in run.workers:
        table.add_row(*_worker_row(worker, expert_bytes))
    table.add_section()
    pager = run.metrics["pager"]
    total = run.metrics["total"]
    table.add_row(
        "all",
        f"{run.tokens / run.seconds:,.0f}",
        f"{run.hit_rate:.3f}",
        f"{total['route']['p50_us']:.1f}",
        f"{total['route']['p99_us']:.1f}",
        f"{pager['loads']:,}",
        f"{pager['evictions']:,}",
        f"{pager['bytes_read'] / 1e6:,.1f}",
        f"{(run.metrics['pool_bytes'] + run.metrics['control_bytes']) / 1e6:.1f}",
    )
    table.caption = (
        "p50, p99: latency of a routing call. loads, evicted, MB read: what each worker's requests caused (the "
        "pager's own prefetches, and what only its sweep found, count in 'all'). MB held: a worker's private "
        "memory, Python and numpy included; in 'all', the segment that they share."
    )
    return table


def _worker_row(worker: WorkerReport, expert_bytes: int) -> list[str]:
    metrics = worker.metrics
    return [
        worker.domain,
        f"{worker.tokens / worker.seconds:,.0f}",
        f"{metrics['hit_rate']:.3f}",
        f"{metrics['route']['p50_us']:.1f}",
        f"{metrics['route']['p99_us']:.1f}",
        f"{metrics['loads']:,}",
        f"{metrics['evictions']:,}",
        f"{metrics['loads'] * expert_bytes / 1e6:,.1f}",
        f"{worker.private_bytes / 1e6:.1f}",
    ]


def _comparison(plain: RunReport, biased: RunReport) -> Table:
    """The two runs side by side."""
    table = _table("against the dense reference", padding=(0, 1))
    for heading in ("bonus", "hit rate", "choices changed", "largest error", "relative", "loads"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in (plain, biased):
        table.add_row(
            f"{run.bonus:g}",
            f"{run.hit_rate:.3f}",
            f"{run.changed:,} ({run.changed / run.choices:.1%})",
            f"{run.largest_error:.2e}",
            f"{run.relative_error:.2e}",
            f"{run.metrics['pager']['loads']:,}",
        )
    table.caption = (
        f"of {plain.choices:,} choices; errors of the outputs: largest absolute difference of an element, and norm of "
        "the difference over norm of the reference"
    )
    return table
