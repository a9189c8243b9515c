"""Schedules as strings: who made each step of a run, so that one command makes the very same run again.

``a12bA3c~a`` reads: thread a made twelve steps, b one, process A died, c made … A thread's step goes from one switch
point to just before the next. Threads are lower-case letters in the order in which they began, processes upper-case
ones; ``~a`` lets the oldest store in a's store buffer reach memory. The choice of a thread that waits, and whose wait
has not come true, is its timeout. ``a12`` is twelve steps; without a number it is one.
"""

from __future__ import annotations

import itertools
import re

_TOKEN = re.compile(r"(~?[a-z]|[A-Z])(\d*)")


def encode(decisions: list[str]) -> str:
    """The string of a run's decisions, each a letter or ``~`` and a letter."""
    runs = ((token, len(list(group))) for token, group in itertools.groupby(decisions))
    return "".join(token if count == 1 else f"{token}{count}" for token, count in runs)


def decode(schedule: str) -> list[str]:
    """The decisions of a string.

    Raises
    ------
    ValueError
        If it is no schedule.
    """
    decisions: list[str] = []
    position = 0
    while position < len(schedule):
        match = _TOKEN.match(schedule, position)
        if match is None:
            raise ValueError(f"no schedule: {schedule[position : position + 10]!r} at character {position} is no step")
        decisions += [match[1]] * int(match[2] or 1)
        position = match.end()
    return decisions
