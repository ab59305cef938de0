"""SIGTERM or a first Ctrl-C asks the loop to save and leave; a second Ctrl-C stops at once.

Several processes must leave after the same step, whichever of them the signal came to. Each puts its `vote`
into the sums that every step makes anyway, and asks `agreed` about the sum:

    votes = stop.vote()           # before the sum; a signal that comes later counts in the next step
    ...                           # summed over all processes
    stopped_by = stop.agreed(votes)
"""

import signal
from types import FrameType
from typing import Any, Self


class StopSignals:
    """While entered, `requested` names the first such signal, or is None."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def vote(self) -> float:
        """1.0 where this process was asked to leave."""
        return float(self.requested is not None)

    def agreed(self, votes: float) -> str | None:
        """What to leave for, from the sum of all votes of a step: the same decision on every process.

        None: go on, also where a signal has come here since the vote.
        """
        if not votes:
            return None
        return self.requested or "a signal to another process"

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        signal.signal(signal.SIGINT, self._previous[signal.SIGINT])
