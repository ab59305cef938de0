"""Saves in the background of whole runs: what is on the disk when, and what a failed one does."""

import shutil
import signal
from pathlib import Path
from typing import Any

from openmoe.checkpoint.errors import SaveCancelled
from openmoe.checkpoint.storage import verify_checkpoint
from openmoe.launcher.errors import failure_of

from .commands import Commands, signal_before, wait_for, wrap
from .conftest import Small, lines
from .test_failures import error_line
from .test_whole_runs import start_run

RENAME = "openmoe.checkpoint.storage._commit"
SAVED = "openmoe.checkpoint.shards.write_file"


def steps_saved(run_dir: Path) -> list[int]:
    """Of the checkpoints, each verified; there is nothing else."""
    return sorted(verify_checkpoint(folder).step for folder in (run_dir / "checkpoints").iterdir())


def test_two_runs_of_one_config_write_the_same_bytes(
    small: Small, commands: Commands, tmp_path: Path
) -> None:
    """Bug: an order, a time or a number of the process in a checkpoint, so that nobody can compare two."""
    run_dir = tmp_path / "run"
    for name in ("first", "second"):
        code, stderr = commands.run(*small(run_dir, "train.steps=5"))
        assert code == 0, stderr
        run_dir.rename(tmp_path / name)
    first, second = (
        {f"{path.parent.name}/{path.name}": path.read_bytes() for path in (tmp_path / name).rglob("step_*/*")}
        for name in ("first", "second")
    )
    assert len(first) == 6
    assert first == second


def test_the_steps_line_is_there_before_its_checkpoint(
    small: Small, commands: Commands, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Bug: a crash after the commit and before the line's way to the disk: the resumed run lacks the line."""
    run_dir = tmp_path / "run"
    count_syncs = """
import os
from openmoe.train.metrics import JsonlWriter
os.synced, sync = False, JsonlWriter.sync
def counted(self):
    sync(self)
    os.synced = True
JsonlWriter.sync = counted
"""
    check = f"""
import json
text = open({str(run_dir / "metrics.jsonl")!r}).read().splitlines()
step = int(args[1].name.removeprefix("step_"))
assert step in [json.loads(line)["step"] for line in text]
assert os.synced
os.synced = False
time.sleep(0.2)  # a step takes less
return call()
"""
    code, stderr = commands.run(*small(run_dir), prelude=count_syncs + wrap(RENAME, check))
    assert code == 0, stderr
    assert lines(run_dir) == undisturbed
    assert steps_saved(run_dir) == [6, 9, 12]


def test_a_failed_save_ends_the_run_after_the_next_step(
    small: Small, commands: Commands, tmp_path: Path
) -> None:
    """Bug: a run that trains on without checkpoints; ranks that leave after different steps and tell of lost
    contact instead of the disk; a traceback."""
    run_dir = tmp_path / "run"
    # On the second rank, which is the last to know.
    late = """
import time
from openmoe.checkpoint.manager import CheckpointManager
write = CheckpointManager._write
def slowly(*args, **kwargs):
    try:
        write(*args, **kwargs)
    except OSError:
        time.sleep(1)
        raise
CheckpointManager._write = slowly
"""
    full = "if 'step_40' in str(args[0]): raise OSError(28, 'No space left on device')\nreturn call()"
    steps = ("train.steps=60", "checkpoint.every_steps=20")
    arguments = small(run_dir, *steps, "parallel.expert=2", "checkpoint.resume=auto")
    started = start_run(commands, 2, arguments, late + wrap(SAVED, full))
    assert [command.wait(120) for command in started] == [3, 3], started[0].stderr
    said = [command.stderr for command in started if "error: " in command.stderr]
    assert len(said) == 1
    assert "step_40: not written: No space left on device; the last one is whole: " in error_line(said[0])
    for log in (run_dir / "logs").iterdir():
        assert "CheckpointWriteError" in log.read_text()
        assert "LostContact" not in log.read_text()
    assert steps_saved(run_dir) == [20]
    done = (run_dir / "metrics.jsonl").read_text().count("\n")
    assert 40 <= done < 60, done  # the next save, which would find out, is after 60
    shutil.rmtree(run_dir / "logs")
    started = start_run(commands, 2, arguments)
    assert [command.wait(120) for command in started] == [0, 0], started[0].stderr
    assert [line["step"] for line in lines(run_dir)] == list(range(1, 61))


def test_a_hang_inside_a_save_is_named(small: Small, commands: Commands, tmp_path: Path) -> None:
    """Bug: one rank's dead disk, for which all others wait for days without a word."""
    run_dir = tmp_path / "run"
    hang = wrap(SAVED, "if 'step_6' in str(args[0]): time.sleep(600)\nreturn call()")
    arguments = small(run_dir, "checkpoint.save_timeout_seconds=4", "parallel.expert=2")
    started = start_run(commands, 2, arguments, hang)
    assert [command.wait(120) for command in started] == [3, 3]
    line = "the save of step 6 is not done after 4 s (checkpoint.save_timeout_seconds): "
    assert f"error: rank 0: {line}waiting for another rank: writing files" in started[0].stderr
    assert f"error: rank 1: {line}waiting for another rank: who writes what" in started[1].stderr
    assert "in wrapped" in (run_dir / "logs" / "rank_00001.log").read_text()  # the stack that hangs


def test_kill_while_a_save_is_in_the_background(
    small: Small, commands: Commands, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Bug: a resumed run that takes the unfinished checkpoint, or lacks lines."""
    run_dir = tmp_path / "run"
    arguments = small(run_dir, "checkpoint.resume=auto")
    for target in (SAVED, RENAME, "openmoe.checkpoint.manager.remove_checkpoint"):
        code, stderr = commands.run(*arguments, prelude=signal_before(target, 1, signal.SIGKILL))
        assert code == -signal.SIGKILL, stderr
    code, stderr = commands.run(*arguments)
    assert code == 0, stderr
    assert lines(run_dir) == undisturbed
    assert steps_saved(run_dir) == [3, 6, 9, 12]  # one too many, which goes with the next save


def test_a_save_that_one_rank_breaks_off(small: Small, commands: Commands, tmp_path: Path) -> None:
    """Bug: a second Ctrl-C on one rank shows as a traceback of another; or that rank leaves without telling
    the others' saves."""
    run_dir = tmp_path / "run"
    until_cancelled = f"""
open({str(tmp_path / "saving")!r}, "a").close()
while os.environ["RANK"] == "1" and not args[2]._cancelled.is_set():
    time.sleep(0.01)
return call()
"""
    arguments = small(run_dir, "checkpoint.every_steps=0", "parallel.expert=2")
    started = start_run(commands, 2, arguments, wrap(SAVED, until_cancelled))
    wait_for(lambda: (tmp_path / "saving").exists())
    for _ in range(2):
        started[1].sleep(0.5)  # both wait for the last save
        started[1].kill(signal.SIGINT)
    codes = [command.wait(60) for command in started]
    said = "".join(command.stderr for command in started)
    assert codes == [3, 130], said
    assert "Traceback" not in said
    assert "error:" not in said
    assert said.count("interrupted") == 1
    assert "SaveCancelled" in (run_dir / "logs" / "rank_00000.log").read_text()
    assert not steps_saved(run_dir)
    assert not failure_of(SaveCancelled("told by nobody else")).traceback
