"""The line a person watches while a model trains."""

import shutil
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

# Left out of the ETA: the first steps pay for allocations, first touches of the data and compilation.
WARM_UP_STEPS = 5


class Progress:
    """Step, share done, tokens, phase, loss, accuracy, rate, speed, MFU and time left, in one line.

    On a terminal the line is rewritten with every step; elsewhere one is printed every `every_steps` steps,
    at the first and last step and where the phase changes. The time left is the wall time per step so far
    times the steps to come, so validation and checkpoints count in. Lines of steps whose metrics were read
    together come all at once.
    """

    def __init__(
        self,
        total_steps: int,
        every_steps: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_steps = total_steps
        self.every_steps = every_steps
        self.stream = stream or sys.stderr
        self.live = self.stream.isatty()
        self._clock = clock
        self._updates = 0
        self._timed_from: tuple[int, float] | None = None  # step and time at the end of the warm-up
        self._phase: object = None
        self._line_open = False

    def write(self, metrics: Mapping[str, Any]) -> None:
        """`metrics` is the step's line of metrics.jsonl; `mfu` is a share of 1 and may be missing."""
        step = metrics["step"]
        self._updates += 1
        now = self._clock()
        if self._updates == WARM_UP_STEPS:
            self._timed_from = (step, now)
        elif self._timed_from and now - self._timed_from[1] < metrics.get("step_seconds", 0.0):
            self._timed_from = (step, now)  # sooner than a step takes: read together with the one before
        line = self._line(metrics)
        if self.live:
            width = shutil.get_terminal_size().columns - 1  # a full last column would wrap
            self.stream.write(f"\r\x1b[2K{line[:width]}")
            self.stream.flush()
            self._line_open = True
        elif (
            step % self.every_steps == 0
            or step == self.total_steps
            or self._updates == 1
            or metrics["phase"] != self._phase
        ):
            print(line, file=self.stream, flush=True)
        self._phase = metrics["phase"]

    def print(self, text: str) -> None:
        """A line of its own, above the live line."""
        prefix = "\r\x1b[2K" if self._line_open else ""
        self._line_open = False
        print(f"{prefix}{text}", file=self.stream, flush=True)

    def close(self) -> None:
        """Leave the last line standing."""
        if self._line_open:
            print(file=self.stream, flush=True)
        self._line_open = False

    def seconds_left(self, step: int) -> float | None:
        """None while the first steps run."""
        if self._timed_from is None or step <= self._timed_from[0]:
            return None
        first_step, start = self._timed_from
        return (self._clock() - start) / (step - first_step) * (self.total_steps - step)

    def _line(self, metrics: Mapping[str, Any]) -> str:
        step = metrics["step"]
        left = self.seconds_left(step)
        parts = [
            f"step {step:,}/{self.total_steps:,} {step / self.total_steps:.1%}",
            f"{short_count(metrics['tokens_seen'])} tokens",
            f"phase {metrics['phase']} {metrics['objective']}",
            f"loss {metrics['loss']:.4f}",
            f"accuracy {metrics['accuracy']:.3f}",
            f"lr {metrics['learning_rate']:.2e}",
            f"{short_count(metrics['tokens_per_second'])} tokens/s",
        ]
        if "mfu" in metrics:
            parts.append(f"MFU {metrics['mfu']:.1%}")
        parts.append(f"ETA {'--' if left is None else duration(left)}")
        return " | ".join(parts)


def short_count(count: float) -> str:
    """999 -> 999, 1234 -> 1.23K, 780e9 -> 780B."""
    for power, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= 0.9995 * power:
            return f"{count / power:.3g}{suffix}"
    return f"{count:.3g}"


def duration(seconds: float) -> str:
    """42s, 3m 05s, 7h 02m, 5d 03h."""
    whole = round(seconds)
    for unit, letter, part, part_letter in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "s")):
        if whole >= unit:
            return f"{whole // unit}{letter} {whole % unit // part:02d}{part_letter}"
    return f"{whole}s"
