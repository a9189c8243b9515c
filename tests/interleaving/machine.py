"""Memory as simulated processes see it: what carries out the interpreted kernels' operations.

`Memory` is sequentially consistent: each operation takes effect at once. `StoreBuffers` is x86 TSO (Owens, Sarkar and
Sewell, TPHOLs 2009): a store that is not sequentially consistent (`store_release`, which only mutants use) waits in its
thread's buffer, is seen by that thread, and reaches memory in order, some time; everything else empties the buffer
first, as locked instructions and ``xchg`` do.

Sequential consistency hides a store that stays behind a later load. These are the pairs of store and load on which
correctness rests; in brackets what keeps them in order on x86, and the mutant that shows it:

- *bell-A / bell-B*: the pager stores its bell, then loads the ring and what ended; a worker publishes an entry, then
  loads the bell. (seq_cst store / CAS: "non-seq_cst arm")
- *lane bell / expert word*: a waiter stores its lane's bell, then loads the word; the pager publishes the word, then
  loads wait words and bells. (seq_cst store / CAS: "non-seq_cst arm, of lanes and hungry pagers")
- *mask / HUNGRY*: a pager without a slot stores its bell, then loads masks, wait words; a worker clears its bit, then
  loads the bell. (seq_cst store / locked and: the same mutant, and "hungry without another look")
- *wait word / HUNGRY* and *wait word / expert word*: a waiter stores its wait word and its lane's bell, then loads the
  pager's bell, or the expert word. (Two seq_cst stores, of which one suffices: no mutant of one store shows it.)
- *lane claim / header state*: a worker claims its lane, then loads the state; a remover claims that, then loads the
  lanes. (CAS / CAS, which x86 cannot reorder. That each side looks again is shown by "lane without another look" and
  "removal without another look".)

Every operation is a switch point, before it takes effect. The words are those of the segment itself, read and written
through ctypes: only one simulated thread is ever at work, so each access is atomic already.
"""

from __future__ import annotations

import ctypes
from typing import Any

from shmroute.shared.atomic import signed

from .simulation import SimThread, Simulation


class _Cells(dict[int, Any]):
    """Words by address."""

    def __missing__(self, address: int) -> Any:
        cell = self[int(address)] = ctypes.c_int64.from_address(int(address))
        return cell


class Memory:
    """Sequentially consistent memory.

    Parameters
    ----------
    simulation : Simulation
    """

    def __init__(self, simulation: Simulation) -> None:
        self._simulation = simulation
        self._point = simulation.point
        self._changed = simulation.changed
        self._cells = _Cells()

    def load(self, address: int) -> int:
        self._point()
        return self._cells[address].value  # type: ignore[no-any-return]

    def store(self, address: int, value: int) -> None:
        self._point()
        self._drain()
        self._changed()
        self._cells[address].value = int(value)

    def exchange(self, address: int, value: int) -> int:
        self._point()
        self._drain()
        self._changed()
        cell = self._cells[address]
        former, cell.value = cell.value, int(value)
        return former  # type: ignore[no-any-return]

    def cas(self, address: int, expected: int, desired: int) -> bool:
        self._point()
        self._drain()
        cell = self._cells[address]
        if cell.value != signed(expected):
            return False
        self._changed()
        cell.value = int(desired)
        return True

    def fetch_add(self, address: int, value: int) -> int:
        former = self.exchange(address, 0)
        self._cells[address].value = former + int(value)
        return former

    def fetch_and(self, address: int, mask: int) -> int:
        former = self.exchange(address, 0)
        self._cells[address].value = former & int(mask)
        return former

    def fetch_or(self, address: int, mask: int) -> int:
        former = self.exchange(address, 0)
        self._cells[address].value = former | int(mask)
        return former

    def _drain(self) -> None:
        """Let this thread's own stores reach memory, before an operation that is sequentially consistent."""


class StoreBuffers(Memory):
    """x86 TSO."""

    def __init__(self, simulation: Simulation) -> None:
        super().__init__(simulation)
        self._buffers: dict[SimThread, list[tuple[int, int]]] = {}
        simulation.buffers = self

    def load(self, address: int) -> int:
        self._point()
        own = self._buffers.get(self._simulation.current)  # type: ignore[arg-type]
        for buffered, value in reversed(own or ()):
            if buffered == address:
                return value
        return self._cells[address].value  # type: ignore[no-any-return]

    def store_release(self, address: int, value: int) -> None:
        """A store that is not sequentially consistent, as ``mov`` makes it."""
        self._point()
        self._changed()
        thread = self._simulation.current
        assert thread is not None
        self._buffers.setdefault(thread, []).append((address, int(value)))

    def pending(self) -> list[SimThread]:
        """The threads with stores that have not reached memory."""
        return [thread for thread, stores in self._buffers.items() if stores]

    def flush_one(self, thread: SimThread) -> None:
        """Let a thread's oldest buffered store reach memory. The buffers of the dead drain too."""
        address, value = self._buffers[thread].pop(0)
        self._cells[address].value = value

    def flush_all(self) -> None:
        """Let all stores reach memory."""
        for thread in self.pending():
            while self._buffers[thread]:
                self.flush_one(thread)

    def _drain(self) -> None:
        thread = self._simulation.current
        if thread is not None and self._buffers.get(thread):
            while self._buffers[thread]:
                self.flush_one(thread)
