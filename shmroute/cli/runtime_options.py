"""The options by which commands that make a runtime say what it shall be."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from shmroute.config import BUDGET_MEASURES
from shmroute.pager.eviction.names import POLICIES

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
