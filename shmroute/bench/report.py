"""What a run of the benchmarks found: figures in tables, as JSON and back, and the comparison of two runs."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shmroute.bench.measuring import Result, Summary
from shmroute.errors import ConfigError

FORMAT = 1
"""Of the JSON object; another one is not compared with."""

LOWER, HIGHER, NEITHER = "lower", "higher", "neither"

FLOOR = 0.05
"""Relative change of a sampled figure that is always noise: two runs of the same build differ by as much."""


@dataclass(frozen=True)
class Figure:
    """One row of a table.

    Attributes
    ----------
    name : str
    median, p25, p75 : float
        In the table's unit.
    samples : int
        1 for what was computed or counted and has no spread.
    ratio : float
        To the table's subject, round by round; 1 for the subject itself.
    details : dict
        Further values, by column.
    """

    name: str
    median: float
    p25: float
    p75: float
    samples: int
    ratio: float
    details: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """Figures that were measured together. The first one is the subject, the others are its peers.

    Attributes
    ----------
    key : str
        Stays the same from version to version.
    title, unit : str
    better : {"lower", "higher", "neither"}
    figures : tuple of Figure
    note : str
    """

    key: str
    title: str
    unit: str
    better: str
    figures: tuple[Figure, ...]
    note: str = ""


def table(key: str, title: str, unit: str, results: Sequence[Result], *, better: str = LOWER, note: str = "") -> Table:
    """A table of a contest's results."""
    figures = [
        Figure(
            result.name,
            result.summary.median,
            result.summary.p25,
            result.summary.p75,
            result.summary.samples,
            result.ratio.median,
            result.details,
        )
        for result in results
    ]
    return Table(key, title, unit, better, tuple(figures), note)


def exact(name: str, value: float, subject: float | None = None, **details: float) -> Figure:
    """A figure that was computed or counted."""
    ratio = 1.0 if subject is None else value / subject if subject else float(value == subject)
    return Figure(name, value, value, value, 1, ratio, details)


@dataclass
class Report:
    """All that a run found.

    Attributes
    ----------
    version : str
        Of this package.
    quick : bool
    machine : dict
        What the figures depend on besides.
    tables : dict
        By group.
    absent : dict
        Peers that were not measured, and why.
    failures : dict
        Groups that could not be measured, and why.
    curves : list
        Sweeps, if plots were asked for; see `shmroute.bench.curves`.
    seconds : float
        That it took.
    """

    version: str
    quick: bool
    machine: dict[str, Any]
    tables: dict[str, list[Table]] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    curves: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0

    def figures(self) -> Iterator[tuple[str, Table, Figure]]:
        """Every figure with its key."""
        for tables in self.tables.values():
            for one in tables:
                for figure in one.figures:
                    yield f"{one.key}/{figure.name}", one, figure

    def as_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return {"format": FORMAT} | dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Report:
        """Read what `as_dict` made.

        Raises
        ------
        ValueError
            If it is anything else; the message says what.
        """
        if not isinstance(data, dict) or "format" not in data or "tables" not in data:
            raise ValueError("it is no report of shmroute bench")
        if data["format"] != FORMAT:
            raise ValueError(f"it has format {data['format']!r}, and this version reads {FORMAT}; measure anew with it")
        try:
            fields = {key: value for key, value in data.items() if key != "format"}
            fields["tables"] = {
                str(group): [_read_table(one) for one in tables] for group, tables in data["tables"].items()
            }
            return cls(**fields)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"it is damaged: {error}") from error


def _read_table(data: Any) -> Table:
    figures = [Figure(**figure) for figure in data["figures"]]
    for figure in figures:
        numbers = (figure.median, figure.p25, figure.p75, figure.ratio, *figure.details.values())
        if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
            raise ValueError(f"a value of {figure.name!r} is no number")
        if not isinstance(figure.name, str) or type(figure.samples) is not int:
            raise TypeError("a figure's name or count is of another type")
    return Table(**(data | {"figures": tuple(figures)}))


def read_report(path: Path) -> Report:
    """Read a file that `save_report` wrote.

    Raises
    ------
    ConfigError
        If it cannot be read, or is anything else.
    """
    try:
        return Report.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # no JSON and no UTF-8 are ValueErrors too
        raise ConfigError(f"{path} cannot be compared with: {error}") from error


def check_savable(path: Path) -> None:
    """Find out before an hour of measuring whether a report could be saved.

    Raises
    ------
    ConfigError
        If not.
    """
    if path.is_dir():
        raise ConfigError(f"{path} is a folder; --save takes a file")
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent} is no folder; make it first, or save elsewhere")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"{path.parent} is not writable for this user; save elsewhere")


def save_report(report: Report, path: Path) -> None:
    """Write a report, whole or not at all: an older one under that name stays until then.

    Raises
    ------
    OSError
        As writing gave it.
    """
    descriptor, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(report.as_dict(), file, indent=1)
            file.write("\n")
        os.chmod(scratch, 0o644)
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise


# ---------------------------------------------------------- comparing


@dataclass(frozen=True)
class Change:
    """One figure in two runs.

    Attributes
    ----------
    key, unit : str
    then, now : float
        Medians.
    ratio : float
        now / then.
    noise : float
        Relative change up to which the two may be the same.
    verdict : {"same", "better", "worse", "changed"}
        "changed" where neither more nor less is better.
    """

    key: str
    unit: str
    then: float
    now: float
    ratio: float
    noise: float
    verdict: str


def noise_of(then: Figure, now: Figure) -> float:
    """Relative change that the spreads of two samplings explain.

    Each median may lie anywhere between its quartiles on another day of the same machine, so the two half-widths
    add up as independent errors do; and never less than `FLOOR`. What was counted or computed has no noise.
    """
    if then.samples == 1 and now.samples == 1:
        return 0.0
    widths = [(figure.p75 - figure.p25) / figure.median if figure.median else 0.0 for figure in (then, now)]
    return max(math.hypot(*widths), FLOOR)


def judge(then: Figure, now: Figure, better: str) -> tuple[float, float, str]:
    """Ratio now / then, noise and verdict of one figure."""
    noise = noise_of(then, now)
    if then.median <= 0 or now.median <= 0:  # no logarithm; both are counts or shares
        ratio = now.median / then.median if then.median else 1.0 if now.median == then.median else math.inf
        beyond = now.median != then.median and (then.samples == 1 or now.p25 > then.p75 or now.p75 < then.p25)
    else:
        ratio = now.median / then.median
        beyond = abs(math.log(ratio)) > math.log1p(noise)
    if not beyond:
        return ratio, noise, "same"
    if better == NEITHER:
        return ratio, noise, "changed"
    return ratio, noise, "better" if (now.median < then.median) == (better == LOWER) else "worse"


@dataclass(frozen=True)
class Comparison:
    """Two runs.

    Attributes
    ----------
    changes : list of Change
    only_then, only_now : list of str
        Keys that the other run lacks.
    machine : dict
        What differs between the machines: (then, now).
    """

    changes: list[Change]
    only_then: list[str]
    only_now: list[str]
    machine: dict[str, tuple[Any, Any]]

    def as_dict(self) -> dict[str, Any]:
        """JSON types only."""
        return dataclasses.asdict(self) | {
            "changes": [
                dataclasses.asdict(change) | {"ratio": change.ratio if math.isfinite(change.ratio) else None}
                for change in self.changes
            ]
        }


def compare(then: Report, now: Report) -> Comparison:
    """Compare what both runs measured."""
    before = {key: figure for key, _, figure in then.figures()}
    changes, only_now = [], []
    for key, one, figure in now.figures():
        if key not in before:
            only_now.append(key)
            continue
        ratio, noise, verdict = judge(before[key], figure, one.better)
        changes.append(Change(key, one.unit, before[key].median, figure.median, ratio, noise, verdict))
    measured = {key for key, _, _ in now.figures()}
    groups = set(now.tables)
    only_then = [
        key for group, tables in then.tables.items() if group in groups for key in _keys(tables) if key not in measured
    ]
    machine = {
        key: (then.machine.get(key), now.machine.get(key))
        for key in sorted(then.machine.keys() | now.machine.keys())
        if then.machine.get(key) != now.machine.get(key)
    }
    return Comparison(changes, only_then, only_now, machine)


def _keys(tables: Sequence[Table]) -> Iterator[str]:
    for one in tables:
        for figure in one.figures:
            yield f"{one.key}/{figure.name}"


def summary_figure(name: str, summary: Summary, ratio: float, **details: float) -> Figure:
    """A figure from a summary of one's own."""
    return Figure(name, summary.median, summary.p25, summary.p75, summary.samples, ratio, details)
