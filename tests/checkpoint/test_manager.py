"""The checkpoints of a run: which are written, which are kept, where a run goes on."""

from pathlib import Path

import pytest
import torch

from openmoe.checkpoint.config import CheckpointConfig
from openmoe.checkpoint.errors import CheckpointError
from openmoe.checkpoint.manager import CheckpointManager, find_checkpoint, latest, steps
from openmoe.checkpoint.storage import verify_checkpoint


def save(manager: CheckpointManager, step: int, milestone: bool = False, value: float = 0.0) -> Path:
    folder = manager.save(
        {"model/a": torch.full((4,), value)},
        step=step,
        tokens_seen=step,
        milestone=milestone,
        model={},
        metadata={},
    )
    manager.finish()
    return folder


def names(manager: CheckpointManager) -> list[str]:
    return sorted((path.name for path in manager.directory.iterdir()), key=lambda name: (len(name), name))


def test_the_newest_are_kept_and_milestones_for_good(tmp_path: Path) -> None:
    """The order of names taken for that of steps (step_10 before step_9), a milestone deleted."""
    manager = CheckpointManager(tmp_path, CheckpointConfig(keep=2))
    for step in range(1, 13):
        save(manager, step, milestone=step in (3, 8))
        if step == 9:  # a milestone among the newest takes nobody's place
            assert names(manager) == ["step_3", "step_7", "step_8", "step_9"]
    assert names(manager) == ["step_3", "step_8", "step_11", "step_12"]
    manager = CheckpointManager(tmp_path, CheckpointConfig(keep=0))
    for step in range(13, 16):
        save(manager, step)
    assert names(manager) == ["step_3", "step_8", "step_11", "step_12", "step_13", "step_14", "step_15"]
    assert [path.name for path in steps(manager.directory)] == names(manager)


def test_when_a_checkpoint_is_due(tmp_path: Path) -> None:
    """Milestones that only fall on every_steps, or twice, or never because a mark is stepped over."""
    manager = CheckpointManager(tmp_path, CheckpointConfig(every_steps=5, milestone_every_tokens=1000))
    per_step = 300
    due = [s for s in range(1, 12) if manager.is_due(s, (s - 1) * per_step, s * per_step)]
    milestones = [s for s in range(1, 12) if manager.is_milestone((s - 1) * per_step, s * per_step)]
    assert milestones == [4, 7, 10]  # 1200, 2100, 3000
    assert due == [4, 5, 7, 10]
    manager = CheckpointManager(tmp_path, CheckpointConfig())
    assert not any(manager.is_due(s, s - 1, s) for s in range(1, 100))


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    """A resumed run that can't write the step it was resumed from."""
    manager = CheckpointManager(tmp_path, CheckpointConfig())
    save(manager, 5, value=1.0)
    folder = save(manager, 5, value=2.0)
    assert names(manager) == ["step_5"]
    assert verify_checkpoint(folder).step == 5
    assert b"\x00\x00\x00\x40" in next(folder.glob("*.safetensors")).read_bytes()  # 2.0


def test_leftovers_of_a_crash_are_put_away(tmp_path: Path) -> None:
    """A half-written folder taken for a checkpoint, or the old one lost while it was being replaced."""
    manager = CheckpointManager(tmp_path, CheckpointConfig())
    for step in (1, 2, 3):
        save(manager, step, value=1.0)
    (manager.directory / "step_3").rename(manager.directory / "step_3.replaced")
    (manager.directory / "step_4.partial").mkdir()
    (manager.directory / "step_4.partial" / "manifest.json").write_text("{")
    assert latest(manager.directory) == manager.directory / "step_2"
    manager = CheckpointManager(tmp_path, CheckpointConfig())
    assert names(manager) == ["step_2", "step_3"]
    verify_checkpoint(manager.directory / "step_3")
    save(manager, 4)
    (manager.directory / "step_4.replaced").mkdir()
    manager = CheckpointManager(tmp_path, CheckpointConfig())
    assert names(manager) == ["step_3", "step_4"]


def test_checkpoints_newer_than_the_resumed_one_are_set_aside(tmp_path: Path) -> None:
    """After resuming from step 1, `auto` jumps to the abandoned run's step 3; a second branch deletes it."""
    manager = CheckpointManager(tmp_path, CheckpointConfig(keep=0))
    for step in (1, 2, 3):
        save(manager, step)
    assert [path.name for path in manager.set_aside_newer(1)] == ["step_2.stale", "step_3.stale"]
    assert find_checkpoint("auto", tmp_path) == manager.directory / "step_1"
    save(manager, 2)
    manager.set_aside_newer(1)
    assert names(manager) == ["step_1", "step_2.stale", "step_3.stale", "step_2.stale1"]


def test_where_a_run_goes_on(tmp_path: Path) -> None:
    """`auto` in a new folder refused, or a wrong path taken for a fresh start."""
    run = tmp_path / "run"
    assert find_checkpoint("none", run) is None
    assert find_checkpoint("auto", run) is None
    manager = CheckpointManager(run, CheckpointConfig())
    for step in (9, 10):
        save(manager, step)
    newest = manager.directory / "step_10"
    assert find_checkpoint("auto", run) == newest
    assert find_checkpoint("none", run) is None
    other = tmp_path / "other"
    assert find_checkpoint(str(run), other) == newest
    assert find_checkpoint(str(run / "checkpoints"), other) == newest
    assert find_checkpoint(str(run / "checkpoints" / "step_9"), other) == manager.directory / "step_9"
    (run / "checkpoints" / "step_9").rename(tmp_path / "copy")
    assert find_checkpoint(str(tmp_path / "copy"), other) == tmp_path / "copy"
    (tmp_path / "copy").rename(tmp_path / "copy.partial")
    for wrong in (tmp_path / "missing", tmp_path / "copy.partial", newest / "manifest.json", tmp_path):
        with pytest.raises(CheckpointError, match="no checkpoint there; allowed: none, auto"):
            find_checkpoint(str(wrong), other)


def test_a_folder_that_cant_be_read_is_not_empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that can't list its checkpoints starts at step 0 and cuts all of its lines."""
    save(CheckpointManager(tmp_path, CheckpointConfig()), 1)

    def refuse(path: object) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.listdir", refuse)
    with pytest.raises(CheckpointError, match="checkpoints: can't be read: Permission denied"):
        find_checkpoint("auto", tmp_path)
