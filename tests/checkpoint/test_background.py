"""Checkpoints that are written while the training goes on."""

import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from openmoe.checkpoint import shards
from openmoe.checkpoint.background import Background
from openmoe.checkpoint.config import CheckpointConfig
from openmoe.checkpoint.errors import CheckpointWriteError
from openmoe.checkpoint.host_copies import HostCopies
from openmoe.checkpoint.manager import CheckpointManager, latest, load_checkpoint


class Gate:
    """A function that waits to be let through."""

    def __init__(self, original: Callable[..., Any]) -> None:
        self.original = original
        self.reached, self.open = threading.Event(), threading.Event()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.reached.set()
        assert self.open.wait(30)
        return self.original(*args, **kwargs)


@pytest.fixture
def writing(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate = Gate(shards.write_file)
    monkeypatch.setattr(shards, "write_file", gate)
    return gate


@pytest.fixture
def manager(tmp_path: Path) -> CheckpointManager:
    return CheckpointManager(tmp_path, CheckpointConfig(keep=2, asynchronous=True))


def save(manager: CheckpointManager, step: int, tensor: Tensor, metadata: dict | None = None) -> None:
    counts = {"step": step, "tokens_seen": step, "milestone": False}
    manager.save({"model/a": tensor}, **counts, model={}, metadata=metadata or {})


def saved(manager: CheckpointManager, elements: int) -> tuple[dict, Tensor]:
    folder = latest(manager.directory)
    assert folder is not None
    target = torch.zeros(elements)
    return load_checkpoint(folder, {"model/a": target}, {}).metadata, target


def test_what_is_saved_is_the_moment_of_the_save(manager: CheckpointManager, writing: Gate) -> None:
    """The training waits for the disk; values or counters of a later step in the checkpoint."""
    tensor, counters = torch.ones(1000), {"tokens": 1}
    save(manager, 1, tensor, {"counters": counters})
    manager.wait_to_update()
    assert writing.reached.wait(30)
    tensor.fill_(2)
    counters["tokens"] = 2
    assert latest(manager.directory) is None
    writing.open.set()
    manager.finish()
    metadata, found = saved(manager, 1000)
    assert metadata == {"counters": {"tokens": 1}}
    assert (found == 1).all()


def test_an_update_waits_for_the_copies(manager: CheckpointManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """An update that comes before a tensor is copied gets into the checkpoint."""
    copying = Gate(HostCopies.take)
    monkeypatch.setattr(HostCopies, "take", lambda self: copying(self))
    tensor = torch.ones(1000)
    save(manager, 1, tensor)

    def update() -> None:
        manager.wait_to_update()
        tensor.fill_(2)

    updating = threading.Thread(target=update)
    updating.start()
    assert copying.reached.wait(30)
    updating.join(0.2)
    assert updating.is_alive()
    copying.open.set()
    updating.join(30)
    manager.finish()
    assert (tensor == 2).all()
    assert (saved(manager, 1000)[1] == 1).all()


def test_one_save_at_a_time_from_the_same_memory(manager: CheckpointManager, writing: Gate) -> None:
    """A second save overwrites what the first one still writes, or takes memory of its own each time."""
    writing.open.set()
    buffers = []
    for step in (1, 2, 3):
        save(manager, step, torch.full((1000,), float(step)))
        manager.wait_to_update()
        buffers.append(manager._copies._buffers["model/a"].data_ptr())
        if step == 1:
            writing.reached.clear()
    assert len(set(buffers)) == 1
    manager.finish()
    writing.open.clear()
    writing.reached.clear()
    save(manager, 4, torch.full((1000,), 4.0))
    assert writing.reached.wait(30)
    second = threading.Thread(target=save, args=(manager, 5, torch.full((1000,), 5.0)))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    assert latest(manager.directory).name == "step_3"
    writing.open.set()
    second.join(30)
    manager.finish()
    for folder, value in ((manager.directory / "step_4", 4), (manager.directory / "step_5", 5)):
        target = torch.zeros(1000)
        load_checkpoint(folder, {"model/a": target}, {})
        assert (target == value).all()


def test_a_save_that_fails_is_known_and_told_once(
    manager: CheckpointManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure that nobody hears of, a leftover, a training that waits for copies for ever."""
    tensor = torch.ones(1000)
    save(manager, 1, tensor)
    manager.finish()
    assert not manager.has_failed

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for target, name in ((shards, "write_file"), (HostCopies, "take")):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, no_space)
            save(manager, 2, tensor)
            manager.wait_to_update()
            assert manager._saving is not None
            assert manager._saving.ends_within(30)
            assert manager.has_failed
            with pytest.raises(CheckpointWriteError, match=r"No space left on device; the last one is whole"):
                manager.finish()
        assert not manager.has_failed
        manager.finish()
        assert [path.name for path in manager.directory.iterdir()] == ["step_1"]
    save(manager, 2, tensor)
    manager.finish()
    assert latest(manager.directory).name == "step_2"


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt()])
def test_the_end_of_a_run_with_an_error(
    error: BaseException, manager: CheckpointManager, writing: Gate
) -> None:
    """A good checkpoint thrown away because of a loss that is no number; a Ctrl-C that waits for the disk."""
    save(manager, 1, torch.ones(1000))
    assert writing.reached.wait(30)
    threading.Timer(0.2, writing.open.set).start()
    manager.leave(error)
    expected = ["step_1"] if isinstance(error, Exception) else []
    assert [path.name for path in manager.directory.iterdir()] == expected


HANG = """
import os, sys, time
from functools import partial
from pathlib import Path
import torch
from openmoe.checkpoint.config import CheckpointConfig
from openmoe.checkpoint.manager import CheckpointManager

asynchronous = sys.argv[2] == "True"
os.fsync = lambda _: time.sleep(60)
config = CheckpointConfig(save_timeout_seconds=1.0, asynchronous=asynchronous)
manager = CheckpointManager(Path(sys.argv[1]), config)
counts = {"step": 4, "tokens_seen": 4, "milestone": False}
manager.save({"model/a": torch.ones(4)}, **counts, model={}, metadata={})
manager.finish()
"""


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_that_hangs_ends_the_process(asynchronous: bool, tmp_path: Path) -> None:
    """A dead disk for which a run waits for days without a word."""
    command = [sys.executable, "-c", HANG, str(tmp_path), str(asynchronous)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 3, done.stderr
    line = "error: the save of step 4 is not done after 1 s (checkpoint.save_timeout_seconds): syncing shard"
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") == 1


def test_a_save_that_has_ended_holds_nothing() -> None:
    """State that was gathered for a save stays on the device until the next one."""
    tensor = torch.ones(10)
    held = weakref.ref(tensor)
    background = Background(partial(len, tensor), name="save")
    del tensor
    assert background.ends_within(30)
    assert held() is None


def test_a_save_that_can_not_begin_holds_up_no_update(
    manager: CheckpointManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A save that fails before it has copied anything, for which the next update waits for ever."""

    def no_thread(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("openmoe.checkpoint.manager.TimeLimit", no_thread)
    save(manager, 1, torch.ones(10))
    updating = threading.Thread(target=manager.wait_to_update, daemon=True)
    updating.start()
    updating.join(30)
    assert not updating.is_alive()
    with pytest.raises(RuntimeError, match="can't start new thread"):
        manager.finish()
