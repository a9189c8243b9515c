"""``shmroute bench``: how fast the runtime is here, beside its peers in the same run."""

from __future__ import annotations

import json
import math
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table as Grid
from rich.text import Text

from shmroute.bench.curves import NAMES
from shmroute.bench.plots import check_plottable, draw
from shmroute.bench.report import Comparison, Report, Table, check_savable, compare, read_report, save_report
from shmroute.bench.suite import GROUPS, ON_REQUEST, Watch, chosen_groups, run
from shmroute.cli.output import complain, console, note
from shmroute.lifecycle import report_compilation
from shmroute.shared.kernel import load_kernels

GROUPS_HELP = f"Of {', '.join(GROUPS)}; only if named: {', '.join(ON_REQUEST)}."
VERDICT_STYLES = {"better": "green", "worse": "red", "changed": "yellow"}


def bench(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer and shorter samples: about a minute in all.")] = False,
    only: Annotated[
        str | None,
        typer.Option(metavar="GROUP,…", help=GROUPS_HELP, show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the report as JSON.", show_default=False)
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option("--compare", metavar="FILE", help="Compare with a report that --save wrote.", show_default=False),
    ] = None,
    plots: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Also measure cost curves and draw them; needs the extra 'plots'.", show_default=False
        ),
    ] = None,
) -> None:
    """Measure the runtime beside its peers: medians, quartiles, and ratios within the same rounds.

    Peers that are not installed are left out and named at the end; the extra "bench" brings most of them, torch and
    transformers are measured if they are there. A group that cannot be measured does not keep the others from being
    (exit code 1).

    With --compare, a change is beyond the noise if it exceeds what the spreads of both runs explain, and 5 % at least.

    Example: shmroute bench --quick --only routing,ring --save before.json
    """
    # All that can be wrong with the command is found out before anything is measured.
    groups = chosen_groups(only)
    then = None if against is None else read_report(against)
    if save is not None:
        check_savable(save)
    if plots is not None:
        check_plottable(plots)
    # As Ctrl-C does: leave the `with` blocks, which end the partners and remove every segment.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    load_kernels(report_compilation)
    report = run(groups, quick=quick, with_curves=plots is not None, watch=_Display(groups, as_json, plots is not None))
    comparison = None if then is None else compare(then, report)
    drawn = _finish(report, save, plots)
    if as_json:
        more = {} if comparison is None else {"comparison": comparison.as_dict()}
        typer.echo(json.dumps(report.as_dict() | more | ({} if plots is None else {"plots": drawn})))
    else:
        _print_end(report, drawn)
        if comparison is not None:
            _print_comparison(comparison)
    if report.failures:
        raise typer.Exit(1)


def _finish(report: Report, save: Path | None, plots: Path | None) -> list[str]:
    """Write what is to be written. What cannot be is no reason not to print the report."""
    drawn: list[str] = []
    try:
        if save is not None:
            save_report(report, save)
        if plots is not None:
            drawn = [str(path) for path in draw(report.curves, plots)]
    except OSError as error:
        report.failures["writing"] = f"{error}"
        complain(f"the report was not written: {error}")
    return drawn


# ------------------------------------------------------------------ while it runs


class _Display(Watch):
    """Tables as they are complete, so that an interruption loses none; on a terminal also what is being measured.

    It writes only between measurements: a display that moved by itself would be measured too.
    """

    def __init__(self, groups: Sequence[str], as_json: bool, with_curves: bool) -> None:
        self._groups = [*groups, *(["curves"] if with_curves else []), "machine"]
        self._as_json = as_json
        self._out = console()
        self._live = sys.stderr.isatty()
        self._now = ""
        self._curves = 0

    def begins(self, group: str) -> None:
        self._now = f"{group} ({self._groups.index(group) + 1} of {len(self._groups)})"
        if not self._live:
            note(f"measuring {self._now}")
        self._progress("…")

    def measured(self, one: Table) -> None:
        self._progress(None)
        if not self._as_json:
            self._out.print(render(one))
        self._progress(one.title)

    def curve(self, curve: dict[str, Any]) -> None:
        self._curves += 1
        self._progress(f"{self._curves} of {len(NAMES)} curves, the last: {curve['title']}")

    def failed(self, group: str, reason: str) -> None:
        self._progress(None)
        complain(f"{group} could not be measured to its end: {reason}")

    def _progress(self, what: str | None) -> None:
        """Rewrite the terminal's last line; None clears it."""
        if self._live:
            sys.stderr.write("\r\x1b[K" + ("" if what is None else f"shmroute: measuring {self._now}; done: {what}"))
            sys.stderr.flush()


# ------------------------------------------------------------------ showing


def number(value: float) -> str:
    """Three or four digits, for people."""
    if not math.isfinite(value):
        return "-"
    size = abs(value)
    if size >= 100 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}"


def render(one: Table) -> Grid:
    """A table for people."""
    grid = Grid(
        title=f"{one.title} ({one.unit})", title_justify="left", caption=one.note or None, caption_justify="left",
        box=SIMPLE_HEAD, padding=(0, 1), pad_edge=False,
    )  # fmt: skip
    grid.add_column("", overflow="fold")
    details = list(dict.fromkeys(name for figure in one.figures for name in figure.details))
    for heading in ("median", "p25 … p75", "÷ first", *details):
        grid.add_column(heading, justify="right", no_wrap=True)
    for figure in one.figures:
        spread = "" if figure.samples == 1 else f"{number(figure.p25)} … {number(figure.p75)}"
        grid.add_row(
            Text(figure.name),
            number(figure.median),
            spread,
            number(figure.ratio),
            *(number(figure.details[name]) if name in figure.details else "" for name in details),
        )
    return grid


def _print_end(report: Report, drawn: list[str]) -> None:
    out = console()
    for name, reason in report.absent.items():
        out.print(Text(f"not measured: {name} ({reason})", style="dim"), soft_wrap=True)
    for path in drawn:
        out.print(Text(f"drawn: {path}"), soft_wrap=True)
    machine = report.machine
    out.print(
        Text(
            f"{machine['processor']}, {machine['cores']} cores, load {machine['load']} before; "
            f"Python {machine['python']}, Numba {machine['numba']}; {report.seconds:.0f} s"
        ),
        soft_wrap=True,
    )


def _print_comparison(comparison: Comparison) -> None:
    """What changed beyond the noise, then how much did not."""
    out = console()
    grid = Grid(title="against the other run", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    grid.add_column("", overflow="fold")
    for heading in ("unit", "then", "now", "now ÷ then", "noise", ""):
        grid.add_column(heading, justify="right", no_wrap=True)
    beyond = [change for change in comparison.changes if change.verdict != "same"]
    for change in beyond:
        grid.add_row(
            Text(change.key), change.unit, number(change.then), number(change.now), f"{change.ratio:.3f}",
            f"±{change.noise:.0%}", Text(change.verdict, style=VERDICT_STYLES[change.verdict]),
        )  # fmt: skip
    if beyond:
        out.print(grid)
    out.print(f"{len(beyond)} of {len(comparison.changes)} figures changed beyond the noise")
    for what, keys in (("only then", comparison.only_then), ("only now", comparison.only_now)):
        if keys:
            out.print(Text(f"measured {what}: {', '.join(keys)}"), soft_wrap=True)
    for name, (then, now) in comparison.machine.items():
        if name != "load":
            out.print(
                Text(f"another machine or environment: {name} was {then}, is {now}", style="yellow"), soft_wrap=True
            )
