"""Affinity: how much each expert was used of late, with lazy decay and one CAS per expert per batch.

The rule (the reference's): at every tick of a layer, which is one routed token, every score is multiplied by `decay`;
an activated expert's then grows by `boost`, clamped to `max_score`. Decaying every word at every tick would cost E
compare-and-swaps a token. Here a word carries the tick at which its score was true, and whoever reads it multiplies
by ``decay^(clock - tick)``.

What one tick does to an activated score is a map ``x -> min(c, a x + b)``, and such maps compose into the same form, so
a batch of T tokens is one map, and one CAS, for each expert that it touches. The clock advances by T in one
`fetch_add`, which gives the batch its own ticks [s, e).

*Late batches.* A batch with ticks [s, e) may meet a word that another worker has stamped with tick w > s. The score
must not decay twice, so the batch's own worth ``f(0)`` is added, each part decayed only by what it lacks:
``x <- min(max, x d^max(0, e-w) + f(0) d^max(0, w-e))`` at tick ``max(w, e)``. In clock order the result is exactly the
sequential one. Otherwise it is never below x decayed to that tick, nor below the batch's own worth, nor above their
clamped sum.

*Ticks are 32 bits, the clock 64.* Each attempt loads the word **first**, then the clock: the word's tick is then the
clock's low half less an age under 2^32. A batch loads all its words before it takes its ticks, so what the clock was
then serves for the first attempt at each of them: the line of the clock, which every worker of a layer changes, comes
once for a batch rather than once for each expert. A layer is restamped whenever its clock crosses a multiple of 2^28,
by whoever moved it across, so no word that a CAS can still succeed on is older than that; a worker that sleeps between
its two loads fails its CAS, since the word was restamped meanwhile.

| who | calls | progress |
|---|---|---|
| any worker | `advance_clock`, `activate`, `restamp` | lock-free: obstructed only by changes of the same word |
| anybody | `scores_into` | wait-free |

Death windows: between the clock and the last word of a batch, a dead worker leaves some of its experts not activated,
which is a lost hint; between crossing 2^28 and the end of a restamp, the layer is restamped at the next crossing,
fifteen of which may be missed before an age could be mistaken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
from numba import types

from shmroute.shared.atomic import cas, f64_array, fetch_add, i64_array, load
from shmroute.shared.kernel import inner, kernel
from shmroute.shared.layout import LINE, USE_ACTIVATIONS, USE_AFFINITY, USE_BYTES
from shmroute.shared.words import LOW32, RESTAMP_BITS, SCORE_ONE, high32, low32, pack_affinity

if TYPE_CHECKING:
    from shmroute.attachment import Attachment

POWER_BITS: Final = 8
POWERS: Final = 1 << POWER_BITS
POWER_TABLES: Final = 4
"""`decay_power` reads a 32-bit age as four digits of eight bits, with a table of powers for each."""

NO_CLAMP: Final = 1e300
"""The `c` of a map that does not clamp: larger than any score."""


def power_table(decay: float) -> npt.NDArray[np.float64]:
    """float64 [POWER_TABLES × POWERS]: entry ``t * POWERS + i`` is ``decay^(i * 2^(8 t))``."""
    exponents = np.arange(POWERS, dtype=np.float64)[None, :] * (float(POWERS) ** np.arange(POWER_TABLES))[:, None]
    with np.errstate(under="ignore"):
        return np.power(decay, exponents).ravel()


@inner
def decay_power(table: int, age: int) -> float:
    """``decay^age`` for an age in [0, 2^32), from the table at an address."""
    powers = f64_array(table, POWERS * POWER_TABLES)
    result = float(powers[age & (POWERS - 1)])
    age >>= POWER_BITS
    base = POWERS
    while age > 0:
        result *= powers[base + (age & (POWERS - 1))]
        age >>= POWER_BITS
        base += POWERS
    return result


@inner
def score_of(word: int) -> float:
    """A word's score at its own tick, 0 … 1."""
    return low32(word) / SCORE_ONE


@inner
def to_score(value: float) -> int:
    """The nearest fixed-point score of a value, clamped to 0 … 1."""
    return min(int(value * SCORE_ONE + 0.5), SCORE_ONE)


@inner
def age_of(word: int, clock: int) -> int:
    """Ticks since a word was true. `clock` must have been loaded after `word`."""
    return (clock - high32(word)) & LOW32


@inner
def current_score(word_address: int, clock_address: int, table: int) -> float:
    """An expert's score at the layer's present tick."""
    word = load(word_address)
    return score_of(word) * decay_power(table, age_of(word, load(clock_address)))


@inner
def advance_clock(clock: int, ticks: int) -> int:
    """Take `ticks` ticks of a layer's clock; the first of them."""
    return fetch_add(clock, ticks)


@inner
def crosses_restamp(start: int, ticks: int) -> bool:
    """Whether ticks [start, start + ticks) move the clock over a multiple of 2^28."""
    return (start >> RESTAMP_BITS) != ((start + ticks) >> RESTAMP_BITS)


@inner
def activate(
    word_address: int, clock_address: int, table: int, start: int, end: int, b: float, c: float, max_score: float
) -> None:
    """`activate_from`, whatever the word is."""
    word = load(word_address)
    clock = load(clock_address)  # after the word: see the file's head
    activate_from(word, clock, word_address, clock_address, table, start, end, b, c, max_score)


@inner
def activate_from(
    word: int, clock: int, word_address: int, clock_address: int, table: int, start: int, end: int, b: float, c: float,
    max_score: float,
) -> None:  # fmt: skip
    """Apply a batch's map ``x -> min(c, decay^(end - start) x + b)`` to one expert.

    Parameters
    ----------
    word, clock : int
        What its affinity word was, and what the layer's clock was later than that.
    word_address, clock_address, table : int
        Addresses of the two, and of the power table.
    start, end : int
        The batch's ticks [start, end), 64-bit.
    b, c : float
        The composed map.
    max_score : float
        Clamp of a late batch.
    """
    while True:
        tick = clock - age_of(word, clock)
        score = score_of(word)
        if tick <= start:
            score = min(c, score * decay_power(table, end - tick) + b)
            tick = end
        else:
            worth = min(c, b)
            if tick <= end:
                score = score * decay_power(table, end - tick) + worth
                tick = end
            else:
                score = score + worth * decay_power(table, tick - end)
            score = min(score, max_score)
        if cas(word_address, word, pack_affinity(tick, to_score(score))):  # linearization point
            return
        word = load(word_address)
        clock = load(clock_address)  # after the word


@inner
def restamp(row: int, clock_address: int, table: int, num_experts: int) -> None:
    """Bring every word of a layer to the present tick, scores rounded down."""
    for expert in range(num_experts):
        address = row + expert * USE_BYTES
        while True:
            word = load(address)
            clock = load(clock_address)
            score = int(low32(word) * decay_power(table, age_of(word, clock)))
            if cas(address, word, pack_affinity(clock & LOW32, score)):
                break


@inner
def count_activation(activations_address: int, times: int) -> None:
    """Add to an expert's total."""
    fetch_add(activations_address, times)


@kernel(types.void(types.int64, types.int64, types.int64, types.float32[::1]))
def scores_into(row: int, clock_address: int, table: int, scores: npt.NDArray[np.float32]) -> None:
    """Write the present score of each expert of a layer to float32 [E]."""
    for expert in range(scores.shape[0]):
        scores[expert] = current_score(row + expert * USE_BYTES, clock_address, table)


@kernel(types.void(types.int64, types.int64[::1]))
def totals_into(row: int, totals: npt.NDArray[np.int64]) -> None:
    """Write how often each expert of a layer was activated to int64 [E]."""
    for expert in range(totals.shape[0]):
        totals[expert] = load(row + expert * USE_BYTES + USE_ACTIVATIONS)


@kernel(
    types.void(
        types.int64, types.int64, types.int64, types.int64, types.int64, types.int64, types.float64, types.float64
    )
)
def update_layer(
    row: int, clock_address: int, table: int, num_experts: int, ids: int, count: int, boost: float, max_score: float
) -> None:
    """One tick that activates int64 [count] experts at `ids`."""
    start = advance_clock(clock_address, 1)
    experts = i64_array(ids, count)
    for i in range(count):
        use = row + experts[i] * USE_BYTES
        activate(use + USE_AFFINITY, clock_address, table, start, start + 1, boost, max_score, max_score)
        count_activation(use + USE_ACTIVATIONS, 1)
    if crosses_restamp(start, 1):
        restamp(row, clock_address, table, num_experts)


def checked_ids(experts: Sequence[int] | npt.NDArray[np.integer], num_experts: int) -> npt.NDArray[np.int64]:
    """A new int64 array of expert ids, each in [0, num_experts).

    Raises
    ------
    ValueError
        If one is not.
    """
    array = np.asarray(experts)
    if array.size == 0:
        return np.empty(array.shape, np.int64)
    if array.dtype.kind not in "iu":
        raise ValueError(f"expert ids must be integers, not {array.dtype}")
    if array.min() < 0 or array.max() >= num_experts:
        bad = int(array[(array < 0) | (array >= num_experts)].ravel()[0])
        raise ValueError(f"expert id {bad} is outside 0 … {num_experts - 1}")
    return array.astype(np.int64, order="C")


class ExpertAffinity:
    """The affinity of one layer's experts, shared by all workers.

    Parameters
    ----------
    attachment : Attachment
    layer : int
        MoE layer, counted from 0.
    """

    def __init__(self, attachment: Attachment, layer: int) -> None:
        self._attachment = attachment
        self._config = attachment.segment.config
        self._num_experts = self._config.num_experts
        layout, base = attachment.segment.layout, attachment.segment.address
        self._layer = layer
        self._row = base + layout.use_row(layer)
        self._clock = base + layout.clock + layer * LINE
        self._powers: int = attachment.powers.ctypes.data

    def scores(self) -> npt.NDArray[np.float32]:
        """float32 [E]: every score at the layer's present tick, 0 … max_score."""
        out = np.empty(self._num_experts, np.float32)
        with self._attachment.in_use():
            self._attachment.record_pending(self._layer)
            scores_into(self._row, self._clock, self._powers, out)
        return out

    def score(self, expert: int) -> float:
        """One expert's score at the present tick.

        Raises
        ------
        ValueError
            If there is no such expert.
        """
        if type(expert) is not int or not 0 <= expert < self._num_experts:
            checked_ids([expert], self._num_experts)
        return float(self.scores()[expert])

    def activations(self) -> npt.NDArray[np.int64]:
        """int64 [E]: how often each expert was chosen since the segment was made."""
        out = np.empty(self._config.num_experts, np.int64)
        with self._attachment.in_use():
            self._attachment.record_pending(self._layer)
            totals_into(self._row, out)
        return out

    def top(self, k: int) -> list[int]:
        """The k experts of highest score (all, if there are fewer), best first; ties go to the lower id.

        Raises
        ------
        ValueError
            If k is negative.
        """
        if k < 0:
            raise ValueError(f"k must be 0 or more, not {k}")
        return [int(expert) for expert in np.argsort(-self.scores(), kind="stable")[:k]]

    def update(self, experts: Sequence[int] | npt.NDArray[np.integer]) -> None:
        """One tick that activates some experts, as routing one token to them would.

        Parameters
        ----------
        experts : sequence of int
            Each at most once.

        Raises
        ------
        ValueError
            If an id is impossible or appears twice; nothing has changed.
        """
        ids = checked_ids(experts, self._num_experts).ravel()
        if len(set(ids.tolist())) != len(ids):
            raise ValueError(f"an expert is activated once a tick, but {ids.tolist()} names one twice")
        affinity = self._config.affinity
        with self._attachment.in_use():
            self._attachment.record_pending(self._layer)
            update_layer(
                self._row, self._clock, self._powers, self._num_experts,
                ids.ctypes.data, len(ids), affinity.activation_boost, affinity.max_score,
            )  # fmt: skip
