"""run.dir/logs/rank_00003.log: what one of several processes has to say; the terminal is rank 0's."""

import contextlib
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

FOLDER = "logs"


class NoLog:
    """For one process, whose terminal has everything."""

    def write(self, text: str) -> None:
        """One entry, after the time."""

    def fileno(self) -> int | None:
        """Of an open file, for words from outside Python."""
        return None

    def close(self) -> None:
        pass


NO_LOG = NoLog()


class RankLog(NoLog):
    """Appends to the rank's file; no failure to write there stops a run.

    Until `close` also takes Python's logging and warnings of this process. Rank 0 still shows them in the
    terminal, the others don't.
    """

    def __init__(self, run_dir: Path, rank: int, start: str) -> None:
        """`start` says where the rank stands: device, place in the layout. Raises OSError."""
        folder = run_dir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank_{rank:05d}.log"
        self._file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o644)
        self._handlers: list[logging.Handler] = [_ToLog(self)]
        if rank == 0:  # without handlers Python prints warnings like this, with one it doesn't
            self._handlers.append(logging.StreamHandler(sys.stderr))
        for handler in self._handlers:
            handler.setLevel(logging.WARNING)
            logging.getLogger().addHandler(handler)
        logging.captureWarnings(True)
        self.write(f"start of rank {rank} on {socket.gethostname()}, process {os.getpid()}: {start}")

    def write(self, text: str) -> None:
        now = time.time()
        clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(now))
        with contextlib.suppress(OSError):
            os.write(self._file, f"{clock}.{int(now % 1 * 1000):03d} {text}\n".encode(errors="replace"))

    def fileno(self) -> int:
        return self._file

    def close(self) -> None:
        if self._file >= 0:
            logging.captureWarnings(False)
            for handler in self._handlers:
                logging.getLogger().removeHandler(handler)
            os.close(self._file)
            self._file = -1


class _ToLog(logging.Handler):
    def __init__(self, log: RankLog) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):  # a message that can't be formatted is lost, no more
            self._log.write(f"{record.levelname} {record.name}: {self.format(record)}")


@contextlib.contextmanager
def quiet_unless(speaks: bool) -> Iterator[None]:
    """What Python prints inside is thrown away, except where `speaks`."""
    with contextlib.ExitStack() as stack:
        if not speaks:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield
