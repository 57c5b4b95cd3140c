"""Signals: what they raise, what they only note, and that the handlers from before come back."""

import contextlib
import os
import signal

import pytest

from jaxchat import signals
from jaxchat.signals import Interrupted


@pytest.fixture(autouse=True)
def as_before():
    before = [signal.getsignal(number) for number in signals.STOPPING]
    yield
    assert [signal.getsignal(number) for number in signals.STOPPING] == before


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", signals.STOPPING)
def test_a_signal_is_raised_and_no_except_exception_takes_it(number):
    with pytest.raises(Interrupted, match="is kept"), signals.raised() as stopped:
        assert not stopped()
        with contextlib.suppress(Exception):
            send(number)
        pytest.fail("it went on")


def test_an_error_that_a_signal_became_is_the_signals():
    with pytest.raises(Interrupted), signals.raised():
        try:
            send(signal.SIGTERM)
        except Interrupted as error:  # As an extension in C++ does.
            raise RuntimeError("INTERNAL: Interrupted") from error
    with pytest.raises(RuntimeError, match="of its own"), signals.raised():
        raise RuntimeError("of its own")


def test_a_signal_that_was_swallowed_is_told_and_a_second_lets_the_end_be_clean():
    with signals.raised() as stopped:
        with contextlib.suppress(BaseException):
            send(signal.SIGTERM)
        assert stopped()
        send(signal.SIGTERM)
        with pytest.raises(Interrupted):
            send(signal.SIGINT)


def test_a_signal_that_was_noted_within_is_told_without():
    with signals.raised() as stopped:
        with signals.noted() as noted:
            os.kill(os.getpid(), signal.SIGTERM)
            assert noted()
        assert stopped()
    with signals.raised() as stopped:
        assert not stopped()


def test_a_noted_signal_only_sets_a_flag_until_the_second_of_the_keyboard():
    with signals.noted() as interrupted:
        assert not interrupted()
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert interrupted()
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
