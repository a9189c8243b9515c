"""The command line: ``shmroute``. One file for each command; here they are put together.

Exit codes: 0 done, 1 it could not be done, 2 the command or a setting is wrong, 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from shmroute import __version__
from shmroute.cli.bench import bench
from shmroute.cli.demo import demo
from shmroute.cli.destroy import destroy
from shmroute.cli.doctor import doctor
from shmroute.cli.eval import eval_
from shmroute.cli.ls import ls
from shmroute.cli.output import complain
from shmroute.cli.pager import pager
from shmroute.cli.record import record
from shmroute.cli.replay import replay
from shmroute.cli.serve import serve
from shmroute.cli.stat import StatCommand, stat
from shmroute.errors import ConfigError, ShmrouteError

FAILED = 1
USAGE = 2
INTERRUPTED = 130


class Commands(TyperGroup):
    """The commands, with every error that a user can meet made one line and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except ShmrouteError as error:
            complain(f"{type(error).__name__}: {error}")
            raise typer.Exit(USAGE if isinstance(error, ConfigError) else FAILED) from None
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"shmroute {__version__}")
        raise typer.Exit


@app.callback()
def shmroute(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """One shared cache of Mixture-of-Experts weights for many inference worker processes.

    Example, in two terminals:

    shmroute pager ./mixtral --name demo --budget 50%

    shmroute stat demo --watch

    Exit codes: 0 done, 1 it could not be done, 2 the command or a setting is wrong, 130 interrupted.
    """


def help_of(command: Callable[..., None]) -> str:
    """A command's docstring with each paragraph on one line, for the terminal to wrap."""
    return "\n\n".join(" ".join(part.split()) for part in (command.__doc__ or "").split("\n\n"))


app.command(help=help_of(demo))(demo)
app.command(help=help_of(pager))(pager)
app.command(help=help_of(stat), cls=StatCommand)(stat)
app.command(help=help_of(ls))(ls)
app.command(help=help_of(record))(record)
app.command(help=help_of(replay))(replay)
app.command("eval", help=help_of(eval_))(eval_)
app.command(help=help_of(destroy))(destroy)
app.command(help=help_of(doctor))(doctor)
app.command(help=help_of(bench))(bench)
app.command(help=help_of(serve))(serve)


def main() -> None:
    """Run the command line and exit."""
    try:
        app(prog_name="shmroute")
    finally:
        # A reader that went away (`shmroute ls | head -1`) would else be reported when the interpreter flushes.
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except BrokenPipeError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
