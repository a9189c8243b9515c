"""How the stress commands judge: growth, errors, runs that proved too little; and that a plan is its seed's."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest

from stress.chaos import _MUST_FIRE, Report, _shortcomings
from stress.growth import Allowance, Series, look, trend
from stress.plan import SHARES, Act, acts
from stress.timeline import PATIENT, Fault, Timeline


def series_of(memory: list[int]) -> Series:
    count = len(memory)
    return Series("worker", 1, [float(t) for t in range(count)], memory, [5] * count, [3] * count)


def test_a_trend_is_the_growth_over_the_whole_time_whatever_a_few_outliers_say() -> None:
    times = np.arange(100.0)
    values = 1000 + 7 * times
    values[[10, 50, 90]] += 1e9
    assert trend(times, values) == pytest.approx(7 * 99)


def test_noise_is_no_trend() -> None:
    noise = np.random.default_rng(0).normal(0, 1e5, 200)
    assert abs(trend(np.arange(200.0), 5e7 + noise)) < 1e5


def test_a_leak_is_named_and_a_warm_up_is_not() -> None:
    leak = series_of([10_000_000 + 200_000 * i for i in range(60)])
    assert leak.complaints(Allowance()) == ["memory of worker 1 grew by 8,800,000.0, 6,000,000.0 are allowed"]
    warm_up = series_of([10_000_000 * min(i, 10) for i in range(60)])
    assert warm_up.complaints(Allowance()) == []


def test_a_descriptor_that_leaks_now_and_then_is_named() -> None:
    leak = series_of([10_000_000] * 60)
    leak.descriptors = [5 + i // 20 for i in range(60)]
    assert len(leak.complaints(Allowance())) == 1


def test_few_samples_tell_nothing() -> None:
    assert series_of([0, 10**9] * 3).growth("memory") is None


def test_a_process_is_looked_at_until_it_is_gone() -> None:
    memory, descriptors, threads = look(os.getpid()) or (0, 0, 0)
    assert memory > 10**6
    assert descriptors > 2
    assert threads >= 1
    assert look(2**22 - 1) is None


def test_a_seed_gives_the_same_acts_and_every_round_has_them_all() -> None:
    def first(seed: int) -> list[Act]:
        return list(itertools.islice(acts(seed), 3 * sum(SHARES.values())))

    assert first(7) == first(7)
    assert first(7) != first(8)
    for number in range(3):
        assert {act.lever for act in first(7) if act.round == number} == set(SHARES)


def error(kind: str, began: float, **details: object) -> dict[str, object]:
    return {"kind": kind, "message": "", "began": began, "ended": began + 0.01, **details}


def test_a_failed_load_is_explained_by_a_fault_of_that_expert_and_kind() -> None:
    timeline = Timeline()
    window = timeline.begin(Fault.UNREADABLE, 1, 2)
    reason = "Input/output error"
    load = error("ExpertLoadError", window.began, layer=1, expert=2, reason=reason)
    assert timeline.explains(load)
    assert not timeline.explains(load | {"expert": 3})
    assert not timeline.explains(load | {"reason": "the bytes read differ (checksum mismatch)"})
    assert not timeline.explains(load | {"began": window.began - 1, "ended": window.began - 0.5})
    window.end()
    assert timeline.explains(load)
    later = window.began + 100
    assert not timeline.explains(load | {"began": later, "ended": later})


def test_a_wait_that_ran_out_is_explained_by_an_outage_but_never_a_patient_one() -> None:
    timeline = Timeline()
    before = error("PagerUnavailable", 0.0, timeout=0.1)
    assert not timeline.explains(before)
    window = timeline.begin(Fault.OUTAGE)
    during = error("PagerUnavailable", window.began, timeout=0.1)
    assert timeline.explains(during)
    assert not timeline.explains(during | {"timeout": PATIENT})
    assert timeline.explains(error("ExpertTimeout", 0.0, timeout=0.1))
    assert not timeline.explains(error("ExpertTimeout", 0.0, timeout=20.0))
    assert timeline.explains(error("ExpertTimeout", window.began, timeout=20.0))


def test_an_error_that_no_fault_can_lead_to_is_never_explained() -> None:
    timeline = Timeline()
    window = timeline.begin(Fault.OUTAGE)
    assert not timeline.explains(error("LeaseHeldError", window.began))


def test_a_run_that_proved_too_little_has_failed() -> None:
    def report(workers: int, takeovers: int, idle: str = "") -> Report:
        levers = {name: int(name != idle) for name in _MUST_FIRE}
        checks = {"items against the reference": 1}
        return Report(1, 4, deaths={"workers": workers}, takeovers=takeovers, levers=levers, checks=checks)

    assert _shortcomings(report(30, 5), 60) == []
    assert _shortcomings(report(6, 1), 12) == []
    assert _shortcomings(report(29, 5), 60) == ["only 29 processes were killed in 60 s, fewer than 30 a minute"]
    assert _shortcomings(report(30, 4), 60) == ["only 4 pagers followed another in 60 s, fewer than 5 a minute"]
    for name in _MUST_FIRE:
        assert _shortcomings(report(30, 5, idle=name), 60) == [f"nothing ever came of: {name}"]
