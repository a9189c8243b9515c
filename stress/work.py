"""The work: runs of recorded tokens, handed out until told to stop; each must be done, and done right."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from stress.errors import StressFailure
from stress.truth import Truth

ITEM_TOKENS = 8

TOLERANCE = 1e-3
"""Largest absolute error of an output element. Without a cache bonus only the order of additions differs."""


@dataclass(frozen=True)
class Item:
    """Tokens `first` … `first + count - 1` of the recording, through all layers."""

    number: int
    first: int
    count: int

    def line(self) -> str:
        """As a worker reads it."""
        return f"{self.number} {self.first} {self.count}\n"

    @classmethod
    def parse(cls, line: str) -> Item:
        """What `line` wrote."""
        return cls(*map(int, line.split()))


class WorkList:
    """Which items there are, who has which, and which are done.

    An item whose worker died goes to the front, for the next who is free.

    Parameters
    ----------
    truth : Truth
    results : Path
        Folder in which workers leave their results.

    Attributes
    ----------
    done, redone : int
        Items whose result was right; and those that had to be handed out more than once, because of a death.
    """

    def __init__(self, truth: Truth, results: Path) -> None:
        self._truth = truth
        self._results = results
        self._fresh = _endless_items(len(truth.hidden))
        self._again: deque[Item] = deque()
        self._out: dict[int, Item] = {}
        self._open = True
        self.done = 0
        self.redone = 0

    def take(self) -> Item | None:
        """The next item to do; None if there is none."""
        if not self._again and not self._open:
            return None
        item = self._again.popleft() if self._again else next(self._fresh)
        self._out[item.number] = item
        return item

    def give_back(self, item: Item) -> None:
        """Its worker died."""
        del self._out[item.number]
        self._again.appendleft(item)
        self.redone += 1

    def finish(self, item: Item) -> None:
        """Compare a finished item's result with the reference.

        Raises
        ------
        StressFailure
            If it is wrong.
        """
        path = result_path(self._results, item)
        with np.load(path) as file:
            outputs, choices = file["outputs"], file["choices"]
        path.unlink()
        rows = slice(item.first, item.first + item.count)
        wrong = np.argwhere(choices != self._truth.choices[rows])
        if len(wrong):
            token, layer, _ = wrong[0]
            raise StressFailure(
                f"token {item.first + token} chose other experts of layer {layer} than the reference: "
                f"{choices[token, layer].tolist()}, not {self._truth.choices[item.first + token, layer].tolist()}"
            )
        error = np.abs(outputs - self._truth.outputs[rows])
        if not error.max() <= TOLERANCE:
            token, layer, _ = np.unravel_index(int(np.argmax(error)), error.shape)
            raise StressFailure(
                f"the output of layer {layer} for token {item.first + token} is {error.max():.3g} off the reference"
            )
        del self._out[item.number]
        self.done += 1

    def close(self) -> None:
        """Hand out nothing new: only what the dead left."""
        self._open = False

    @property
    def outstanding(self) -> int:
        """Items begun and not done."""
        return len(self._out) + len(self._again)


def result_path(folder: Path, item: Item) -> Path:
    """Where an item's result is left."""
    return folder / f"{item.number}.npz"


def _endless_items(tokens: int) -> Iterator[Item]:
    """The recording from its start to its end, over and over."""
    numbers = itertools.count()
    while True:
        for first in range(0, tokens, ITEM_TOKENS):
            yield Item(next(numbers), first, min(ITEM_TOKENS, tokens - first))
