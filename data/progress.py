"""One line on stderr about long work: share done, speed, time left."""

import sys
from collections.abc import Callable
from time import monotonic

from openmoe.data.tasks import Task

# Between two lines: on a terminal, where each takes the place of the last one, and in a file.
_TERMINAL_SECONDS = 1.0
_FILE_SECONDS = 10.0


class PrepareProgress:
    """Adds up what all workers report."""

    def __init__(self, tasks: int, total_weight: float, clock: Callable[[], float] = monotonic) -> None:
        """`total_weight` of all tasks together, of which this run has none done."""
        self._tasks, self._total = tasks, max(1.0, total_weight)
        self._finished = 0
        self._weight = self._tokens = 0.0
        # Weight done and tokens written of each task that is under way.
        self._open: dict[str, tuple[float, int]] = {}
        self._terminal = sys.stderr.isatty()
        self._seconds = _TERMINAL_SECONDS if self._terminal else _FILE_SECONDS
        self._clock = clock
        self._start = self._last = clock()

    def update(self, task: Task, share: float, tokens: int) -> None:
        """`share` of a task is done."""
        self._open[task.name] = share * task.weight, tokens
        if self._clock() - self._last >= self._seconds:
            self._last = self._clock()
            self._write(self.line(), end="\r" if self._terminal else "\n")

    def finish(self, task: Task, tokens: int) -> None:
        """All of a task is done."""
        self._open.pop(task.name, None)
        self._weight += task.weight
        self._tokens += tokens
        self._finished += 1

    def line(self) -> str:
        """What there is to say now."""
        seconds = max(1e-9, self._clock() - self._start)
        done = (self._weight + sum(weight for weight, _ in self._open.values())) / self._total
        tokens = self._tokens + sum(tokens for _, tokens in self._open.values())
        left = f"about {_duration(seconds * (1 - done) / done)} left" if done > 0 else "just started"
        return (
            f"{done:6.1%}, {self._finished:,} of {self._tasks:,} shards, {tokens / 1e6:,.1f}M tokens, "
            f"{tokens / seconds / 1e6:.2f}M tokens/s, {left}"
        )

    def close(self) -> None:
        """Wipe the line of a terminal."""
        if self._terminal:
            self._write(" " * 100, end="\r")

    @staticmethod
    def _write(line: str, end: str) -> None:
        print(line, end=end, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
