"""Perplexity over hit rate, one line for each rule and budget. Needs matplotlib: ``pip install 'shmroute[plots]'``."""

from __future__ import annotations

from pathlib import Path

from shmroute.evaluation.comparison import Outcome


def draw(lines: dict[str, list[Outcome]], title: str, path: Path) -> None:
    """Draw each rule's outcomes as one line, with the intervals, into a file.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    import matplotlib  # noqa: PLC0415

    matplotlib.use("Agg")  # no display is needed
    from matplotlib import pyplot  # noqa: PLC0415

    parts = [label.split(", ") for label in lines]  # rule, budget, and perhaps a policy
    rules, budgets = (list(dict.fromkeys(part[i] for part in parts)) for i in range(2))
    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    try:
        for label, outcomes in lines.items():
            ordered = sorted(outcomes, key=lambda one: one.hit_rate)
            rule, budget, *_ = label.split(", ")
            change = [100 * one.perplexity_change for one in ordered]
            axes.errorbar(
                [one.hit_rate for one in ordered],
                change,
                [
                    [100 * (one.perplexity_change - one.low) for one in ordered],
                    [100 * (one.high - one.perplexity_change) for one in ordered],
                ],
                color=f"C{rules.index(rule) % 10}", marker="os^Dv"[budgets.index(budget) % 5], markersize=4,
                capsize=2, linewidth=1, label=label,
            )  # fmt: skip
        axes.set(xlabel="hit rate", ylabel="perplexity, change in %", title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        figure.savefig(path, dpi=150)
    finally:
        pyplot.close(figure)
