"""Pictures of a replay. Drawing needs matplotlib: ``pip install 'shmroute[plots]'``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from shmroute.replay.prefetching import NONE
from shmroute.traces.trace import Trace

COLUMNS = 200
"""Of a timeline, at most."""


def draw_hit_rates(result: dict[str, Any], directory: Path) -> Path:
    """Draw hit rate over slots, a line for each policy and prefetching, into ``directory/TRACE.png``; where that is.

    Parameters
    ----------
    result : dict
        One trace's results, as ``shmroute replay --json`` has them.
    directory : Path
        Made if need be.
    """
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    lines: dict[str, list[tuple[int, float]]] = {}
    for outcome in result["results"]:
        ahead = "" if outcome["prefetch"] == NONE else f", {outcome['prefetch']} ahead"
        lines.setdefault(outcome["policy"] + ahead, []).append((outcome["slots"], outcome["hit_rate"]))
    for label, points in lines.items():
        slots, rates = zip(*sorted(points), strict=True)
        axes.plot(slots, rates, marker="o", label=label, linestyle="--" if label == "belady" else "-")
    name = Path(result["trace"]).stem
    axes.set(
        xlabel=f"slots (of {result['num_layers'] * result['num_experts']} experts)",
        ylabel="hit rate",
        ylim=(0, 1),
        title=f"{name}, {result['tokens']} tokens, {result['workers']} workers",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return _saved(pyplot, figure, directory / f"{name}.png")


def timeline(trace: Trace, columns: int = COLUMNS) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64] | None]:
    """How experts fared over time, in at most `columns` spans of equally many tokens.

    Returns
    -------
    chosen : ndarray
        float64 [layers, experts, spans]: the share of a span's tokens that chose the expert.
    resident : ndarray or None
        Likewise, for which it was resident; None if that was not recorded.
    """
    tokens, layers, k = trace.ids.shape
    spans = min(tokens, columns)
    span = np.arange(tokens) * spans // tokens
    length = np.bincount(span)
    chosen = np.zeros((layers, trace.num_experts + 1, spans))  # the last stands for what was not recorded
    ids = np.where(trace.ids < 0, trace.num_experts, trace.ids)
    at = (np.tile(np.repeat(np.arange(layers), k), tokens), ids.ravel(), np.repeat(span, layers * k))
    np.add.at(chosen, at, 1)
    if trace.resident is None:
        return chosen[:, :-1] / length, None
    bits = np.unpackbits(trace.resident, axis=2, bitorder="little", count=trace.num_experts)
    present = np.add.reduceat(bits, np.flatnonzero(np.diff(span, prepend=-1)), axis=0, dtype=np.float64)
    return chosen[:, :-1] / length, present.transpose(1, 2, 0) / length


def draw_timeline(trace: Trace, directory: Path) -> Path:
    """Draw heat maps of all layers' experts over time into ``directory/TRACE-timeline.png``; where that is.

    How often each was chosen, and below it how long it was resident, if that was recorded.
    """
    pyplot = _pyplot()
    maps = [("chosen", timeline(trace)[0]), ("resident", timeline(trace)[1])]
    shown = [(what, shares) for what, shares in maps if shares is not None]
    figure, every = pyplot.subplots(len(shown), 1, figsize=(9, 4 * len(shown)), layout="constrained", squeeze=False)
    for axes, (what, shares) in zip(every[:, 0], shown, strict=True):
        image = axes.imshow(
            shares.reshape(-1, shares.shape[2]), aspect="auto", interpolation="nearest", vmin=0,
            extent=(0, trace.num_tokens, trace.num_layers, 0),
        )  # fmt: skip
        axes.set(xlabel="token", ylabel=f"layer ({trace.num_experts} experts each)", title=f"{trace.name}: {what}")
        figure.colorbar(image, ax=axes, label="share of tokens")
    return _saved(pyplot, figure, directory / f"{trace.name}-timeline.png")


def _pyplot() -> Any:
    import matplotlib  # noqa: PLC0415

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot  # noqa: PLC0415

    return pyplot


def _saved(pyplot: Any, figure: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
