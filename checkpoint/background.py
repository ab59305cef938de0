"""Work in a thread of its own, whose errors come out where it is waited for."""

import threading
from collections.abc import Callable


class Background:
    """Begins at once. It ends with the process at the latest."""

    def __init__(self, work: Callable[[], None], name: str) -> None:
        self._error: BaseException | None = None
        # The thread alone holds the work, and lets go of what it holds with its end.
        self._thread = threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
        self._thread.start()

    @property
    def has_failed(self) -> bool:
        return self._error is not None

    def wait(self) -> None:
        """Raises what the work has raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def ends_within(self, seconds: float | None) -> bool:
        """Waits, no longer than `seconds`, without raising."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            self._error = error
