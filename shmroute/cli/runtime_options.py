"""The options by which commands that make a runtime say what it shall be, and the settings that they amount to."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shmroute.config import BUDGET_MEASURES, PagerConfig, RouterConfig, RuntimeConfig, TraceConfig
from shmroute.pager.eviction.names import POLICIES
from shmroute.validation import require

Budget = Annotated[str, typer.Option(help="Memory for experts: a size (2GiB) or a share of all experts (50%).")]
IoThreads = Annotated[int, typer.Option(help="Loads under way at once.")]
KeepPageCache = Annotated[
    bool,
    typer.Option(
        "--keep-page-cache",
        help="Leave loaded ranges in the page cache: reloads are faster, memory may be paid twice.",
    ),
]
Bonus = Annotated[
    float, typer.Option(help="Strength of the rule; by default what is added to a resident expert's logit.")
]
QualityBudget = Annotated[
    float | None,
    typer.Option(
        show_default=False,
        help="What the bonus may cost a token on average, 0 to 0.5; each layer's is steered by it.",
    ),
]
BudgetMeasure = Annotated[str, typer.Option(help=f"What that cost is: {', '.join(BUDGET_MEASURES)}.")]
Eviction = Annotated[str, typer.Option(help=f"Which expert goes first: {', '.join(POLICIES)}.")]
Trace = Annotated[
    Path | None,
    typer.Option(help="A folder: workers record there what they route; see 'shmroute record'.", show_default=False),
]
TraceLogits = Annotated[
    bool, typer.Option("--trace-logits", help="Record logits too, so that choices can be verified.")
]


def chosen_config(
    checkpoint: Path,
    budget: str,
    router: RouterConfig,
    *,
    io_threads: int,
    keep_page_cache: bool,
    eviction: str,
    trace: Path | None,
    trace_logits: bool,
    max_workers: int = RuntimeConfig.max_workers,
) -> RuntimeConfig:
    """The settings that options of these names amount to.

    Raises
    ------
    ConfigError, CheckpointError
        As `RuntimeConfig.from_checkpoint`; the former also if logits shall be recorded, but nowhere.
    """
    require(trace is not None or not trace_logits, "--trace-logits needs --trace: the folder to record to")
    return RuntimeConfig.from_checkpoint(
        checkpoint,
        budget,
        router=router,
        pager=PagerConfig(io_threads=io_threads, drop_page_cache=not keep_page_cache, eviction=eviction),
        max_workers=max_workers,
        trace=None if trace is None else TraceConfig(str(trace), logits=trace_logits),
    )
