"""What the two commands share: options, and exit codes.

Exit codes: 0 all is well, 1 a check failed or the run could not be made, 2 a wrong command or setting, 130 interrupted.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from shmroute.cli import help_of
from shmroute.errors import ConfigError, ShmrouteError
from stress.display import listen_to_signals
from stress.programs import ROOT

FAILED, USAGE, INTERRUPTED = 1, 2, 130

DEFAULT_CHECKPOINT = ROOT / "examples" / "tiny-mixtral"

CheckpointOption = Annotated[
    Path,
    typer.Option(
        exists=True,
        file_okay=False,
        help="Folder with a Mixtral checkpoint and its activations.npz.",
        show_default=False,
    ),
]
BudgetOption = Annotated[str, typer.Option(help="What the slots may hold: a share of all experts or a size.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")]
SeedOption = Annotated[int | None, typer.Option(min=0, help="Of everything that is drawn; drawn itself by default.")]


def run(command: Callable[..., None]) -> None:
    """Run a command as a program."""
    listen_to_signals()
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(help=help_of(command))(_with_exit_codes(command))
    app(prog_name=f"python -m stress.{command.__name__}")


def _with_exit_codes(command: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(command)
    def wrapped(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except ShmrouteError as error:
            complain(Console(stderr=True), f"{type(error).__name__}: {error}")
            raise typer.Exit(USAGE if isinstance(error, ConfigError) else FAILED) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None

    return wrapped


def complain(console: Console, message: str) -> None:
    """One red paragraph."""
    console.print(Text(message, style="bold red"), soft_wrap=True)
