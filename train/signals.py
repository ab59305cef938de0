"""SIGTERM or a first Ctrl-C asks the loop to save and leave; a second Ctrl-C stops at once."""

import signal
from types import FrameType
from typing import Any, Self


class StopSignals:
    """While entered, `requested` names the first such signal, or is None."""

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        self.requested = signal.Signals(number).name
        signal.signal(signal.SIGINT, self._previous[signal.SIGINT])
