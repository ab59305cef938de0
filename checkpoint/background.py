"""Work in a thread of its own, whose errors come out where it is waited for."""

import threading
from collections.abc import Callable


class Background:
    """Begins at once. It ends with the process at the latest."""

    def __init__(self, work: Callable[[], None], name: str) -> None:
        self._error: BaseException | None = None
        # Not the thread's own end: after Ctrl-C in a `join`, Python 3.11 takes a thread that runs for one
        # that has ended.
        self._done = threading.Event()
        # The thread alone holds the work, and lets go of it before it is done.
        threading.Thread(target=self._run, args=([work],), name=name, daemon=True).start()

    @property
    def has_failed(self) -> bool:
        return self._error is not None

    def wait(self) -> None:
        """Raises what the work has raised."""
        self._done.wait()
        if self._error is not None:
            raise self._error

    def ends_within(self, seconds: float | None) -> bool:
        """Waits, no longer than `seconds`, without raising."""
        return self._done.wait(seconds)

    def _run(self, work: list[Callable[[], None]]) -> None:
        try:
            work.pop()()
        except BaseException as error:
            self._error = error
        finally:
            self._done.set()
