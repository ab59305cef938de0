"""The folder of a run: who may write there, and where the run goes on."""

import errno
import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openmoe.checkpoint.errors import CheckpointError
from openmoe.checkpoint.manager import FOLDER, checkpoint_at, find_checkpoint, steps
from openmoe.checkpoint.manifest import read_manifest
from openmoe.launcher.errors import ConfigError

_LOOK_SECONDS = 0.2  # between two tries to get the lock


def resume_point(resume: str, run_dir: Path, branch: dict[str, Any] | None = None) -> Path | None:
    """The checkpoint to go on from, None for a fresh start.

    `branch` is the configuration of a run that was started again after processes were lost. Where `resume` is
    a checkpoint of its own folder, the newest one counts that it has written since.

    Raises ConfigError where the folder holds another run, CheckpointError where `resume` names no checkpoint.
    """
    names_own = resume not in ("none", "auto") and belongs_to(Path(resume), run_dir)
    found = _newest_of(branch, run_dir, resume) if branch and names_own else None
    found = found or find_checkpoint(resume, run_dir)
    if found is not None and _holds_weights_alone(found):
        raise ConfigError(
            f"checkpoint.resume={resume}: {found} holds weights alone; start a run from them with "
            f"checkpoint.initialise_from={found}"
        )
    try:
        used = (run_dir / "metrics.jsonl").exists() or any(run_dir.glob("checkpoints/step_*"))
    except OSError as error:
        raise ConfigError(f"run.dir={run_dir}: can't be read: {error.strerror}") from None
    if used and not (resume == "auto" or belongs_to(found, run_dir)):
        raise ConfigError(
            f"run.dir={run_dir}: holds a run already; choose another, or checkpoint.resume=auto to go on"
        )
    return found


def _newest_of(branch: dict[str, Any], run_dir: Path, start: str) -> Path | None:
    """The newest checkpoint in `run_dir` that a run of this configuration has written after `start`, which
    may have been deleted since; None where there is none yet."""
    own = json.loads(json.dumps(branch))  # as a manifest has it
    try:
        first = read_manifest(Path(start)).step + 1
    except CheckpointError:
        first = 0
    for folder in reversed(steps(run_dir / FOLDER)):
        try:
            manifest = read_manifest(folder)
        except CheckpointError:
            continue
        if manifest.step >= first and manifest.metadata.get("config") == own:
            return folder
    return None


def _holds_weights_alone(checkpoint: Path) -> bool:
    try:
        kinds = {name.split("/")[0] for name in read_manifest(checkpoint).tensors}
    except CheckpointError:
        return False  # damaged: who loads it says so, and what to do
    return kinds == {"model"}


def start_point(initialise_from: str | None, resume_from: Path | None) -> Path | None:
    """The checkpoint whose weights a run starts with; None where it has its own, or resumes.

    Raises CheckpointError where the path holds none.
    """
    if initialise_from is None or resume_from is not None:
        return None
    return checkpoint_at("checkpoint.initialise_from", initialise_from)


def belongs_to(checkpoint: Path | None, run_dir: Path) -> bool:
    """Is it one of this run's own checkpoints?"""
    return checkpoint is not None and run_dir.resolve() in checkpoint.resolve().parents


@contextmanager
def sole_writer(run_dir: Path, patience_seconds: float = 0.0) -> Iterator[None]:
    """Makes the folder and holds it: two processes writing one run would ruin both.

    The lock goes with the process, however it ends; with a lost node it may take the file server a while.
    Raises ConfigError where another one holds it for longer than `patience_seconds`, or where no folder can
    be made.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = os.open(run_dir / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise ConfigError(f"run.dir={run_dir}: can't be written: {error.strerror}") from None
    try:
        _lock(file, time.monotonic() + patience_seconds)
    except OSError:
        raise ConfigError(f"run.dir={run_dir}: another process is training there") from None
    else:
        yield
    finally:
        os.close(file)


def _lock(file: int, deadline: float) -> None:
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(_LOOK_SECONDS)
