"""Says where a run hangs: a rank that has begun nothing new for too long ends, with its step and group.

A rank waits for ever in a collective that another one never joins, and from outside all of them look busy.
Each collective names itself to the watchdog before it begins; a thread of the rank looks on.
"""

import contextlib
import faulthandler
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from typing import NoReturn, Self

import torch.distributed as dist

# Every look is a tenth of the timeout away from the next, and at most so long.
_LOOK_SECONDS = 1.0
# For the rank's log, which may lie on the very disk that hangs.
_LOG_SECONDS = 5.0
# Before the end: the others, for whom the same time is over, must not lose contact before they have spoken.
_OTHERS_SECONDS = 2.0
_EXIT_CODE = 3
# A collective's own limit is so much later than the watchdog's, which has more to say.
GRACE_SECONDS = 30.0


class LostContact(RuntimeError):
    """Another process of the run is gone, or does not answer; one line. Exit code 3."""


class NoWatchdog:
    """Looks at nothing: for one process, and for tests."""

    def enter(self, group: str, kind: str = "", size: int = 0) -> None:
        """Before each collective: the group it is about; `kind` and bytes as an observer gets them."""

    def step(self, number: int) -> None:
        """Update `number` begins."""

    def beat(self) -> None:
        """Something else begins, such as a forward pass that may send nothing."""

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Around work that may take long without a collective: preparing, saving, compiling."""
        yield

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        pass


NO_WATCHDOG = NoWatchdog()


class Watchdog(NoWatchdog):
    """While entered, ends the process with exit code 3 once nothing has begun for `timeout_seconds`.

    One line goes to stderr and to the rank's log, and the log also gets what each thread is at:

        error: rank 3: nothing has moved for 600 s at step 17 after all_reduce in group expert
        (ranks 0 1 2 3), collective 12 of the step

    A rank that waits has begun its collective; the one that it waits for names an earlier one, or none.
    Works wherever the wait itself lets other threads run, as those of gloo and CUDA do. Time in which the
    whole process was stopped does not count.

    An error of a collective that leaves the block becomes LostContact, which names the same place.
    """

    def __init__(
        self,
        rank: int,
        timeout_seconds: float,
        describe_group: Callable[[str], str],
        log_fd: Callable[[], int | None] = lambda: None,
    ) -> None:
        """`describe_group("expert")` -> "ranks 0 1 2 3"; `log_fd()` an open file of this rank, None where
        there is none yet."""
        self.rank = rank
        self.timeout_seconds = timeout_seconds
        self._describe_group = describe_group
        self._log_fd = log_fd
        self._step: int | None = None
        self._group: str | None = None
        self._kind = ""
        self._count = 0  # of collectives in this step
        self._pauses = 0
        self._beats = 0  # whatever else moves
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look_on, name="watchdog", daemon=True)

    def enter(self, group: str, kind: str = "", size: int = 0) -> None:
        self._group = group
        self._kind = kind
        self._count += 1

    def step(self, number: int) -> None:
        self._step = number
        self._count = 0

    def beat(self) -> None:
        self._beats += 1

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        self._pauses += 1
        try:
            yield
        finally:
            self._beats += 1  # the time starts anew
            self._pauses -= 1

    def where(self) -> str:
        """ "at step 17 in group expert (ranks 0 1 2 3)"; what is not known yet is left out."""
        at = f"at step {self._step}" if self._step is not None else "before the first step"
        return at if self._group is None else f"{at} in {self._named_group()}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._done.set()
        self._thread.join()
        if error is not None and is_lost_contact(error):
            raise LostContact(
                f"rank {self.rank}: lost contact with another process {self.where()}: {reason(error)}"
            ) from error

    def _named_group(self) -> str:
        return f"group {self._group} ({self._describe_group(str(self._group))})"

    def _look_on(self) -> None:
        look = min(_LOOK_SECONDS, self.timeout_seconds / 10)
        still = 0.0
        seen: object = None
        before = time.monotonic()
        while not self._done.wait(look):
            now = time.monotonic()
            # A process that was stopped for an hour finds that an hour has gone by in one look.
            passed, before = min(now - before, 2 * look), now
            found = (self._step, self._count, self._beats)
            still = 0.0 if found != seen or self._pauses else still + passed
            seen = found
            if still >= self.timeout_seconds:
                end_with(self._line(still), self._log_fd)

    def _line(self, seconds: float) -> str:
        """Says where this rank is."""
        at = f"at step {self._step}" if self._step is not None else "before the first step"
        if self._group is None:
            place = "before any collective"
        else:
            kind = f"{self._kind} " if self._kind else ""
            place = f"after {kind}in {self._named_group()}, collective {self._count} of the step"
        return f"rank {self.rank}: nothing has moved for {seconds:.0f} s {at} {place}"


def end_with(line: str, log_fd: Callable[[], int | None]) -> NoReturn:
    """Says `line` on stderr and in the rank's log, with what each thread is at, and ends with exit code 3."""
    text = f"error: {line}\n".encode()

    def write_log() -> None:
        file = log_fd()
        if file is not None:
            with contextlib.suppress(OSError):
                os.write(file, text)
                faulthandler.dump_traceback(file)

    os.write(2, text)  # sys.stderr may be locked by what hangs
    writing = threading.Thread(target=write_log, daemon=True)
    writing.start()
    writing.join(_LOG_SECONDS)
    time.sleep(_OTHERS_SECONDS)
    os._exit(_EXIT_CODE)


def is_lost_contact(error: BaseException) -> bool:
    """Is it a collective's complaint? gloo has no class for it, but names its own file."""
    if isinstance(error, LostContact):
        return False
    # The class itself: errors of our own are derived from it, and may hold any word.
    gloo = type(error) is RuntimeError and "gloo" in str(error).lower()
    return isinstance(error, dist.DistError) or gloo


def reason(error: BaseException) -> str:
    """What a collective's error says, without the place in the library's source and its advice."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[[^\]]*\] ?", "", text)
    return re.split(r"\. This is typically|Exception raised from", text)[0].strip() or type(error).__name__
