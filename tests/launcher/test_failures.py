"""What goes wrong on the way ends with exit code 3 and one line; what was saved before is whole."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from openmoe.checkpoint.storage import verify_checkpoint

from .commands import Commands, signal_after, wrap
from .conftest import MARK, Small, lines

STEP = "openmoe.train.loop.train_step"
HUGE = ["~optim.schedule", "+optim.schedule={name: constant, value: 1e30}"]


def error_line(stderr: str) -> str:
    """The last line; the only one that reports an error."""
    assert "Traceback" not in stderr, stderr
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert errors == stderr.splitlines()[-1:], stderr
    return errors[0]


def steps_saved(run_dir: Path) -> list[int]:
    """Of the checkpoints, each verified."""
    return sorted(verify_checkpoint(folder).step for folder in (run_dir / "checkpoints").iterdir())


def test_a_non_finite_loss_stops_the_run(
    small: Small, commands: Commands, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Bug: NaN is trained on, or saved over the last good checkpoint; nobody knows which batch it was."""
    run_dir = tmp_path / "run"
    assert commands.run(*small(run_dir), prelude=signal_after(STEP, MARK, signal.SIGTERM))[0] == 0
    # The rate explodes in step 7; its loss is still fine, so only the model says that it is not to be saved.
    arguments = small(run_dir, "checkpoint.resume=auto", "checkpoint.every_steps=1", "checkpoint.keep=1")
    code, stderr = commands.run(*arguments, *HUGE)
    assert code == 3, stderr
    line = error_line(stderr)
    assert f"step {MARK + 1}, phase 1 (causal_lm), batch of rows {4 * MARK} to {4 * MARK + 3}" in line
    assert "alpha" in line
    assert steps_saved(run_dir) == [3, MARK]
    # Without a checkpoint due, the next step's loss says it.
    code, stderr = commands.run(*small(run_dir, "checkpoint.resume=auto"), *HUGE)
    assert code == 3, stderr
    line = error_line(stderr)
    assert line.startswith(("error: loss=nan", "error: loss=inf", "error: grad_norm="))
    assert f"step {MARK + 2}, phase 1" in line
    assert steps_saved(run_dir) == [3, MARK]
    code, stderr = commands.run(*small(run_dir, "checkpoint.resume=auto"))
    assert code == 0, stderr
    assert lines(run_dir) == undisturbed


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB; a checkpoint of the small run takes 0.6."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None:
        pytest.skip("mounting a small file system needs root")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("free_bytes", [300_000, 640_000])
def test_a_full_disk_while_saving(
    free_bytes: int, small: Small, commands: Commands, undisturbed: list[dict[str, Any]], small_disk: Path
) -> None:
    """Bug: a checkpoint cut off by a full disk passes for a whole one, or costs the one before it."""
    run_dir = small_disk / "run"
    arguments = small(run_dir, "checkpoint.resume=auto", "checkpoint.keep=1")
    assert commands.run(*arguments, prelude=signal_after(STEP, 3, signal.SIGTERM))[0] == 0
    free = shutil.disk_usage(small_disk).free
    (small_disk / "ballast").write_bytes(bytes(free - free_bytes))
    code, stderr = commands.run(*arguments)
    assert code == 3, stderr
    assert "No space left on device" in error_line(stderr)
    assert steps_saved(run_dir) == [3]
    (small_disk / "ballast").unlink()
    code, stderr = commands.run(*arguments)
    assert code == 0, stderr
    assert lines(run_dir) == undisturbed


def test_a_full_disk_while_writing_metrics(
    small: Small, commands: Commands, undisturbed: list[dict[str, Any]], small_disk: Path
) -> None:
    """Bug: half a line stays in the middle of metrics.jsonl, or a run goes on without a record."""
    run_dir = small_disk / "run"
    arguments = small(run_dir, "checkpoint.resume=auto", "checkpoint.every_steps=0")
    assert commands.run(*arguments, prelude=signal_after(STEP, 3, signal.SIGTERM))[0] == 0
    fill = f"""
if n == 1:
    with open({str(small_disk / "ballast")!r}, "wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)) == 4096: pass
        except OSError: pass
return call()
"""
    # What is left of the file's last page takes a few lines and a part of one.
    code, stderr = commands.run(*arguments, prelude=wrap("openmoe.train.metrics.JsonlWriter.write", fill))
    assert code == 3, stderr
    assert f"No space left on device: '{run_dir}/metrics.jsonl'" in error_line(stderr)
    assert not (run_dir / "metrics.jsonl").read_bytes().endswith(b"\n")
    assert steps_saved(run_dir) == [3]
    (small_disk / "ballast").unlink()
    code, stderr = commands.run(*arguments)
    assert code == 0, stderr
    assert lines(run_dir) == undisturbed


def test_a_model_that_does_not_fit_into_memory(small: Small, commands: Commands, tmp_path: Path) -> None:
    """Bug: a traceback of torch where a line about memory is due."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))"
    code, stderr = commands.run(
        *small(tmp_path / "run", "model.d_model=4096", "model.vocab_size=16777216"), prelude=limit
    )
    assert code == 3, stderr
    assert "memory" in error_line(stderr)
    assert not any(tmp_path.iterdir())
