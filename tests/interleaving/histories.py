"""What was called when, and whether some order of the calls explains the results (linearizability).

The check is Wing and Gong's search (J. Parallel Distrib. Comput. 17, 1993) with Lowe's memory of what has been tried
(Concurrency: Pract. Exper. 29, 2017). A call whose caller died has no return: it may have happened at any time after
it began, or never.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from .simulation import Simulation, require

Model = Callable[[Hashable, str, tuple[Any, ...]], tuple[Hashable, Any]]
"""(state, operation, arguments) -> (next state, result)."""

NEVER = 1 << 62


@dataclass(slots=True)
class Call:
    """One operation of one thread."""

    who: str
    operation: str
    arguments: tuple[Any, ...]
    invoked: int
    returned: int = NEVER
    result: Any = None

    def __str__(self) -> str:
        inside = ", ".join(map(str, self.arguments))
        after = "died" if self.returned == NEVER else f"{self.result} at {self.returned}"
        return f"{self.who}: {self.operation}({inside}) at {self.invoked} -> {after}"


@dataclass
class History:
    """The calls of one run.

    Parameters
    ----------
    simulation : Simulation
    """

    simulation: Simulation
    calls: list[Call] = field(default_factory=list)
    _stamps: itertools.count[int] = field(default_factory=itertools.count)

    def call(self, operation: str, function: Callable[..., Any], *arguments: Any, shown: tuple[Any, ...] = ()) -> Any:
        """Call a function and record it, with the arguments that the model gets."""
        thread = self.simulation.current
        assert thread is not None
        call = Call(thread.letter, operation, shown, next(self._stamps))
        self.calls.append(call)
        call.result = function(*arguments)
        call.returned = next(self._stamps)
        return call.result

    def check(self, model: Model, initial: Hashable) -> None:
        """Raise `Violation` unless the history is linearizable."""
        require(linearizable(self.calls, model, initial), "not linearizable:\n  " + "\n  ".join(map(str, self.calls)))


def linearizable(calls: list[Call], model: Model, initial: Hashable) -> bool:
    """Whether some order of the calls, true to their real-time order, gives every result by the model."""
    before = [sum(1 << j for j, other in enumerate(calls) if other.returned < call.invoked) for call in calls]
    completed = sum(1 << i for i, call in enumerate(calls) if call.returned != NEVER)
    tried: set[tuple[int, Hashable]] = set()
    todo: list[tuple[int, Hashable]] = [(0, initial)]
    while todo:
        taken, state = todo.pop()
        if taken & completed == completed:
            return True
        if (taken, state) in tried:
            continue
        tried.add((taken, state))
        for i, call in enumerate(calls):
            if taken >> i & 1 or before[i] & ~taken & completed:
                continue
            following, result = model(state, call.operation, call.arguments)
            if call.returned == NEVER or result == call.result:
                todo.append((taken | 1 << i, following))
    return False
