"""Stopping on SIGTERM and Ctrl-C."""

import os
import signal
import threading

import jax
import pytest
from jax.experimental import multihost_utils

from jaxguard.train.hosts import REQUEUE, graceful_stop


def test_requeue_is_ex_tempfail() -> None:
    assert REQUEUE == os.EX_TEMPFAIL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_sets_the_flag_and_handlers_are_restored(number: signal.Signals) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with graceful_stop() as flag:
        assert not flag.should_stop(1)
        signal.raise_signal(number)
        assert flag.should_stop(2)
        assert flag.signal_name == number.name
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def interrupt_twice() -> None:
    with graceful_stop():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_second_interrupt_raises() -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupt_twice()


def test_repeated_sigterm_stays_graceful() -> None:
    with graceful_stop() as flag:
        for _ in range(3):
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)  # the first one by hand
        assert flag.should_stop(1)


def test_processes_agree_on_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several processes stop at the coordinator's step, and SIGTERM is left to jax's watcher."""
    got: list[int] = []
    terms: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _frame: terms.append(number))
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda step: got.append(step) or step == 3)
    try:
        with graceful_stop() as flag:
            signal.raise_signal(signal.SIGINT)
            assert [flag.should_stop(step) for step in (1, 2, 3)] == [False, False, True]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert got == [1, 2, 3]
    assert terms == [signal.SIGTERM]


def test_other_threads_set_no_handlers() -> None:
    """As in a notebook that trains in a thread of its own: Python refuses handlers there."""
    flags = []

    def run() -> None:
        with graceful_stop() as flag:
            flags.append(flag.should_stop(1))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert flags == [False]
