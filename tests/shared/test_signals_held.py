"""Signals that come while something is compiled: they wait, and are not lost."""

from __future__ import annotations

import signal
import threading

import pytest

from shmroute.shared.kernel import signals_held


def test_an_interruption_waits_for_the_end_of_the_block() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), signals_held():
        signal.raise_signal(signal.SIGINT)
        done.append("went on")
    assert done == ["went on"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_signal_without_a_handler_is_left_alone() -> None:
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with signals_held():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_other_threads_pass_through() -> None:
    seen = []

    def compile_something() -> None:
        with signals_held():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=compile_something)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]
