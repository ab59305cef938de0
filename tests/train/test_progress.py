"""The progress line."""

import io
from typing import Any

import pytest

from openmoe.train.progress import WARM_UP_STEPS, Progress, duration, short_count


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def metrics(step: int, phase: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "step": step, "tokens_seen": 2_097_152 * step, "phase": phase, "objective": "ul2", "loss": 3.25,
        "accuracy": 0.4321, "learning_rate": 0.01, "tokens_per_second": 12_345.0, **more,
    }  # fmt: skip


def run(progress: Progress, clock: Clock, seconds: list[float], first_step: int = 1) -> None:
    for step, spent in enumerate(seconds, first_step):
        clock.seconds += spent
        progress.write(metrics(step))


def test_the_line_says_all() -> None:
    """Bug: a figure is missing from the line."""
    stream = io.StringIO()
    progress = Progress(100, 1, stream, Clock())
    progress.write(metrics(25, mfu=0.4125))
    assert stream.getvalue() == (
        "step 25/100 25.0% | 52.4M tokens | phase 0 ul2 | loss 3.2500 | accuracy 0.432 | lr 1.00e-02 | "
        "12.3K tokens/s | MFU 41.2% | ETA --\n"
    )


def test_eta_leaves_out_the_first_steps_and_counts_validation_in() -> None:
    """Bugs: a slow first step makes the ETA hours too long; validation between steps is forgotten."""
    clock = Clock()
    progress = Progress(100, 1, io.StringIO(), clock)
    run(progress, clock, [60.0] * WARM_UP_STEPS)
    assert progress.seconds_left(WARM_UP_STEPS) is None
    run(progress, clock, [1.0, 1.0, 1.0, 5.0], WARM_UP_STEPS + 1)  # the last with a validation of 4 s
    assert progress.seconds_left(WARM_UP_STEPS + 4) == pytest.approx(2.0 * (100 - WARM_UP_STEPS - 4))


def test_eta_of_steps_whose_metrics_were_read_together() -> None:
    """Bug: steps of the warm-up's own read count as done in no time, and the run as nearly over."""
    clock = Clock()
    progress = Progress(100, 1, io.StringIO(), clock)
    for first_step in (1, 9, 17):
        clock.seconds += 8 * 2.0
        for step in range(first_step, first_step + 8):
            clock.seconds += 1e-4
            progress.write(metrics(step, step_seconds=2.0))
        left = progress.seconds_left(first_step + 7)
        assert left == (None if first_step == 1 else pytest.approx(2.0 * (100 - first_step - 7), rel=1e-3))


def test_eta_after_a_resume_counts_the_steps_of_this_process() -> None:
    """Bug: time since the start divided by all steps makes a resumed run look hundreds of times faster."""
    clock = Clock()
    progress = Progress(1000, 1, io.StringIO(), clock)
    run(progress, clock, [2.0] * 20, first_step=501)
    assert progress.seconds_left(520) == pytest.approx(2.0 * 480)


def test_without_a_terminal_it_prints_now_and_then() -> None:
    """Bugs: a log file of a million lines; control characters in it; a phase switch that no line shows."""
    stream = io.StringIO()
    progress = Progress(23, 10, stream, Clock())
    for step in range(1, 24):
        progress.write(metrics(step, phase=int(step > 14)))
    lines = stream.getvalue().splitlines()
    assert [line.split()[1].split("/")[0] for line in lines] == ["1", "10", "15", "20", "23"]
    assert "\x1b" not in stream.getvalue()
    assert "\r" not in stream.getvalue()


def test_on_a_terminal_it_rewrites_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bugs: a line longer than the terminal wraps and is not erased; messages are glued to the live line."""
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    progress = Progress(10, 5, stream, Clock())
    progress.write(metrics(1))
    progress.write(metrics(2))
    progress.print("checkpoint written")
    progress.write(metrics(3))
    progress.close()
    progress.close()
    text = stream.getvalue()
    assert text.count("\n") == 2
    assert "\r\x1b[2Kcheckpoint written\n" in text
    assert all(len(piece.rstrip("\n")) <= 39 for piece in text.split("\r\x1b[2K"))


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1000, "1K"), (999_600, "1M"), (780e9, "780B"), (1.1e12, "1.1T")],
)
def test_short_count(count: float, text: str) -> None:
    """Bug: 999,600 is shown as 1e+03K."""
    assert short_count(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (3725, "1h 02m"), (446_400, "5d 04h")],
)
def test_duration(seconds: float, text: str) -> None:
    """Bug: 59.6 s is shown as 60s, or minutes without their zero."""
    assert duration(seconds) == text
