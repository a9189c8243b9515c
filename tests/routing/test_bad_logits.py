"""What cannot be routed is refused before anything is recorded; what can be is, in whatever memory it lies."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from runtimes import clock_of, everything_recorded

from shmroute.errors import NonFiniteLogitsError
from shmroute.runtime import Runtime

GOOD = np.random.default_rng(1).normal(size=(6, 8)).astype(np.float32)
Refused = Callable[[Any], None]


def outputs(*shape: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Arrays to route into."""
    return np.zeros((*shape, 2), np.int32), np.zeros((*shape, 2), np.float32)


@pytest.mark.parametrize(
    ("logits", "given"),
    [
        (np.zeros(7, np.float32), r"float32 \[7\]"),
        (np.zeros(9, np.float32), r"float32 \[9\]"),
        (np.zeros(0, np.float32), r"float32 \[0\]"),
        (np.zeros((3, 7), np.float32), r"float32 \[3, 7\]"),
        (np.zeros((8, 3), np.float32), r"float32 \[8, 3\]"),
        (np.zeros((1, 3, 8), np.float32), r"float32 \[1, 3, 8\]"),
        (np.float32(1), "a float32"),
        (np.zeros((), np.float32), r"float32 \[\]"),
        (np.zeros(8, np.float64), r"float64 \[8\]"),
        (np.zeros((2, 8), np.float16), r"float16 \[2, 8\]"),
        (np.zeros(8, np.int32), r"int32 \[8\]"),
        (np.zeros(8, ">f4"), r">f4|float32 \[8\]"),
        (np.zeros(8, object), r"object \[8\]"),
        ([0.0] * 8, "a list"),
        (None, "a NoneType"),
    ],
)
def test_wrong_shapes_ranks_and_dtypes_are_refused_and_change_nothing(
    make_runtime: Callable[..., Runtime], logits: Any, given: str
) -> None:
    runtime = make_runtime()
    router = runtime.router(0)
    router.route(GOOD)
    before = everything_recorded(runtime)
    shape = logits.shape[:-1] if isinstance(logits, np.ndarray) and logits.ndim else ()
    for refused in (lambda: router.route(logits), lambda: router.route_into(logits, *outputs(*shape))):
        with pytest.raises(ValueError, match=rf"logits must be float32 \[8\] or \[T, 8\], not .*({given})"):
            refused()
    assert everything_recorded(runtime) == before


@pytest.mark.parametrize(
    ("experts", "weights", "complaint"),
    [
        (np.zeros((6, 3), np.int32), None, r"experts must be int32 \[6, 2\], not int32 \[6, 3\]"),
        (np.zeros((5, 2), np.int32), None, r"experts must be int32 \[6, 2\], not int32 \[5, 2\]"),
        (np.zeros(2, np.int32), None, r"experts must be int32 \[6, 2\], not int32 \[2\]"),
        (np.zeros((6, 2), np.int64), None, r"experts must be int32 \[6, 2\], not int64"),
        ([[0, 0]] * 6, None, r"experts must be int32 \[6, 2\], not a list"),
        (np.zeros((2, 6), np.int32).T, None, "experts must be a contiguous, aligned, writable array"),
        (None, np.zeros((6, 2), np.float64), r"weights must be float32 \[6, 2\], not float64"),
        (None, np.zeros((6, 4), np.float32)[:, ::2], "weights must be a contiguous, aligned, writable array"),
        (None, np.broadcast_to(np.float32(0), (6, 2)), "weights must be a contiguous, aligned, writable array"),
        (None, np.frombuffer(bytearray(49), np.float32, 12, 1).reshape(6, 2), "weights must be a contiguous, aligned"),
        (None, np.frombuffer(bytes(48), np.float32).reshape(6, 2), "weights must be a contiguous, aligned, writable"),
    ],
)
def test_wrong_output_arrays_are_refused_and_change_nothing(
    make_runtime: Callable[..., Runtime], experts: Any, weights: Any, complaint: str
) -> None:
    runtime = make_runtime()
    router = runtime.router(0)
    before = everything_recorded(runtime)
    good = outputs(6)
    with pytest.raises(ValueError, match=complaint):
        router.route_into(GOOD, good[0] if experts is None else experts, good[1] if weights is None else weights)
    assert everything_recorded(runtime) == before


def as_memmap(logits: npt.NDArray[np.float32], folder: Path) -> npt.NDArray[np.float32]:
    """The same, in a file."""
    np.save(folder / "logits.npy", logits)
    mapped: npt.NDArray[np.float32] = np.load(folder / "logits.npy", mmap_mode="r")
    return mapped


def misaligned(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The same, at an odd address."""
    raw = np.frombuffer(b"\0" + logits.tobytes(), np.float32, logits.size, 1)
    return raw.reshape(logits.shape)


def read_only(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The same, not writable."""
    copy = logits.copy()
    copy.flags.writeable = False
    return copy


@pytest.mark.parametrize(
    "kind",
    [
        lambda logits, folder: np.asfortranarray(logits),
        lambda logits, folder: np.repeat(logits, 2, axis=-1)[..., ::2],
        lambda logits, folder: logits[..., ::-1].copy()[..., ::-1],
        lambda logits, folder: read_only(logits),
        lambda logits, folder: read_only(np.asfortranarray(logits)),
        lambda logits, folder: misaligned(logits),
        lambda logits, folder: misaligned(logits)[::-1].copy()[::-1] if logits.ndim == 2 else misaligned(logits),
        lambda logits, folder: as_memmap(logits, folder),
        lambda logits, folder: np.broadcast_to(logits[:1], logits.shape) if logits.ndim == 2 else logits,
    ],
    ids=["fortran", "strided", "reversed", "read-only", "read-only fortran", "misaligned", "rows reversed", "memmap",
         "broadcast"],
)  # fmt: skip
@pytest.mark.parametrize("rows", [slice(None), slice(1), 0], ids=["batch", "batch of one", "token"])
def test_logits_in_any_memory_route_like_contiguous_ones(
    make_runtime: Callable[..., Runtime],
    tmp_path: Path,
    kind: Callable[[npt.NDArray[np.float32], Path], npt.NDArray[np.float32]],
    rows: slice | int,
) -> None:
    logits = kind(GOOD[rows], tmp_path)
    plain = np.array(logits, order="C")
    runtime = make_runtime(num_layers=2)
    decision, expected = runtime.router(0).route(logits), runtime.router(1).route(plain)
    assert decision.experts.tolist() == expected.experts.tolist()
    assert decision.weights.tolist() == expected.weights.tolist()
    experts, weights = outputs(*plain.shape[:-1])
    runtime.router(0).route_into(logits, experts, weights)
    assert experts.tolist() == expected.experts.tolist()
    assert weights.tolist() == expected.weights.tolist()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_expert_without_a_finite_logit_is_passed_over_and_counted(
    make_runtime: Callable[..., Runtime], bad: float
) -> None:
    runtime = make_runtime()
    logits = np.zeros((2, 8), np.float32)
    logits[0, [0, 5, 7]] = bad
    decision = runtime.router(0).route(logits)
    assert decision.experts.tolist() == [[1, 2], [0, 1]]
    assert runtime.metrics().total.counters["nonfinite"] == 3
    assert np.isfinite(decision.weights).all()


def test_exactly_k_finite_logits_are_enough(make_runtime: Callable[..., Runtime]) -> None:
    logits = np.full(8, np.nan, np.float32)
    logits[[2, 6]] = -1, -3
    assert make_runtime().router(0).route(logits).experts.tolist() == [2, 6]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_with_too_few_finite_logits_refuses_the_whole_batch(
    make_runtime: Callable[..., Runtime], bad: float
) -> None:
    runtime = make_runtime()
    router = runtime.router(0)
    router.route(GOOD[0])
    before, clock = everything_recorded(runtime), clock_of(runtime)
    logits = GOOD.copy()
    logits[4, :7] = bad
    logits[5] = bad
    for refused in (lambda: router.route(logits), lambda: router.route_into(logits, *outputs(6))):
        with pytest.raises(
            NonFiniteLogitsError, match="row 4 of the logits has 1 finite values, but top_k = 2"
        ) as error:
            refused()
        assert isinstance(error.value, ValueError)
        assert error.value.row == 4
    assert everything_recorded(runtime) == before
    assert clock_of(runtime) == clock == 1


def test_a_single_token_without_finite_logits_is_row_zero(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime()
    with pytest.raises(NonFiniteLogitsError, match="row 0 of the logits has 0 finite") as error:
        runtime.router(0).route(np.full(8, np.nan, np.float32))
    assert error.value.row == 0
    assert runtime.router(0).route(GOOD).experts.shape == (6, 2)


def test_output_arrays_that_overlap_give_nonsense_but_touch_nothing_else(make_runtime: Callable[..., Runtime]) -> None:
    runtime = make_runtime(num_experts=8, top_k=2)
    memory = np.zeros(2 * 64 + 2, np.int32)
    experts = memory[:128].reshape(64, 2)
    weights = memory[2:].view(np.float32).reshape(64, 2)
    logits = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)
    runtime.router(0).route_into(logits, experts, weights)
    assert runtime.affinity(0).activations().sum() <= 128
