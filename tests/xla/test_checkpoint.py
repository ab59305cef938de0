"""Checkpoints that XLA writes for torch, and the other way round."""

import os
import subprocess
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from openmoe.checkpoint.manager import load_checkpoint
from openmoe.checkpoint.state import restore_counters, training_tensors
from openmoe.checkpoint.storage import write_checkpoint
from openmoe.launcher.train import model_identity
from openmoe.parallel.xla import LocalParts
from tests.xla.runs import SMALL, XLA, lines, run
from tests.xla.training import Training, batches, mesh, page

MESHES = [(8, 1, 1), (2, 4, 1), (2, 2, 2), (1, 4, 2)]
OPTIMIZERS = {name: (f"optim={name}", "optim.schedule.warmup_steps=5") for name in ("adafactor", "adamw")}
CLOSE = 2e-5


def run_on_two_ranks(run_dir: Path, *more: str) -> None:
    """The torch engine under torchrun, in this environment's torch 2.9."""
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "openmoe.launcher.train"]
    done = subprocess.run(
        [sys.executable, "-m", *command, *SMALL, f"run.dir={run_dir}", *more],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_from_torch_on_two_ranks_and_back(tmp_path: Path) -> None:
    """Bugs: a tensor of another place, order or type on the way from one engine to the other; a moment of the
    optimizer that starts anew; a place in the data that the other engine reads in another way."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run(whole)
    run_on_two_ranks(cut, "train.steps=4", "parallel.tensor=2")
    run(cut, "train.steps=8", "checkpoint.every_steps=1", "logging.read_every_steps=3", *XLA)
    assert (cut / "checkpoints/step_7").is_dir()
    run_on_two_ranks(cut, "parallel.shard=2")
    found, expected = lines(cut), lines(whole)
    assert [line["step"] for line in found] == list(range(1, 11))
    for ours, theirs in zip(found, expected, strict=True):
        for name, value in theirs.items():  # ours has validations where its parts end, too
            if name.startswith(("share", "epoch", "learning_rate", "phase", "objective", "tokens_seen")):
                assert ours[name] == value, (ours["step"], name)
            elif name.startswith(("loss", "lm_loss", "z_loss", "grad_norm", "accuracy", "eval", "dropped")):
                assert ours[name] == pytest.approx(value, rel=CLOSE), (ours["step"], name)


def save(training: Training, folder: Path, step: int) -> Path:
    write_checkpoint(
        folder,
        training_tensors(training.model, training.optimizer, training.ranks),
        step=step,
        tokens_seen=step,
        milestone=False,
        model=model_identity(training.config),
        metadata={},
    )
    return folder


def load(training: Training, folder: Path) -> Training:
    tensors = training_tensors(training.model, training.optimizer, training.ranks)
    manifest = load_checkpoint(folder, tensors, model_identity(training.config))
    restore_counters(training.optimizer, tensors, manifest.step, training.ranks)
    return training


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def torch_run(*config: str) -> Training:
    """Two steps, in one process."""
    training = Training(page("tiny", *config))
    for number, batch in enumerate(batches("tiny")[:2]):
        training.step(number, batch)
    return training


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_read_and_written_again(
    shape: tuple[int, int, int], optimizer: str, tmp_path: Path, devices: int
) -> None:
    """Bugs: a tensor cut over some axes and copied over others that is left out, written twice or gathered in
    another order; devices that keep what they had before the load."""
    written = save(torch_run(*OPTIMIZERS[optimizer]), tmp_path / "torch", 2)
    under_xla = load(Training(page("tiny", *OPTIMIZERS[optimizer], *mesh(*shape)), devices), written)
    assert contents(save(under_xla, tmp_path / "xla", 2)) == contents(written)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_after_a_step(optimizer: str, tmp_path: Path, devices: int) -> None:
    """Bugs: results of a step, which lie as the compiler has left them, are saved from where they lay before;
    a step that starts from other moments, or counts from another step, than were loaded."""
    config = OPTIMIZERS[optimizer]
    in_torch = torch_run(*config)
    under_xla = Training(page("tiny", *config, *mesh(2, 2, 2)), devices)
    load(under_xla, save(in_torch, tmp_path / "torch", 2))
    for training in (in_torch, under_xla):
        training.step(2, batches("tiny")[2])
    written = save(under_xla, tmp_path / "xla", 3)
    again = load(Training(page("tiny", *config)), written)
    assert contents(save(again, tmp_path / "again", 3)) == contents(written)
    expected = training_tensors(in_torch.model, in_torch.optimizer)
    for name, ours in training_tensors(again.model, again.optimizer).items():
        torch.testing.assert_close(ours, expected[name], rtol=1e-4, atol=1e-6, msg=partial(_of, name))


def _of(name: str, text: str) -> str:
    return f"{name}: {text}"


def test_saves_in_the_background_read_devices_in_the_training_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bugs: torch_xla called from two threads at once; a save that reads what the next step has made."""
    readers: set[threading.Thread] = set()
    for name in ("read", "places", "copies"):
        original = getattr(LocalParts, name)

        def noted(self: LocalParts, original: Any = original) -> Any:
            readers.add(threading.current_thread())
            return original(self)

        monkeypatch.setattr(LocalParts, name, noted)
    for asynchronous in ("true", "false"):
        more = ("train.steps=3", "checkpoint.every_steps=1", f"checkpoint.asynchronous={asynchronous}")
        run(tmp_path / "run", *more, "train.validation_rows=0", *XLA)
        (tmp_path / "run").rename(tmp_path / asynchronous)
    assert readers == {threading.main_thread()}
    for step in ("step_1", "step_2", "step_3"):
        found = [tensors_of(tmp_path / name / "checkpoints" / step) for name in ("true", "false")]
        assert found[0] == found[1]


def tensors_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
