"""Curves as PNG files, by matplotlib (the extra ``[plots]``)."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shmroute.errors import ConfigError
from shmroute.extras import check_installed


def check_plottable(folder: Path) -> None:
    """Find out before measuring whether curves could be drawn into a folder, which is made if need be.

    Raises
    ------
    ConfigError
        If not.
    """
    check_installed("plots", "--plots")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the folder {folder} cannot be made: {error.strerror or error}") from error


def draw(curves: Iterable[dict[str, Any]], folder: Path) -> list[Path]:
    """Draw each curve into a file of its own; which files.

    Raises
    ------
    OSError
        As writing gave it.
    """
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = importlib.import_module("matplotlib.pyplot")
    written = []
    for curve in curves:
        figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        spread = False
        for name, series in curve["series"].items():
            (line,) = axes.plot(series["x"], series["median"], marker="o", markersize=4, label=name)
            axes.fill_between(series["x"], series["p25"], series["p75"], alpha=0.2, color=line.get_color(), linewidth=0)
            spread = spread or series["p25"] != series["p75"]
        _scale(axes, curve, matplotlib.ticker)
        for label, x in curve["marks"]:
            axes.axvline(x, color="grey", linestyle=":", linewidth=1)
            axes.annotate(
                f" {label}", (x, 0.01), xycoords=("data", "axes fraction"), rotation=90, fontsize=8, color="grey"
            )
        axes.set(title=curve["title"], ylabel=curve["y"])
        axes.set_xlabel(curve["x"] + ("  (points: median; bands: quartiles)" if spread else ""))
        axes.grid(True, which="both", alpha=0.25)
        axes.legend(frameon=False, fontsize=9)
        path = folder / f"{curve['name']}.png"
        figure.savefig(path, dpi=110)
        pyplot.close(figure)
        written.append(path)
    return written


def _scale(axes: Any, curve: dict[str, Any], ticker: Any) -> None:
    """Ticks where something was measured, and plain numbers for people."""
    plain = ticker.FuncFormatter(lambda value, _: f"{value:,.10g}")
    if "x" in curve["log"]:
        axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({x for series in curve["series"].values() for x in series["x"]}))
    axes.xaxis.set_major_formatter(plain)
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    if "y" in curve["log"]:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5), numticks=20))
        axes.yaxis.set_minor_locator(ticker.LogLocator(subs=tuple(range(1, 10)), numticks=20))
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(plain)
