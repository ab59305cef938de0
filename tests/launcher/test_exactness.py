"""One config and seed give one training, whatever happens to the process on the way."""

import json
import os
import random
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from openmoe.launcher.entry import load_config
from openmoe.launcher.train import train
from openmoe.train import loop

from .commands import Commands, signal_after, signal_before, wait_for, wrap
from .conftest import MARK, STEPS, Small, lines

Lines = list[dict[str, Any]]

WRITE = "openmoe.train.metrics.JsonlWriter.write"
TENSORS = "openmoe.checkpoint.storage._write_tensors"
COMMIT = "openmoe.checkpoint.storage._commit"
REMOVE = "openmoe.checkpoint.manager.remove_checkpoint"
VALIDATE = "openmoe.train.loop.validate"

TORN_LINE = """
if n == 2:
    args[0]._file.write(b'{"step": 2, "tokens_s')
    os.kill(os.getpid(), signal.SIGKILL)
return call()
"""
HALF_DELETED = """
folder = args[0]
os.rename(folder, folder.with_name(folder.name + ".partial"))
os.kill(os.getpid(), signal.SIGKILL)
"""


def run(arguments: list[str]) -> None:
    train(load_config(arguments))


def steps_of(found: Lines) -> list[int]:
    return [line["step"] for line in found]


def step_in(run_dir: Path) -> int:
    """Of the last line, while the file is being written; 0 before the first."""
    file = run_dir / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


def interrupt_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """The update after the next `steps` ones raises KeyboardInterrupt, as a second Ctrl-C does."""
    left, real = iter(range(steps)), loop.train_step

    def step(*args: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(loop, "train_step", step)


def test_two_runs_of_one_config_are_equal(
    small: Small, commands: Commands, undisturbed: Lines, tmp_path: Path
) -> None:
    """Bug: a seed that isn't set, an unordered set or a salted hash in the data order or the weights."""
    code, stderr = commands.run(*small(tmp_path / "run"))
    assert code == 0, stderr
    assert lines(tmp_path / "run") == undisturbed
    assert steps_of(undisturbed) == list(range(1, STEPS + 1))


def test_another_seed_is_another_run(
    small: Small, commands: Commands, undisturbed: Lines, tmp_path: Path
) -> None:
    """Bug: run.seed reaches nothing, so that every test of this file passes for a constant."""
    code, _ = commands.run(*small(tmp_path / "run", "run.seed=1", "train.steps=1"))
    assert code == 0
    assert lines(tmp_path / "run")[0]["loss"] != undisturbed[0]["loss"]


def test_arithmetic_on_two_threads_repeats_itself(small: Small, commands: Commands, tmp_path: Path) -> None:
    """Bug: a sum whose order depends on which thread comes first (scatter-add), seen only with several."""
    wide = ("model.d_model=128", "train.seq_len=128", "train.validation_rows=0", "train.steps=3")
    for name in ("first", "second"):
        code, stderr = commands.run(
            *small(tmp_path / name, *wide, "checkpoint.every_steps=0"),
            prelude="import torch; torch.set_num_threads(2)",
        )
        assert code == 0, stderr
    assert lines(tmp_path / "first") == lines(tmp_path / "second")


@pytest.mark.parametrize(
    "kills",
    [
        pytest.param(
            [
                wrap(WRITE, TORN_LINE),  # nothing saved yet: from the start again
                signal_before(TENSORS, 3),  # saving step 3
                signal_before(COMMIT, 1),  # step 3 again, with all its files
                signal_after(WRITE, MARK - 3),  # just before the mark: step 5 has its line, no checkpoint
                signal_before(VALIDATE, 2),  # at the mark: in the validation after step 6
            ],
            id="before the mark",
        ),
        pytest.param(
            [
                signal_after(TENSORS, MARK),  # at the mark: saving step 6
                signal_after(COMMIT, 1),  # at the mark: step 6 is saved, nothing after it
                signal_after(WRITE, 1),  # just after the mark
                wrap(REMOVE, HALF_DELETED),  # step 7 is saved; the oldest one is half deleted
                signal_before(WRITE, 3),
                signal_after(COMMIT, STEPS - 9),  # the end, but for the last words
            ],
            id="from the mark on",
        ),
    ],
)
def test_killed_at_any_place_and_resumed(
    kills: list[str], small: Small, commands: Commands, undisturbed: Lines, tmp_path: Path
) -> None:
    """Bug: state that no checkpoint holds (place in the data, mix, optimizer, counters), lines lost or
    doubled, half a checkpoint taken for a whole one."""
    arguments = small(
        tmp_path / "run", "checkpoint.resume=auto", "checkpoint.every_steps=1", "checkpoint.keep=2"
    )
    for prelude in kills:
        code, stderr = commands.run(*arguments, prelude=prelude)
        assert code == -signal.SIGKILL, stderr
    code, stderr = commands.run(*arguments)
    assert code == 0, stderr
    assert lines(tmp_path / "run") == undisturbed
    folders = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert folders[-2:] == [f"step_{STEPS - 1}", f"step_{STEPS}"]
    assert not any(name.endswith((".partial", ".replaced")) for name in folders)


def test_killed_at_random_moments_and_while_writing(
    small: Small, commands: Commands, undisturbed: Lines, tmp_path: Path
) -> None:
    """Bug: as above, at places nobody thought of; the moments are drawn anew in every run of this test."""
    draw = random.Random()
    run_dir = tmp_path / "run"
    arguments = small(run_dir, "checkpoint.resume=auto", "checkpoint.every_steps=1", "data.workers=2")

    def kill_later(while_writing: bool) -> None:
        start, command = step_in(run_dir), commands.start(*arguments)
        if while_writing:
            wait_for(lambda: any((run_dir / "checkpoints").glob("*.partial")) or command.exited)
        else:
            wait_for(lambda: step_in(run_dir) > start or command.exited)
            command.sleep(draw.uniform(0, 0.1))
        command.kill(signal.SIGKILL)
        command.wait()

    for kill in range(4):
        kill_later(while_writing=kill % 2 == 1)
    code, stderr = commands.run(*arguments)
    assert code == 0, stderr
    assert lines(run_dir) == undisturbed


@pytest.mark.parametrize("optim", ["adafactor", "adamw"])
@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
def test_resume_in_every_precision(
    precision: str, optim: str, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: state that is rounded when saved, or made in the first step after a resume."""
    more = (
        f"train.precision={precision}",
        f"optim={optim}",
        "optim.schedule.warmup_steps=5",
        "train.steps=8",
    )
    run(small(tmp_path / "whole", *more))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 4)  # dies in step 5; step 3 is saved
        with pytest.raises(KeyboardInterrupt):
            run(small(tmp_path / "cut", *more))
    run(small(tmp_path / "cut", *more, "checkpoint.resume=auto"))
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
    assert steps_of(lines(tmp_path / "cut")) == list(range(1, 9))


def test_workers_change_nothing(small: Small, undisturbed: Lines, tmp_path: Path) -> None:
    """Bug: threads that build ahead deliver rows in the order in which they finish, or lose the place."""
    run(small(tmp_path / "run", "data.workers=2"))
    assert lines(tmp_path / "run") == undisturbed


def test_a_run_may_be_continued_elsewhere(small: Small, undisturbed: Lines, tmp_path: Path) -> None:
    """Bug: a checkpoint that only its own folder can continue."""
    run(small(tmp_path / "first", "train.steps=7"))
    run(small(tmp_path / "second", f"checkpoint.resume={tmp_path}/first/checkpoints/step_3"))
    assert lines(tmp_path / "second") == undisturbed[3:]


@pytest.mark.parametrize(
    "target",
    [
        "openmoe.train.metrics.JsonlWriter.truncate_after",
        "openmoe.checkpoint.manager.CheckpointManager.set_aside_newer",
    ],
)
def test_going_back_to_an_older_checkpoint(
    target: str, small: Small, commands: Commands, undisturbed: Lines, tmp_path: Path
) -> None:
    """Bug: after going back, and dying on the way, a resume picks up the checkpoint of the life before, whose
    lines have gone."""
    run_dir = tmp_path / "run"
    assert commands.run(*small(run_dir, "train.steps=10"))[0] == 0
    back = f"checkpoint.resume={run_dir}/checkpoints/step_6"
    code, stderr = commands.run(*small(run_dir, back), prelude=signal_after(target, 1))
    assert code == -signal.SIGKILL, stderr
    code, stderr = commands.run(*small(run_dir, "checkpoint.resume=auto"))
    assert code == 0, stderr
    assert lines(run_dir) == undisturbed


def test_resuming_a_finished_run_changes_nothing(small: Small, tmp_path: Path) -> None:
    """Bug: one more step, a second last line, or the last checkpoint set aside."""
    run(small(tmp_path / "run"))
    before = (tmp_path / "run/metrics.jsonl").read_bytes()
    run(small(tmp_path / "run", "checkpoint.resume=auto"))
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before
    assert (tmp_path / f"run/checkpoints/step_{STEPS}/manifest.json").exists()


@pytest.mark.parametrize(
    ("number", "target", "n", "expected"),
    [
        pytest.param(
            signal.SIGINT, VALIDATE, 1, range(MARK + 1, MARK + 2), id="in the validation at the mark"
        ),
        pytest.param(signal.SIGTERM, WRITE, 2, range(3, 4), id="after a line"),
        pytest.param(signal.SIGINT, TENSORS, 1, range(5, 9), id="while saving in the background"),
        pytest.param(
            signal.SIGTERM,
            "openmoe.train.signals.StopSignals.__enter__",
            1,
            range(1, 2),
            id="before the first step",
        ),
    ],
)
def test_a_signal_saves_and_leaves(
    number: signal.Signals, target: str, n: int, expected: range, small: Small, commands: Commands,
    undisturbed: Lines, tmp_path: Path,
) -> None:  # fmt: skip
    """Bug: a signal that arrives at an awkward moment is answered without saving; a resumed run differs; a
    launcher can't tell the save from the end. What comes after a step's sums, in which processes agree,
    counts in the next step."""
    run_dir, stopped = tmp_path / "run", tmp_path / "stopped"
    launched = {"OPENMOE_STOPPED_FILE": str(stopped)}
    arguments = small(run_dir, "checkpoint.every_steps=4", "checkpoint.resume=auto")
    code, stderr = commands.run(*arguments, prelude=signal_after(target, n, number), **launched)
    assert code == 0, stderr
    found = re.search(rf"stopped by {number.name}, saved at step (\d+) ", stderr)
    assert found, stderr
    saved = int(found[1])
    assert saved in expected
    assert (run_dir / f"checkpoints/step_{saved}/manifest.json").exists()
    assert steps_of(lines(run_dir)) == list(range(1, saved + 1))
    assert stopped.read_text() == f"{number.name}\n"
    stopped.unlink()
    code, stderr = commands.run(*arguments, **launched)
    assert code == 0, stderr
    assert lines(run_dir) == undisturbed
    assert not stopped.exists()


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_the_second_ctrl_c_stops_at_once(
    first: signal.Signals, small: Small, commands: Commands, undisturbed: Lines, tmp_path: Path
) -> None:
    """Bug: a run that hangs can't be left, or leaves something that can't be resumed."""
    run_dir = tmp_path / "run"
    stuck = wrap("openmoe.train.loop.train_step", "if n == 5: time.sleep(600)\nreturn call()")
    command = commands.start(*small(run_dir), prelude=stuck)
    wait_for(lambda: step_in(run_dir) == 4)
    command.sleep(0.2)
    command.kill(first)
    command.sleep(0.3)
    assert not command.exited
    command.kill(signal.SIGINT)
    assert command.wait(seconds=5) == 130
    assert "Traceback" not in command.stderr
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step_3"]
    code, stderr = commands.run(*small(run_dir, "checkpoint.resume=auto"))
    assert code == 0, stderr
    assert lines(run_dir) == undisturbed


def test_ctrl_c_while_the_data_are_prepared(small: Small, commands: Commands, tmp_path: Path) -> None:
    """Bug: a traceback for a user who changed their mind."""
    stuck = wrap("openmoe.launcher.train.prepare", "time.sleep(600)")
    command = commands.start(*small(tmp_path / "run"), prelude=stuck)
    command.sleep(0.5)
    command.kill(signal.SIGINT)
    assert command.wait(seconds=5) == 130
    assert command.stderr.splitlines() == ["interrupted"]
    assert not (tmp_path / "run").exists()


def test_the_wandb_run_goes_on_after_a_resume(small: Small, commands: Commands, tmp_path: Path) -> None:
    """Bug: each resume opens a new page; Ctrl-C, which a terminal sends to W&B's process too, loses it."""
    run_dir = tmp_path / "run"
    arguments = small(run_dir, "logging.wandb=offline", "checkpoint.resume=auto")
    slow = wrap("openmoe.train.loop.train_step", "time.sleep(0.05)\nreturn call()")
    command = commands.start(*arguments, prelude=slow)
    wait_for(lambda: step_in(run_dir) >= 2)
    os.killpg(command.pid, signal.SIGINT)
    assert command.wait() == 0, command.stderr
    assert "W&B is off" not in command.stderr
    code, stderr = commands.run(*arguments)
    assert code == 0, stderr
    runs = sorted((run_dir / "wandb").glob("offline-run-*"))
    assert len(runs) == 2
    ids = {path.name.rpartition("-")[2] for path in runs}
    assert len(ids) == 1
    manifest = json.loads((run_dir / f"checkpoints/step_{STEPS}/manifest.json").read_text())
    assert {manifest["metadata"]["wandb_run_id"]} == ids
    assert all(list(path.glob("*.wandb")) for path in runs)
