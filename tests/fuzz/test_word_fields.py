"""Words of any bits: every field is within its width, and what is unpacked packs to the same bits again."""

from __future__ import annotations

import contextlib

import pytest
from fuzzing import fuzz, words
from hypothesis import example, given
from hypothesis import strategies as st

from shmroute.shared import words as w
from shmroute.shared.atomic import signed
from shmroute.shared.requests import PagingDirection, PagingPriority, PagingRequest

EXPERT_MASK = (1 << 61) - 1
REQUEST_MASK = (1 << w.GATE_SHIFT) - 1
"""All of a request but the mark of a speculation."""

WIDTHS = {
    w.low32: 32, w.high32: 32, w.expert_state: w.STATE_BITS, w.expert_priority: w.PRIORITY_BITS,
    w.expert_slot: w.SLOT_BITS, w.expert_mask: w.MASK_BITS, w.request_expert: w.EXPERT_BITS,
    w.request_layer: w.LAYER_BITS, w.request_direction: 1, w.request_priority: w.PRIORITY_BITS,
    w.request_lane: w.LANE_BITS, w.bell_epoch: 61, w.bell_state: w.BELL_STATE_BITS, w.identity_state: 2,
    w.identity_generation: w.GENERATION_BITS, w.identity_start: w.START_BITS, w.identity_pid: w.PID_BITS,
    w.failure_kind: 8, w.failure_errno: w.FAILURE_ERRNO_BITS, w.failure_not_before_ms: w.FAILURE_ERRNO_SHIFT,
    w.account_missing: w.ACCOUNT_MISSING_BITS, w.account_tokens: w.ACCOUNT_TOKENS_BITS,
    w.account_amount: w.ACCOUNT_TOKENS_SHIFT, w.control_steps: w.CONTROL_FIELD_BITS,
    w.control_jumps: w.CONTROL_FIELD_BITS, w.control_adjustments: 32, w.request_speculative: 1,
    w.follow_expert: w.EXPERT_BITS + 1, w.follow_share: 32,
}  # fmt: skip
"""How many bits each field has."""

many_words = words | st.integers(-(2**200), 2**200)
"""Also integers that no word holds: what came from a file may be one."""


def test_every_field_of_every_word_is_looked_at() -> None:
    kinds = ("expert_", "request_", "bell_", "identity_", "failure_", "account_", "control_", "follow_", "low", "high")
    named = {value for name, value in vars(w).items() if callable(value) and name.startswith(kinds)}
    assert named == set(WIDTHS)


@fuzz(3)
@given(word=many_words)
@example(word=-1)
@example(word=-(2**63))
def test_every_field_of_any_word_is_within_its_width(word: int) -> None:
    for field, bits in WIDTHS.items():
        assert 0 <= field(word) < 1 << bits


@fuzz(3)
@given(word=words)
@example(word=-1)
def test_the_fields_of_any_word_pack_to_the_same_bits(word: int) -> None:
    expert = w.pack_expert(w.expert_state(word), w.expert_priority(word), w.expert_slot(word), w.expert_mask(word))
    assert expert == word & EXPERT_MASK
    assert w.pack_affinity(w.high32(word), w.low32(word)) == word
    assert w.pack_bell(w.bell_epoch(word), word & (w.HUNGRY | 3)) == word
    identity = w.identity_state(word), w.identity_generation(word), w.identity_start(word), w.identity_pid(word)
    assert w.pack_identity(*identity) == word
    failure = w.failure_kind(word), w.failure_errno(word), w.failure_not_before_ms(word)
    assert signed(w.pack_failure(*failure)) == word
    account = w.account_missing(word), w.account_tokens(word), w.account_amount(word)
    assert w.pack_account(*account) == word & (1 << 63) - 1
    assert w.pack_control(w.control_steps(word), w.control_jumps(word), w.control_adjustments(word)) == word
    assert w.pack_follow(w.follow_expert(word), w.follow_share(word)) == word & (1 << 45) - 1
    request = (
        w.request_layer(word), w.request_expert(word), w.request_direction(word), w.request_priority(word),
        w.request_lane(word),
    )  # fmt: skip
    assert w.pack_request(*request) == word & REQUEST_MASK
    assert w.request_speculative(w.speculative(word & REQUEST_MASK)) == 1


@fuzz(3)
@given(word=many_words)
@example(word=0)
@example(word=REQUEST_MASK)
@example(word=-1)
def test_any_word_is_a_request_or_has_no_priority(word: int) -> None:
    if w.request_priority(word) == 0:
        with pytest.raises(ValueError, match="0 is not a valid PagingPriority"):
            PagingRequest.unpack(word)
        return
    request = PagingRequest.unpack(word)
    assert isinstance(request.direction, PagingDirection)
    assert isinstance(request.priority, PagingPriority)
    lane = w.request_lane(word)
    again = w.pack_request(request.layer, request.expert, request.direction, request.priority, lane)
    assert again == word & REQUEST_MASK
    assert PagingRequest.unpack(again) == request


@fuzz(3)
@given(word=words)
def test_any_bonus_word_is_a_number_that_packs_to_its_neighbourhood(word: int) -> None:
    """A float has 53 bits: beyond them a bonus, which is at most 1e6 (52 bits), would be rounded."""
    value = w.unpack_bonus(word)
    assert abs(value) <= 2**31
    with contextlib.suppress(OverflowError):
        assert abs(w.pack_bonus(value) - word) <= max(1, abs(word) >> 52)
