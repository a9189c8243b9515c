"""Curves as PNG files, by matplotlib (the extra ``[plots]``)."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shmroute.errors import ConfigError


def check_plottable(folder: Path) -> None:
    """Find out before measuring whether curves could be drawn into a folder, which is made if need be.

    Raises
    ------
    ConfigError
        If not.
    """
    try:
        importlib.import_module("matplotlib")
    except ImportError as error:
        raise ConfigError(f"--plots needs matplotlib ({error}): pip install 'shmroute[plots]'") from error
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
        for name, series in curve["series"].items():
            (line,) = axes.plot(series["x"], series["median"], marker="o", markersize=4, label=name)
            axes.fill_between(series["x"], series["p25"], series["p75"], alpha=0.2, color=line.get_color(), linewidth=0)
        if "x" in curve["log"]:
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
        if "y" in curve["log"]:
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.set(title=curve["title"], xlabel=curve["x"], ylabel=curve["y"])
        axes.grid(True, which="both", alpha=0.25)
        axes.legend(frameon=False)
        path = folder / f"{curve['name']}.png"
        figure.savefig(path, dpi=130)
        pyplot.close(figure)
        written.append(path)
    return written
