"""Compiled loops that only the measurements need.

They are compiled when they are first used, with the options of `shmroute.shared.kernel.kernel`, so that a call costs
what a call of a kernel costs, and kept where kernels are kept. The name of that folder follows from the sources of
kernels, of which this file is none; so each loop's own name is given a hash of this file, and an old one is not found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numpy as np
from numba import types

from shmroute.routing import plan_words as p
from shmroute.routing.plan import Plan, Turns
from shmroute.routing.publication import compose_maps, count_touched, forget_touched, publish_batch
from shmroute.routing.route import _choose
from shmroute.routing.scoring import softmax_weights
from shmroute.runtime import Runtime
from shmroute.shared.affinity import current_score
from shmroute.shared.atomic import WORD, address_of, cas, f32_array, i32_array, i64_array, load, store
from shmroute.shared.bell import heard
from shmroute.shared.kernel import _StampedCache, inner, signals_held
from shmroute.shared.layout import USE_AFFINITY, USE_BYTES
from shmroute.shared.parts import KernelCompiler
from shmroute.shared.ring import pop, push
from shmroute.shared.words import SCORE_ONE, low32

_I = types.int64
_F1, _I1 = types.float32[::1], types.int32[::1]
_F2, _I2 = types.float32[:, ::1], types.int32[:, ::1]
_TOKEN = _I(_I, _F1, _I1, _F1)
_BATCH = _I(_I, _F2, _I2, _F2)


class OnDemand:
    """A loop that is compiled when it is first asked for."""

    def __init__(self, function: Callable[..., Any], signature: Any) -> None:
        self._function, self._signature = function, signature
        self._compiled: Callable[..., Any] | None = None

    def compiled(self) -> Callable[..., Any]:
        """The loop."""
        if self._compiled is None:
            # By which Numba's cache finds it: `STAMP` knows nothing of this package's files.
            source = Path(self._function.__code__.co_filename).read_bytes()
            self._function.__qualname__ += f"_{hashlib.sha256(source).hexdigest()[:12]}"
            dispatcher = numba.njit(nogil=True, _nrt=False, pipeline_class=KernelCompiler)(self._function)
            dispatcher._cache = _StampedCache(dispatcher.py_func)
            with signals_held():
                dispatcher.compile(self._signature)
            self._compiled = dispatcher
        return self._compiled


def on_demand(signature: Any) -> Callable[[Callable[..., Any]], OnDemand]:
    """Make a function an `OnDemand`."""
    return lambda function: OnDemand(function, signature)


# ---------------------------------------------------------- routing


@on_demand(_TOKEN)
def bare_token(plan: int, logits: Any, experts: Any, weights: Any) -> int:
    """Nothing: what it costs to hand three arrays to compiled code."""
    return int(logits.shape[0] + experts.shape[0] + weights.shape[0])


@on_demand(_BATCH)
def bare_batch(plan: int, logits: Any, experts: Any, weights: Any) -> int:
    """`bare_token` for a batch."""
    return int(logits.shape[0] + experts.shape[0] + weights.shape[0])


class PrivatePlan:
    """A routing plan whose residency is private memory: what `select_token` and `eager_token` get the address of.

    Parameters
    ----------
    runtime : Runtime
        Gives the settings, and the affinity row on which `eager_token` does its work.
    """

    def __init__(self, runtime: Runtime) -> None:
        attachment = runtime._attachment
        segment = attachment.segment
        self._plan = Plan(segment, 0, attachment.lane().number, attachment.powers.ctypes.data, Turns(1))
        self._resident = np.zeros((segment.config.num_experts + 63) >> 6, np.int64)
        self._plan.words[p.RESIDENT] = self._resident.ctypes.data
        self._plan.words[p.MEMORY_AWARE] = 0
        self.address = self._plan.address


@inner
def _select(plan: int, logits: Any, experts: Any, weights: Any, tokens: int) -> int:
    """Choice and weights of every token, by the first pass of `shmroute.routing.route`: it records nothing."""
    words = i64_array(plan, p.PLAN_WORDS)
    return _choose(words, plan, address_of(logits), address_of(experts), address_of(weights), tokens)


@inner
def _decay_all(plan: int, experts_at: int, tokens: int) -> None:
    """The reference's rule: every score of the layer decays at every token, the chosen ones' then grow."""
    words = i64_array(plan, p.PLAN_WORDS)
    num_experts, k = words[p.NUM_EXPERTS], words[p.TOP_K]
    experts = i32_array(experts_at, tokens * k)
    for token in range(tokens):
        for expert in range(num_experts):
            boost = 0.0
            for rank in range(k):
                if experts[token * k + rank] == expert:
                    boost = 1.0
            address = words[p.USES] + expert * USE_BYTES + USE_AFFINITY
            while True:
                word = load(address)
                score = min(low32(word) / SCORE_ONE * 0.99 + boost, 1.0)
                if cas(address, word, int(score * SCORE_ONE)):
                    break


@on_demand(_TOKEN)
def select_token(plan: int, logits: Any, experts: Any, weights: Any) -> int:
    """Choice and weights of one token."""
    return int(_select(plan, logits, experts, weights, 1))


@on_demand(_BATCH)
def select_batch(plan: int, logits: Any, experts: Any, weights: Any) -> int:
    """Choice and weights of a batch."""
    return int(_select(plan, logits, experts, weights, logits.shape[0]))


@on_demand(_TOKEN)
def eager_token(plan: int, logits: Any, experts: Any, weights: Any) -> int:
    """The reference's routing of one token."""
    code = _select(plan, logits, experts, weights, 1)
    _decay_all(plan, experts.ctypes.data, 1)
    return int(code)


@on_demand(_BATCH)
def eager_batch(plan: int, logits: Any, experts: Any, weights: Any) -> int:
    """The reference's routing of a batch, token by token."""
    code = _select(plan, logits, experts, weights, logits.shape[0])
    _decay_all(plan, experts.ctypes.data, logits.shape[0])
    return int(code)


# ---------------------------------------------------------- ring


@on_demand(_I(_I, _I, _I))
def push_and_pop(ring: int, bits: int, count: int) -> int:
    """`count` times, push one and pop it."""
    taken = 0
    for i in range(count):
        push(ring, bits, i & 0xFFFF)
        taken += pop(ring, bits)
    return taken


@on_demand(_I(_I, _I, _I))
def fill(ring: int, bits: int, count: int) -> int:
    """Push `count`."""
    refused = 0
    for i in range(count):
        refused += push(ring, bits, i & 0xFFFF)
    return refused


@on_demand(_I(_I, _I, _I))
def empty(ring: int, bits: int, count: int) -> int:
    """Pop `count`."""
    taken = 0
    for _ in range(count):
        taken += pop(ring, bits)
    return taken


@on_demand(_I(_I, _I))
def listen_many(bell: int, count: int) -> int:
    """Look `count` times whether a bell wants ringing."""
    wanted = 0
    for _ in range(count):
        if heard(bell, 0) != 0:
            wanted += 1
    return wanted


@on_demand(_I(_I, _I))
def load_many(address: int, count: int) -> int:
    """`count` atomic loads of one word: the least that any look at shared memory costs."""
    total = 0
    for _ in range(count):
        total += load(address) & 1
    return total


# ---------------------------------------------------------- lines


@on_demand(_I(_I, _I, _I, _I))
def play_ping_pong(address: int, side: int, first: int, last: int) -> int:
    """From exchange `first` to before `last`: wait for the other side's number in a word and write the next."""
    for i in range(first, last):
        while load(address) != 2 * i + side:
            pass
        store(address, 2 * i + side + 1)
    return last - first


@on_demand(_I(_I, _F2, _I2, _F2, _I, _I))
def prepare_publication(plan: int, logits: Any, experts: Any, weights: Any, weigh: int, count: int) -> int:
    """`count` times what routing does between asking for the lines of some tokens and changing the first of them.

    With `weigh` 1 that includes their weights, as it does for tokens that are not put off.
    """
    words = i64_array(plan, p.PLAN_WORDS)
    tokens, num_experts, k = logits.shape[0], words[p.NUM_EXPERTS], words[p.TOP_K]
    at, row_bytes = weights.ctypes.data, num_experts * 4
    count_touched(words, experts.ctypes.data, tokens)
    for _ in range(count):
        if weigh == 1:
            for token in range(tokens):
                row_at, own = logits.ctypes.data + token * row_bytes, token * k * 4
                softmax_weights(row_at, num_experts, experts.ctypes.data + own, k, True, at + own)
        compose_maps(words, experts.ctypes.data, tokens)
    forget_touched(words, words[p.TOUCHED_COUNT])
    return count


@on_demand(_I(_I, _I2, _I))
def publish_many(plan: int, experts: Any, count: int) -> int:
    """`count` publications of the same tokens."""
    words = i64_array(plan, p.PLAN_WORDS)
    for _ in range(count):
        count_touched(words, experts.ctypes.data, experts.shape[0])
        publish_batch(words, experts.ctypes.data, experts.shape[0])
    return count


# ---------------------------------------------------------- residency, leases, affinity


@on_demand(_I(_I, _I, _I, _I))
def check_residency(row: int, scratch: int, num_experts: int, count: int) -> int:
    """`count` times: load a word of the residency bitmap and look at one expert's bit."""
    found = 0
    snapshot = i64_array(scratch, (num_experts + 63) >> 6)
    expert = 0
    for _ in range(count):
        word = expert >> 6
        snapshot[word] = load(row + word * WORD)
        found += (snapshot[word] >> (expert & 63)) & 1
        expert += 1
        if expert == num_experts:
            expert = 0
    return found


@on_demand(_I(_I, _I, _I))
def check_plain(bits: int, num_experts: int, count: int) -> int:
    """`count` looks at a private array, with nothing atomic about them."""
    found = 0
    snapshot = i64_array(bits, (num_experts + 63) >> 6)
    expert = 0
    for _ in range(count):
        found += (snapshot[expert >> 6] >> (expert & 63)) & 1
        expert += 1
        if expert == num_experts:
            expert = 0
    return found


@on_demand(types.float64(_I, _I, _I, _I, _I, _I))
def snapshot_affinity(row: int, clock: int, table: int, num_experts: int, out: int, count: int) -> float:
    """`count` snapshots of a layer's scores into float32 [num_experts] at `out`."""
    scores = f32_array(out, num_experts)
    total = 0.0
    for _ in range(count):
        for expert in range(num_experts):
            scores[expert] = current_score(row + expert * USE_BYTES, clock, table)
        total += scores[0]
    return total


@on_demand(types.float64(_I, _I, _I, _I))
def copy_words(row: int, num_experts: int, out: int, count: int) -> float:
    """`count` plain copies of as many words, turned into float32 at `out`: no clock, no decay, nothing atomic."""
    words = i64_array(row, num_experts * (USE_BYTES // WORD))
    scores = f32_array(out, num_experts)
    total = 0.0
    for _ in range(count):
        for expert in range(num_experts):
            scores[expert] = (words[expert * (USE_BYTES // WORD)] & 0xFFFFFFFF) / SCORE_ONE
        total += scores[0]
    return total
