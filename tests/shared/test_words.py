"""Words: what is packed is unpacked, and compiled code sees the same bits as Python."""

from __future__ import annotations

import numba
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shmroute.shared import words as w


def of_bits(bits: int) -> st.SearchStrategy[int]:
    """Everything that fits a field, its edges often."""
    return st.one_of(st.sampled_from([0, 1, (1 << bits) - 1]), st.integers(0, (1 << bits) - 1))


ANY_WORD = st.one_of(st.sampled_from([0, -1, 2**63 - 1, -(2**63)]), st.integers(-(2**63), 2**63 - 1))


@numba.njit
def compiled_packs(tick: int, score: int, state: int, priority: int, slot: int, mask: int) -> tuple[int, int]:
    return w.pack_affinity(tick, score), w.pack_expert(state, priority, slot, mask)


@numba.njit
def compiled_other_packs(
    layer: int, expert: int, lane: int, epoch: int, generation: int, start: int, pid: int
) -> tuple[int, int, int, int]:
    return (
        w.pack_request(layer, expert, w.PAGE_OUT, w.URGENT, lane),
        w.pack_wait(layer, expert),
        w.pack_bell(epoch, w.ARMED | w.HUNGRY),
        w.pack_identity(w.DESTROYING, generation, start, pid),
    )


@numba.njit
def compiled_fields(word: int) -> tuple[int, ...]:
    return (
        w.low32(word), w.high32(word), w.expert_state(word), w.expert_priority(word), w.expert_slot(word),
        w.expert_mask(word), w.request_expert(word), w.request_layer(word), w.request_direction(word),
        w.request_priority(word), w.request_lane(word), w.bell_epoch(word), w.bell_state(word), w.identity_state(word),
        w.identity_generation(word), w.identity_start(word), w.identity_pid(word), w.failure_kind(word),
        w.failure_errno(word), w.failure_not_before_ms(word),
    )  # fmt: skip


FIELDS = (
    w.low32, w.high32, w.expert_state, w.expert_priority, w.expert_slot, w.expert_mask, w.request_expert,
    w.request_layer, w.request_direction, w.request_priority, w.request_lane, w.bell_epoch, w.bell_state,
    w.identity_state, w.identity_generation, w.identity_start, w.identity_pid, w.failure_kind, w.failure_errno,
    w.failure_not_before_ms,
)  # fmt: skip


@given(ANY_WORD)
def test_every_field_of_any_word_reads_alike_compiled_and_interpreted(word: int) -> None:
    assert compiled_fields(word) == tuple(field(word) for field in FIELDS)


@given(of_bits(32), of_bits(32))
def test_affinity_words_keep_tick_and_score(tick: int, score: int) -> None:
    word = w.pack_affinity(tick, score)
    assert (w.high32(word), w.low32(word)) == (tick, score)
    assert compiled_packs(tick, score, 0, 0, 0, 0)[0] == word


@given(of_bits(31), of_bits(32))
def test_an_affinity_word_takes_its_tick_modulo_two_to_the_32(tick: int, score: int) -> None:
    assert w.pack_affinity(tick + (1 << 32), score) == w.pack_affinity(tick, score)


@given(st.sampled_from([w.ABSENT, w.REQUESTED, w.LOADING, w.RESIDENT, w.FAILED]), of_bits(2), of_bits(24), of_bits(32))
def test_expert_words_keep_their_fields(state: int, priority: int, slot: int, mask: int) -> None:
    word = w.pack_expert(state, priority, slot, mask)
    fields = w.expert_state(word), w.expert_priority(word), w.expert_slot(word), w.expert_mask(word)
    assert fields == (state, priority, slot, mask)
    assert compiled_packs(0, 0, state, priority, slot, mask)[1] == word


@given(of_bits(w.LAYER_BITS), of_bits(w.EXPERT_BITS), st.sampled_from([w.PAGE_IN, w.PAGE_OUT]), of_bits(2), of_bits(6))
def test_requests_keep_their_fields_in_31_bits(
    layer: int, expert: int, direction: int, priority: int, lane: int
) -> None:
    word = w.pack_request(layer, expert, direction, priority, lane)
    assert 0 <= word < 1 << w.REQUEST_BITS
    assert (w.request_layer(word), w.request_expert(word)) == (layer, expert)
    assert (w.request_direction(word), w.request_priority(word), w.request_lane(word)) == (direction, priority, lane)


@given(of_bits(w.LAYER_BITS), of_bits(w.EXPERT_BITS), of_bits(6), of_bits(60), of_bits(12), of_bits(28), of_bits(22))
def test_other_words_pack_alike_compiled_and_interpreted(
    layer: int, expert: int, lane: int, epoch: int, generation: int, start: int, pid: int
) -> None:
    assert compiled_other_packs(layer, expert, lane, epoch, generation, start, pid) == (
        w.pack_request(layer, expert, w.PAGE_OUT, w.URGENT, lane),
        w.pack_wait(layer, expert),
        w.pack_bell(epoch, w.ARMED | w.HUNGRY),
        w.pack_identity(w.DESTROYING, generation, start, pid),
    )


@given(of_bits(61), st.sampled_from([w.AWAKE, w.ARMED, w.RUNG]), st.sampled_from([0, w.HUNGRY]))
def test_bell_words_keep_epoch_state_and_hunger(epoch: int, state: int, hungry: int) -> None:
    word = w.pack_bell(epoch, state | hungry)
    assert (w.bell_epoch(word), w.bell_state(word), word & w.HUNGRY) == (epoch, state, hungry)


@given(st.sampled_from([w.NOBODY, w.LIVE, w.DESTROYING]), of_bits(12), of_bits(28), of_bits(22))
def test_identity_words_keep_their_fields(state: int, generation: int, start: int, pid: int) -> None:
    word = w.pack_identity(state, generation, start, pid)
    assert (w.identity_state(word), w.identity_generation(word)) == (state, generation)
    assert (w.identity_start(word), w.identity_pid(word)) == (start, pid)
    assert w.pack_identity(state, generation + (1 << 12), start + (1 << 28), pid) == word


@given(st.integers(1, 5), of_bits(12), of_bits(44))
def test_failure_words_keep_their_fields(kind: int, error: int, not_before: int) -> None:
    word = w.pack_failure(kind, error, not_before)
    assert (w.failure_kind(word), w.failure_errno(word), w.failure_not_before_ms(word)) == (kind, error, not_before)


@given(of_bits(w.LAYER_BITS), of_bits(w.EXPERT_BITS))
def test_a_wait_word_is_never_zero_and_names_one_expert(layer: int, expert: int) -> None:
    word = w.pack_wait(layer, expert)
    assert word != 0
    assert divmod(word - 1, 1 << w.EXPERT_BITS) == (layer, expert)


@pytest.mark.parametrize(
    "fields",
    [
        [(0, w.MASK_BITS), (w.SLOT_SHIFT, w.SLOT_BITS), (w.PRIORITY_SHIFT, 2), (w.STATE_SHIFT, w.STATE_BITS), (61, 3)],
        [(0, w.PID_BITS), (w.START_SHIFT, w.START_BITS), (w.GENERATION_SHIFT, 12), (w.IDENTITY_SHIFT, 2)],
        [(0, w.FAILURE_ERRNO_SHIFT), (w.FAILURE_ERRNO_SHIFT, w.FAILURE_ERRNO_BITS), (w.FAILURE_KIND_SHIFT, 8)],
        [(0, w.EXPERT_BITS), (w.LAYER_SHIFT, w.LAYER_BITS), (w.DIRECTION_SHIFT, 1), (w.REQUEST_PRIORITY_SHIFT, 2),
         (w.LANE_SHIFT, w.LANE_BITS), (w.GATE_SHIFT, 1), (w.CYCLE_SHIFT, 32)],
        [(0, w.BELL_STATE_BITS), (2, 1), (w.EPOCH_SHIFT, 61)],
        [(0, w.SCORE_BITS), (w.TICK_SHIFT, 32)],
        [(0, w.ACCOUNT_TOKENS_SHIFT), (w.ACCOUNT_TOKENS_SHIFT, w.ACCOUNT_TOKENS_BITS),
         (w.ACCOUNT_MISSING_SHIFT, w.ACCOUNT_MISSING_BITS), (63, 1)],
        [(0, 32), (w.CONTROL_JUMPS_SHIFT, w.CONTROL_FIELD_BITS), (w.CONTROL_STEPS_SHIFT, w.CONTROL_FIELD_BITS)],
        [(0, 32), (w.FOLLOW_EXPERT_SHIFT, w.EXPERT_BITS + 1), (45, 19)],
    ],
    ids=["expert", "identity", "failure", "ring entry", "bell", "affinity", "account", "control", "follow"],
)  # fmt: skip
def test_the_fields_of_a_word_adjoin_and_fill_it(fields: list[tuple[int, int]]) -> None:
    ends = [0, *(shift + bits for shift, bits in fields)]
    assert ends[:-1] == [shift for shift, _ in fields]
    assert ends[-1] == 64
