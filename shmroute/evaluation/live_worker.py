"""``python -m shmroute.evaluation.live_worker``: decodes one stream of every pool with the model itself.

The first line on standard input is a JSON object: what to evaluate on (the fields of `Task`), and which ``stream``.
Then, for each setting: ``{"runtime": name}``, answered by ``{"ready": true}`` once it is attached and loaded;
``{"go": true}``, answered by lines ``{"done": share}`` and at last ``{"losses": [pools]}``; ``{"leave": true}``,
answered by ``{"left": true}`` when it has detached. What goes wrong is answered by ``{"error": message}``.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

import shmroute
from shmroute.errors import ShmrouteError
from shmroute.evaluation.text import deal, read_texts
from shmroute.evaluation.worker import Reports, Task, say
from shmroute.integrations.transformers import load
from shmroute.sources.model_config import read_sizes

TIMEOUT = 60.0
"""Seconds to wait for an expert; a slow disk is no reason to end an evaluation."""


def decode(model: Any, windows: npt.NDArray[np.int64], reports: Reports) -> list[float]:
    """Mean cross-entropy of each window in nats per token, fed token by token as decoding is.

    Parameters
    ----------
    model : PreTrainedModel
    windows : ndarray
        int64 [pools, tokens]: each token is predicted from those before it in its window.
    reports : Reports
    """
    count, tokens = windows.shape
    losses = []
    for number, window in enumerate(windows):
        ids, cache, loss = torch.from_numpy(window), None, 0.0
        for position in range(tokens - 1):
            with torch.no_grad():
                result = model(ids[None, position : position + 1], past_key_values=cache, use_cache=True)
            cache = result.past_key_values
            logits = result.logits[0, -1].double()
            loss += float(logits.logsumexp(0) - logits[ids[position + 1]])
            reports((number * (tokens - 1) + position + 1) / (count * (tokens - 1)))
        losses.append(loss / (tokens - 1))
    return losses


def _expect(word: str) -> Any:
    """The value of the next message, which is of that kind; None if there is no next."""
    line = sys.stdin.readline()
    return json.loads(line)[word] if line else None


def main() -> None:
    """Serve until standard input ends."""
    transformers.utils.logging.disable_progress_bar()
    try:
        given = json.loads(sys.stdin.readline())
        stream, task = given.pop("stream"), Task(**given)
        vocabulary, _ = read_sizes(str(Path(task.checkpoint) / "config.json"))
        assert vocabulary is not None, "the command has looked"
        texts = read_texts(Path(task.text), Path(task.checkpoint), vocabulary)
        windows = deal(texts, Path(task.text), task.window, task.streams, task.pools)[:, stream]
        while (name := _expect("runtime")) is not None:
            with shmroute.attach(name) as runtime:
                model = load(task.checkpoint, runtime, timeout=TIMEOUT)
                say({"ready": True})
                _expect("go")
                say({"losses": decode(model, windows, Reports())})
                _expect("leave")  # until then, its memory is looked at
                del model
            say({"left": True})
    except (ShmrouteError, ImportError) as error:
        say({"error": f"{type(error).__name__}: {error}"})
    except BrokenPipeError:
        pass  # whoever asked is gone


if __name__ == "__main__":
    main()
