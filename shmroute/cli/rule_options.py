"""The options by which commands that make routers say how residency is let into the choice."""

from __future__ import annotations

from typing import Annotated

import typer

from shmroute.config import RULES

Rule = Annotated[str, typer.Option(help=f"How residency is let into the choice: {', '.join(RULES)}.")]
TopJ = Annotated[int, typer.Option(help="So many of a token's best experts are kept in any case (not by every rule).")]
MaxRank = Annotated[int, typer.Option(help="Of so many of the best, the rule max-rank prefers resident ones.")]
HostShare = Annotated[
    float,
    typer.Option(help="What share of the bonus an expert gets that is in host memory, but not in the worker's GPU."),
]
SparedLayers = Annotated[
    int, typer.Option(help="So many of the first layers are routed without a bonus: theirs may cost most.")
]
