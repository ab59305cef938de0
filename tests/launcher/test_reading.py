"""Metrics of several steps read together (logging.read_every_steps): the same run, seen later."""

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from .commands import Commands, signal_after, wrap
from .conftest import MARK, Small, lines
from .test_failures import HUGE, error_line, steps_saved

STEP = "openmoe.train.loop.train_step"
READ = "openmoe.parallel.ranks.OneProcess.read_numbers"


def note_reads(file: Path) -> str:
    """A prelude: a line for each read, with as many numbers as steps were read."""
    return wrap(READ, f"open({str(file)!r}, 'a').write(f'{{len(args[1])}}\\n')\nreturn call()")


@pytest.mark.parametrize(
    ("every", "windows"),
    [(4, [3, 3, 1, 3, 3, 1]), (2, [2, 1, 2, 1, 1, 2, 1, 2, 1, 1])],
    ids=["cut short by saves and validations", "whole windows too"],
)
def test_the_same_lines(
    every: int,
    windows: list[int],
    small: Small,
    commands: Commands,
    undisturbed: list[dict[str, Any]],
    tmp_path: Path,
) -> None:
    """Bugs: a step's metrics beside another step's batch, rate or counters; a step left out where a window is
    cut short by a validation, a save, a phase or the end; the device is waited for in between."""
    run_dir = tmp_path / "run"
    code, stderr = commands.run(
        *small(run_dir, f"logging.read_every_steps={every}"), prelude=note_reads(tmp_path / "reads")
    )
    assert code == 0, stderr
    assert lines(run_dir) == undisturbed
    # Saves each 3 steps; after steps 6 and 12 a validation, itself a read of one.
    assert [int(count) for count in (tmp_path / "reads").read_text().split()] == windows


def test_time_is_shared_out_over_what_was_read_together(
    small: Small, commands: Commands, tmp_path: Path
) -> None:
    """Bugs: the step at whose end metrics are read has the time of all of them; a whole window's in each."""
    run_dir = tmp_path / "run"
    arguments = small(
        run_dir,
        "logging.read_every_steps=4",
        "train.steps=4",
        "checkpoint.every_steps=0",
        "train.validation_rows=0",
    )
    code, stderr = commands.run(*arguments, prelude=wrap(STEP, "if n == 2: time.sleep(4.0)\nreturn call()"))
    assert code == 0, stderr
    seconds = [
        json.loads(line)["step_seconds"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()
    ]
    assert len(set(seconds)) == 1
    assert 1.0 <= seconds[0] < 4.0


def test_a_signal_is_heard_when_metrics_are_read(
    small: Small, commands: Commands, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Bugs: a stop in the middle of a window, which other processes take no part in, of a step whose line is
    not written yet; a signal that is never heard."""
    run_dir = tmp_path / "run"
    arguments = small(
        run_dir, "logging.read_every_steps=4", "checkpoint.every_steps=0", "checkpoint.resume=auto"
    )
    code, stderr = commands.run(*arguments, prelude=signal_after(STEP, 2, signal.SIGTERM))
    assert code == 0, stderr
    assert "stopped by SIGTERM, saved at step 4 " in stderr
    assert steps_saved(run_dir) == [4]
    assert lines(run_dir) == undisturbed[:4]
    code, stderr = commands.run(*arguments)
    assert code == 0, stderr
    assert lines(run_dir) == undisturbed


def test_a_non_finite_loss_names_its_own_step(
    small: Small, commands: Commands, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Bugs: the step at whose end metrics were read is blamed; its earlier, good steps lose their lines; a
    model that is not finite is saved."""
    run_dir = tmp_path / "run"
    assert commands.run(*small(run_dir), prelude=signal_after(STEP, MARK, signal.SIGTERM))[0] == 0
    arguments = small(
        run_dir, "checkpoint.resume=auto", "logging.read_every_steps=5", "checkpoint.every_steps=5"
    )
    # The rate explodes in step 7, the loss of step 8 shows it, and it is read after step 10, with a save due.
    code, stderr = commands.run(*arguments, *HUGE)
    assert code == 3, stderr
    line = error_line(stderr)
    assert line.startswith(("error: loss=nan", "error: loss=inf", "error: grad_norm="))
    assert f"step {MARK + 2}, phase 1" in line
    assert f"batch of rows {4 * (MARK + 1)} to" in line
    assert [found["step"] for found in lines(run_dir)] == list(range(1, MARK + 2))
    assert steps_saved(run_dir) == [3, MARK]
    code, stderr = commands.run(*small(run_dir, "checkpoint.resume=auto"))
    assert code == 0, stderr
    assert lines(run_dir) == undisturbed
