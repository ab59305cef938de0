"""Who may write into a run's folder."""

import os
import shutil
import signal
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from openmoe.data.prepare import prepare
from openmoe.launcher.entry import load_config
from openmoe.launcher.errors import ConfigError
from openmoe.launcher.outputs import find_start, hold_folder
from openmoe.launcher.processes import Processes
from openmoe.launcher.run_folder import sole_writer
from openmoe.launcher.train import train
from openmoe.train.metrics import WandbWriter

from .commands import Commands
from .conftest import Small, lines


def test_a_second_process_is_refused(small: Small, commands: Commands, tmp_path: Path) -> None:
    """Bug: two processes that train in one folder (a requeued job, a second `make demo`) double lines and
    delete each other's checkpoints."""
    with sole_writer(tmp_path / "run"):
        code, stderr = commands.run(*small(tmp_path / "run", "checkpoint.resume=auto"))
    assert code == 2
    assert stderr.splitlines()[-1].startswith(f"error: run.dir={tmp_path / 'run'}: another process")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_that_began_in_between(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the folder is looked at, then data is prepared for minutes, then another's run is written over."""
    arguments = small(tmp_path / "run", "train.steps=3")

    def prepare_slowly(*args: object) -> object:
        monkeypatch.setattr("openmoe.launcher.train.prepare", prepare)
        train(load_config(arguments))  # as another process would
        return prepare(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("openmoe.launcher.train.prepare", prepare_slowly)
    with pytest.raises(ConfigError, match=r"holds a run already|has just trained"):
        train(load_config(arguments))
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2, 3]


class Restarted(Processes):
    """One process, started again by a launcher."""

    restarted = True


def test_a_restarted_run_goes_on_from_what_the_life_before_left_last(
    small: Small, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Bug: a restart given up at once, because a worker of the life before takes a moment to end; or because
    that one has still committed a checkpoint."""
    run_dir = tmp_path / "run"
    config = load_config(small(run_dir, "checkpoint.resume=auto"))
    train(load_config(small(run_dir, "train.steps=3")))
    (run_dir / "checkpoints" / "step_3").rename(tmp_path / "step_3")
    before = ExitStack()
    before.enter_context(sole_writer(run_dir))
    with pytest.raises(ConfigError, match="another process is training there"), hold_folder(config, None):
        pass

    def end() -> None:
        (tmp_path / "step_3").rename(run_dir / "checkpoints" / "step_3")
        before.close()

    ending = threading.Timer(0.5, end)
    ending.start()
    train(config, Restarted())
    ending.join()
    assert lines(run_dir)[3:] == undisturbed[3:]


def test_a_restarted_branch_goes_on_from_its_own_newest_checkpoint(small: Small, tmp_path: Path) -> None:
    """Bug: a run that began at an old checkpoint of its folder begins there again after each lost worker, or
    ends as that one has been deleted meanwhile; or it goes on from a checkpoint of the branch before."""
    run_dir = tmp_path / "run"
    train(load_config(small(run_dir)))  # step_6, step_9, step_12
    start = f"checkpoint.resume={run_dir / 'checkpoints' / 'step_6'}"
    config = load_config(small(run_dir, start, "optim.decay_rate=0.7"))
    assert find_start(config, restarted=True).name == "step_6"  # killed before it set the others aside
    other = load_config(small(run_dir, start, "optim.decay_rate=0.7", "train.steps=9"))
    train(config)
    assert find_start(config).name == "step_6"
    newest = find_start(config, restarted=True)
    assert newest.name == "step_12"
    with hold_folder(config, newest, restarted=True):
        pass
    assert find_start(other, restarted=True).name == "step_6"
    shutil.rmtree(run_dir / "checkpoints" / "step_6")
    assert find_start(config, restarted=True).name == "step_12"


def test_none_is_a_word_and_no_path(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: with run.dir=. a restarted run takes `none` for a path inside it, and goes on from a checkpoint
    that it finds there."""
    monkeypatch.chdir(tmp_path)
    config = load_config(small(Path(), "train.steps=1", "checkpoint.resume=none"))
    train(config)
    with pytest.raises(ConfigError, match="holds a run already"):
        find_start(config, restarted=True)


def test_a_branch_gets_its_own_wandb_page(small: Small, commands: Commands, tmp_path: Path) -> None:
    """Bug: a run that starts from another run's checkpoint writes on into that run's W&B page."""
    code, stderr = commands.run(*small(tmp_path / "a", "train.steps=3", "logging.wandb=offline"))
    assert code == 0, stderr
    code, stderr = commands.run(
        *small(
            tmp_path / "b", f"checkpoint.resume={tmp_path / 'a'}", "train.steps=6", "logging.wandb=offline"
        )
    )
    assert code == 0, stderr
    pages = [next((tmp_path / run / "wandb").glob("offline-run-*")).name[-8:] for run in ("a", "b")]
    assert pages[0] != pages[1]


def test_a_signal_while_closing(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a second SIGTERM (SLURM sends several) while W&B closes turns a saved run's exit code into 143."""
    escaped: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda number, _: escaped.append(number))
    monkeypatch.setattr(WandbWriter, "close", lambda self, code: os.kill(os.getpid(), signal.SIGTERM))
    try:
        train(load_config(small(tmp_path / "run", "train.steps=2")))
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert not escaped
    assert (tmp_path / "run" / "checkpoints" / "step_2").is_dir()
