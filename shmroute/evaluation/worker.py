"""``python -m shmroute.evaluation.worker``: runs settings, one after the other.

The first line on standard input is a JSON object: what to evaluate on (the fields of `Task`). Each further line is a
`Setting`; answered by lines ``{"done": share}`` and at last ``{"losses": …, "counts": …}`` as `Run` has them,
or ``{"error": message}``.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shmroute.errors import ShmrouteError
from shmroute.evaluation.decoder import Decoder
from shmroute.evaluation.loop import Setting, run
from shmroute.evaluation.text import deal, read_texts

REPORT_EVERY = 0.2
"""Seconds between two reports of progress."""


@dataclass(frozen=True)
class Task:
    """What to evaluate on.

    Attributes
    ----------
    checkpoint, text : str
        Paths.
    window, streams : int
    pools : int or None
        As in `shmroute.evaluation.text.deal`.
    """

    checkpoint: str
    text: str
    window: int
    streams: int
    pools: int | None


def say(message: dict[str, Any]) -> None:
    """Send a message, a line of JSON."""
    print(json.dumps(message), flush=True)


class Reports:
    """Says how far a run is, a few times a second."""

    def __init__(self) -> None:
        self._next = time.monotonic() + REPORT_EVERY

    def __call__(self, share: float) -> None:
        if time.monotonic() >= self._next:
            say({"done": share})
            self._next = time.monotonic() + REPORT_EVERY


def main() -> None:
    """Serve until standard input ends."""
    try:
        task = Task(**json.loads(sys.stdin.readline()))
        decoder = Decoder(Path(task.checkpoint))
        texts = read_texts(Path(task.text), Path(task.checkpoint), decoder.config.vocab_size)
        windows = deal(texts, Path(task.text), task.window, task.streams, task.pools)
        for line in sys.stdin:
            done = run(decoder, windows, Setting.from_json(line), Reports())
            say({"losses": done.losses.tolist(), "counts": done.counts.tolist()})
    except ShmrouteError as error:
        say({"error": f"{type(error).__name__}: {error}"})
    except BrokenPipeError:
        pass  # whoever asked is gone


if __name__ == "__main__":
    main()
