"""Signals: one process asked to leave takes the others along, after the same step."""

import os
import signal

import pytest

from openmoe.train.signals import StopSignals


def test_one_that_was_asked_takes_all_along() -> None:
    """Bug: the rank with the signal saves and leaves, and the others wait for it in the next step."""
    with StopSignals() as asked:
        os.kill(os.getpid(), signal.SIGTERM)
        other = StopSignals()
        votes = asked.vote() + other.vote()
        assert asked.agreed(votes) == "SIGTERM"
        assert other.agreed(votes) == "a signal to another process"
    assert StopSignals().agreed(0.0) is None


def test_a_signal_after_the_vote_waits_for_the_next_step() -> None:
    """Bug: a rank leaves for a signal that it has not told the others of."""
    with StopSignals() as stop:
        votes = stop.vote()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested == "SIGINT"
        assert stop.agreed(votes) is None
        assert stop.agreed(stop.vote()) == "SIGINT"


def test_a_second_ctrl_c_stops_at_once() -> None:
    """Bug: Ctrl-C is swallowed for as long as a step takes."""
    with StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
