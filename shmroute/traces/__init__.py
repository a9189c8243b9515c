"""Recordings of which experts a model chose, token by token.

A *trace* is an npz file (see `shmroute.traces.npz`): ``ids`` integer [tokens, layers, k], and beside it what was
recorded of ``weights``, ``logits`` and ``seq_id``, and ``meta``. `open_trace` reads it, and
formats of other programs.
"""

from shmroute.traces.formats import open_trace
from shmroute.traces.npz import save_trace
from shmroute.traces.trace import Trace

__all__ = ["Trace", "open_trace", "save_trace"]
