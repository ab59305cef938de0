"""What a save is doing, for those who wait for it or want it to end."""

import threading

from openmoe.checkpoint.errors import SaveCancelled


class Course:
    """Of one save on one process. Written by the thread that saves, read by others."""

    def __init__(self) -> None:
        self.place = "not begun"
        self._cancelled = threading.Event()

    def at(self, place: str) -> None:
        """What comes next, before each thing that may take long."""
        self.place = place

    def go_on(self, place: str) -> None:
        """`at`, where this process may leave the save because all of them look whether one did.

        Raises SaveCancelled.
        """
        if self._cancelled.is_set():
            raise SaveCancelled("the save was broken off")
        self.place = place

    def cancel(self) -> None:
        self._cancelled.set()
