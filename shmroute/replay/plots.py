"""Hit rate over slots, one line for each policy. Needs matplotlib: ``pip install 'shmroute[plots]'``."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(result: dict[str, Any], directory: Path) -> Path:
    """Draw one trace's results, as ``shmroute replay --json`` has them, into ``directory/TRACE.png``; where that is."""
    import matplotlib  # noqa: PLC0415

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot  # noqa: PLC0415

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    lines: dict[str, list[tuple[int, float]]] = {}
    for outcome in result["results"]:
        lines.setdefault(outcome["policy"], []).append((outcome["slots"], outcome["hit_rate"]))
    for policy, points in lines.items():
        slots, rates = zip(*sorted(points), strict=True)
        axes.plot(slots, rates, marker="o", label=policy, linestyle="--" if policy == "belady" else "-")
    name = Path(result["trace"]).stem
    axes.set(
        xlabel=f"slots (of {result['num_layers'] * result['num_experts']} experts)",
        ylabel="hit rate",
        ylim=(0, 1),
        title=f"{name}, {result['tokens']} tokens, {result['workers']} workers",
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.png"
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return path
