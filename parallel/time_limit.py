"""A limit on work that the watchdog can't look at, as it begins no collective of the training: saving."""

import threading
import time
from collections.abc import Callable
from typing import Self

from openmoe.parallel.watchdog import end_with

_LOOK_SECONDS = 1.0


class TimeLimit:
    """While entered, in whatever thread, ends the process with exit code 3 once `seconds` have passed.

    `line()` is what it then says, on stderr and in the rank's log, which also gets what each thread is at.
    Time in which the whole process was stopped does not count.
    """

    def __init__(
        self, seconds: float, line: Callable[[], str], log_fd: Callable[[], int | None] = lambda: None
    ) -> None:
        self._seconds = seconds
        self._line = line
        self._log_fd = log_fd
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="time limit", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look_on(self) -> None:
        look = min(_LOOK_SECONDS, self._seconds / 10)
        passed, before = 0.0, time.monotonic()
        while not self._done.wait(look):
            now = time.monotonic()
            passed += min(now - before, 2 * look)
            before = now
            if passed >= self._seconds:
                end_with(self._line(), self._log_fd)
