"""What a replay can ask for ahead of demand, by the names of ``--prefetch``.

| name | |
|---|---|
| `none` | nothing |
| `oracle` | what each worker's next layer will choose: the most that one layer of foresight could do |
| the pager's predictors, joined by ``+`` | what they propose and its arbiter takes (`shmroute.pager.prefetch`) |
"""

from __future__ import annotations

import itertools
from typing import Final

import numpy as np

from shmroute.errors import ConfigError
from shmroute.pager.prefetch.names import BY_PAGER, PREDICTORS
from shmroute.replay.accesses import Accesses
from shmroute.validation import require

NONE: Final = "none"
ORACLE: Final = "oracle"
BY_NAME: Final = tuple(name for name, predictor in PREDICTORS.items() if predictor in BY_PAGER)
"""Of predictors that need nothing but routing."""
CHOICES: Final = f"{NONE}, {ORACLE}, or some of {', '.join(BY_NAME)} joined by +"
"""For messages."""


def predictors_of(name: str) -> tuple[str, ...]:
    """The pager's predictors that a name stands for: none for `NONE` and `ORACLE`.

    Raises
    ------
    ConfigError
        If there are no such predictors, or one is named twice, or the gate is, which needs hidden states.
    """
    if name in (NONE, ORACLE):
        return ()
    found = tuple(part.strip() for part in name.split("+"))
    for part in found:
        if part == "gate":
            raise ConfigError("the predictor 'gate' needs hidden states, and a trace has only choices: leave it out")
        require(part in BY_NAME, f"there is no prefetching {part!r} in {name!r}; give {CHOICES}")
    require(len(set(found)) == len(found), f"{name!r} names a predictor twice")
    return found


def foreseen(accesses: Accesses) -> list[list[int]]:
    """For each step, the keys that the same worker wants in its next one."""
    found: list[list[int]] = [[] for _ in accesses.layers]
    for worker in range(accesses.num_workers):
        for step, following in itertools.pairwise(np.flatnonzero(accesses.workers == worker)):
            found[step] = accesses.keys[accesses.starts[following] : accesses.starts[following + 1]].tolist()
    return found
