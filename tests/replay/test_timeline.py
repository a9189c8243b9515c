"""The numbers behind a timeline's heat maps."""

from __future__ import annotations

import numpy as np

from shmroute.replay.plots import timeline
from shmroute.traces import Trace

IDS = np.array(
    [[[0, 1], [2, 3]], [[0, 2], [2, -1]], [[1, 2], [0, 3]], [[0, 1], [2, 3]]], np.int32
)  # 4 tokens, 2 layers


def test_shares_of_tokens_that_chose_each_expert() -> None:
    chosen, resident = timeline(Trace("t", "t", IDS, 4), columns=2)
    assert chosen[0].tolist() == [[1.0, 0.5], [0.5, 1.0], [0.5, 0.5], [0.0, 0.0]]
    assert chosen[1].tolist() == [[0.0, 0.5], [0.0, 0.0], [1.0, 0.5], [0.5, 1.0]], "what is not recorded counts nowhere"
    assert resident is None


def test_shares_of_tokens_for_which_each_was_resident() -> None:
    bitmaps = np.array([[[0b0001], [0b1000]], [[0b0011], [0]], [[0b0010], [0]], [[0b0010], [0b0001]]], np.uint8)
    _, resident = timeline(Trace("t", "t", IDS, 4, resident=bitmaps), columns=2)
    assert resident is not None
    assert resident[0].tolist() == [[1.0, 0.0], [0.5, 1.0], [0.0, 0.0], [0.0, 0.0]]
    assert resident[1].tolist() == [[0.0, 0.5], [0.0, 0.0], [0.0, 0.0], [0.5, 0.0]]


def test_a_span_is_one_token_at_least_and_spans_differ_by_one() -> None:
    ids = np.zeros((7, 1, 1), np.int32)
    assert timeline(Trace("t", "t", ids, 2))[0].shape == (1, 2, 7)
    assert timeline(Trace("t", "t", ids, 2), columns=3)[0][0].tolist() == [[1.0] * 3, [0.0] * 3]
