"""kill -9 and a full disk while a checkpoint is written: the last good one is whole."""

import errno
import math
import os
import shutil
import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from openmoe.checkpoint.config import CheckpointConfig
from openmoe.checkpoint.errors import CheckpointWriteError
from openmoe.checkpoint.manager import CheckpointManager, latest, load_checkpoint
from openmoe.checkpoint.storage import verify_checkpoint

COMMON = """
import os, random, resource, signal, sys, time
from pathlib import Path
import torch
from openmoe.checkpoint.config import CheckpointConfig
from openmoe.checkpoint.errors import CheckpointWriteError
from openmoe.checkpoint.manager import CheckpointManager, latest, load_checkpoint, load_checkpoint, steps
from openmoe.checkpoint.storage import verify_checkpoint

torch.set_num_threads(1)
run = Path(sys.argv[1])

def save(manager, step, value, elements=50_000):
    tensors = {name: torch.full((elements,), float(value)) for name in ("model/a", "model/b")}
    counts = {"step": step, "tokens_seen": step, "milestone": False}
    manager.save(tensors, **counts, model={}, metadata={"value": value})
    manager.finish()

def check(allowed):
    manager = CheckpointManager(run, CheckpointConfig(keep=2))  # what a restarted run does first
    assert not [p.name for p in manager.directory.iterdir() if not p.name.removeprefix("step_").isdecimal()]
    for folder in steps(manager.directory):
        verify_checkpoint(folder)
    target = {"model/a": torch.zeros(50_000), "model/b": torch.zeros(50_000)}
    manifest = load_checkpoint(latest(manager.directory), target, {})
    values = {manifest.metadata["value"], *target["model/a"].tolist(), *target["model/b"].tolist()}
    assert len(values) == 1 and (manifest.step, values.pop()) in allowed, (manifest.step, values, allowed)
    return manager, manifest

def in_child(action):
    pid = os.fork()
    if pid == 0:
        try:
            action()
        finally:
            os._exit(1)
    return pid
"""

EVERY_CALL = (
    COMMON
    + """
def dying_at(number):
    count = 0
    def wrap(function):
        def call(*args, **kwargs):
            nonlocal count
            for moment in ("before", "after"):
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                if moment == "before":
                    result = function(*args, **kwargs)
            return result
        return call
    for name in ("rename", "unlink", "rmdir", "mkdir", "fsync", "open", "write", "close"):
        setattr(os, name, wrap(getattr(os, name)))

def attempt(number, step, value):
    manager = CheckpointManager(run, CheckpointConfig(keep=2))
    dying_at(number)
    save(manager, step, value)
    os._exit(0)

kills = 0
for step_of_attempt in ("new", "same"):
    manager = CheckpointManager(run, CheckpointConfig(keep=2))
    value = 1000 if step_of_attempt == "new" else 2000
    step = 10 if step_of_attempt == "new" else 500
    save(manager, step - 1, value - 1)
    save(manager, step, value)
    for number in range(1, 500):
        new_step = step + (step_of_attempt == "new")
        pid = in_child(lambda: attempt(number, new_step, value + 1))
        status = os.waitpid(pid, 0)[1]
        manager, manifest = check({(step, value), (new_step, value + 1)})
        step, value = manifest.step, int(manifest.metadata["value"])
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        kills += 1
print(kills)
"""
)

RANDOM_MOMENTS = (
    COMMON
    + """
rng = random.Random(int(sys.argv[2]))

def loop(step):
    manager = CheckpointManager(run, CheckpointConfig(keep=2))
    while True:
        step += 1
        save(manager, step, step)

save(CheckpointManager(run, CheckpointConfig(keep=2)), 1, 1)
start = time.monotonic()
save(CheckpointManager(run, CheckpointConfig(keep=2)), 1, 1)
seconds = time.monotonic() - start
step = 1
for _ in range(60):
    pid = in_child(lambda: loop(step))
    time.sleep(rng.uniform(0.5, 5) * seconds)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    manager = CheckpointManager(run, CheckpointConfig(keep=2))
    step = int(latest(manager.directory).name.removeprefix("step_"))
    check({(step, step)})
print(step)
"""
)


def python(script: str, *arguments: object) -> str:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kill_before_and_after_every_call_that_changes_the_disk(tmp_path: Path) -> None:
    """A moment, in a new save or in one that replaces a step, after which no whole checkpoint is left."""
    assert int(python(EVERY_CALL, tmp_path)) > 30


def test_kill_at_random_moments(tmp_path: Path) -> None:
    """A torn file under a committed name."""
    assert int(python(RANDOM_MOMENTS, tmp_path, 0)) > 20


def test_a_file_size_limit_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    """A failed write that leaves a partial folder or no old checkpoint, or raises torch's own exception."""
    script = """
manager = CheckpointManager(run, CheckpointConfig(keep=1))
save(manager, 1, 1)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save(manager, 2, 2)
except CheckpointWriteError as error:
    print(error)
"""
    message = python(COMMON + script, tmp_path)
    assert "step_2: not written: File too large" in message
    assert f"the last one is whole: {tmp_path / 'checkpoints' / 'step_1'}" in message
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_1"]
    verify_checkpoint(tmp_path / "checkpoints" / "step_1")


def test_a_full_disk_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    """The same on a real file system without space, which fails in the manifest or in the tensors."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        manager = CheckpointManager(disk, CheckpointConfig(keep=1))

        def save(step: int, elements: int) -> None:
            tensors = {"model/a": torch.zeros(elements)}
            manager.save(tensors, step=step, tokens_seen=step, milestone=False, model={}, metadata={})
            manager.finish()

        save(1, 1000)
        disk_status = os.statvfs(disk)
        free_bytes = disk_status.f_bavail * disk_status.f_frsize
        fits_without_manifest = (free_bytes - 300) // 4  # 300 bytes of header
        for elements in (fits_without_manifest, free_bytes // 4, free_bytes):
            with pytest.raises(CheckpointWriteError, match="No space left on device"):
                save(2, elements)
            assert [path.name for path in manager.directory.iterdir()] == ["step_1"]
            verify_checkpoint(latest(manager.directory))
        save(2, 2000)
        assert [path.name for path in manager.directory.iterdir()] == ["step_2"]
    finally:
        subprocess.run(["umount", str(disk)], check=True)


CALLS = ("open", "write", "fsync", "mkdir", "rename", "rmdir", "unlink", "scandir")


class Failing:
    """While entered, the calls to the disk from number `first` to `last` (from 0) fail."""

    def __init__(self, code: int, first: int, last: float) -> None:
        self.code, self.first, self.last = code, first, last
        self.count = 0

    def __enter__(self) -> "Failing":
        self._patch = pytest.MonkeyPatch()
        for name in CALLS:
            self._patch.setattr(os, name, self._wrapped(getattr(os, name)))
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    def _wrapped(self, original: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.first < self.count <= self.last + 1:
                raise OSError(self.code, os.strerror(self.code))
            return original(*args, **kwargs)

        return call


@pytest.mark.parametrize("again", [True, False], ids=["for good", "once"])
@pytest.mark.parametrize("same_step", [True, False])
def test_any_call_to_the_disk_may_fail(same_step: bool, again: bool, tmp_path: Path) -> None:
    """The last good checkpoint is lost, or a broken one passes for whole, because of an error at one of the
    calls: no space, no permission, a broken disk, once or from then on."""
    for number in count():
        manager = CheckpointManager(tmp_path, CheckpointConfig(keep=1))

        def save(step: int, value: int, manager: CheckpointManager = manager) -> None:
            tensors = {"model/a": torch.full((1000,), float(value))}
            counts = {"step": step, "tokens_seen": step, "milestone": False}
            manager.save(tensors, **counts, model={}, metadata={"value": value})
            manager.finish()

        save(1, 2 * number)
        code = (errno.ENOSPC, errno.EACCES, errno.EIO)[number % 3]
        found = None
        with Failing(code, number, math.inf if again else number) as disk:
            try:
                save(1 if same_step else 2, 2 * number + 1)
            except OSError as error:
                found = error.errno
        assert found in (None, code)
        if disk.count <= number:
            assert found is None
            break
        manager = CheckpointManager(tmp_path, CheckpointConfig(keep=1))
        folder = latest(manager.directory)
        assert folder is not None
        target = {"model/a": torch.zeros(1000)}
        manifest = load_checkpoint(folder, target, {})
        value = manifest.metadata["value"]
        assert value in (2 * number, 2 * number + 1)
        assert (target["model/a"] == value).all()
        shutil.rmtree(manager.directory)
    assert number > 15
