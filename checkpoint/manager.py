"""The checkpoints of one run: when to write one, which to keep, where to go on."""

import os
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from openmoe.checkpoint.config import CheckpointConfig
from openmoe.checkpoint.errors import CheckpointError, CheckpointWriteError
from openmoe.checkpoint.manifest import MANIFEST_NAME, Manifest, read_manifest
from openmoe.checkpoint.storage import (
    PARTIAL,
    read_checkpoint,
    recover,
    remove_checkpoint,
    verify_checkpoint,
    write_checkpoint,
)
from openmoe.checkpoint.together import ALL, Peers

FOLDER = "checkpoints"  # inside a run's folder
STALE = ".stale"  # set aside: a step that the resumed run has yet to reach


class CheckpointManager:
    """Writes to `run_dir`/checkpoints/step_N. Only one run may have a manager of it at a time.

    Each process of the run has one. The first alone renames and deletes; `save` needs all of them.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig, peers: Peers = ALL) -> None:
        self.directory = run_dir / FOLDER
        self.config = config
        self.peers = peers
        if peers.is_first:
            recover(self.directory)

    def is_milestone(self, tokens_before: int, tokens_seen: int) -> bool:
        """Does the step from `tokens_before` to `tokens_seen` reach a multiple of milestone_every_tokens?"""
        every = self.config.milestone_every_tokens
        return every is not None and tokens_before // every < tokens_seen // every

    def is_due(self, step: int, tokens_before: int, tokens_seen: int) -> bool:
        """Is a checkpoint to be written after update number `step`? (At the end of the run: always.)"""
        every = self.config.every_steps
        return (every > 0 and step % every == 0) or self.is_milestone(tokens_before, tokens_seen)

    def save(
        self,
        tensors: Mapping[str, Tensor],
        *,
        step: int,
        tokens_seen: int,
        milestone: bool,
        model: dict[str, Any],
        metadata: dict[str, Any],
    ) -> Path:
        """Writes the checkpoint of `step`, then deletes those that `keep` no longer covers.

        `tensors` under their logical names (see state.py), `model` the model's configuration, `metadata` any
        JSON that the training loop wants back; the first process's counts.

        Raises CheckpointWriteError where the disk refuses; earlier checkpoints are whole then.
        """
        folder = self.directory / f"step_{step}"
        try:
            write_checkpoint(
                folder,
                tensors,
                step=step,
                tokens_seen=tokens_seen,
                milestone=milestone,
                model=model,
                metadata=metadata,
                peers=self.peers,
            )
        except CheckpointWriteError as error:
            last = self.peers.on_first(lambda: latest(self.directory))
            kept = f"; the last one is whole: {last}" if last else "; there is no earlier one"
            raise CheckpointWriteError(error.errno, f"{error.strerror}{kept}") from error
        self.peers.on_first(self._remove_old)
        return folder

    def set_aside_newer(self, step: int) -> list[Path]:
        """Renames checkpoints newer than `step`, which a run resumed there would mix with its own; returns
        them. The first process waits for nobody, and the others have nothing to do."""
        stale: list[Path] = []
        if not self.peers.is_first:
            return stale
        for folder in steps(self.directory):
            if _step(folder) > step:
                names = (f"{folder.name}{STALE}{number or ''}" for number in count())
                target = next(folder.with_name(name) for name in names if not (folder.parent / name).exists())
                os.rename(folder, target)
                stale.append(target)
        return stale

    def _remove_old(self) -> None:
        if self.config.keep:
            for old in [old for old in steps(self.directory) if not _is_milestone(old)][: -self.config.keep]:
                remove_checkpoint(old)


def find_checkpoint(resume: str, run_dir: Path) -> Path | None:
    """The checkpoint that `checkpoint.resume` means; None for a fresh start.

    Raises CheckpointError where a path holds no checkpoint.
    """
    if resume == "none":
        return None
    if resume == "auto":
        return latest(run_dir / FOLDER)
    path = Path(resume)
    try:
        found = path if (path / MANIFEST_NAME).is_file() else latest(path / FOLDER) or latest(path)
    except OSError as error:
        raise CheckpointError(f"checkpoint.resume={resume}: can't be read: {error.strerror}") from None
    if found is None or found.name.endswith(PARTIAL):
        raise CheckpointError(
            f"checkpoint.resume={resume}: no checkpoint there; allowed: none, auto, "
            "the folder of a checkpoint (.../checkpoints/step_N) or of a run"
        )
    return found


def load_checkpoint(
    folder: Path, tensors: dict[str, Tensor], model: dict[str, Any], peers: Peers = ALL
) -> Manifest:
    """Verifies the checkpoint, then fills `tensors` in place (see `read_checkpoint`). Of several processes
    all call it together.

    Raises CheckpointError for a damaged checkpoint, naming the newest earlier one that is whole, and for one
    of another model; no tensor is touched then.
    """
    try:
        manifest = verify_checkpoint(folder, peers)
    except CheckpointError as error:
        earlier = newest_whole(folder.parent, folder, peers)
        advice = f"use checkpoint.resume={earlier}" if earlier else "there is no earlier whole one beside it"
        raise CheckpointError(f"{error}; {advice}") from None
    read_checkpoint(folder, manifest, tensors, model, peers)
    return manifest


def newest_whole(directory: Path, before: Path, peers: Peers = ALL) -> Path | None:
    """The newest checkpoint in `directory`, older than `before`, whose every file is as it was written."""
    for folder in reversed(peers.on_first(lambda: steps(directory))):
        if folder.name != before.name and (not _is_step(before) or _step(folder) < _step(before)):
            try:
                verify_checkpoint(folder, peers)
                return folder
            except CheckpointError:
                continue
    return None


def latest(directory: Path) -> Path | None:
    """The checkpoint with the largest step in a folder of checkpoints."""
    return next(reversed(steps(directory)), None)


def steps(directory: Path) -> list[Path]:
    """The checkpoints in a folder of checkpoints, oldest first."""
    return sorted((path for path in directory.glob("step_*") if _is_step(path)), key=_step)


def _is_step(folder: Path) -> bool:
    return folder.name.startswith("step_") and folder.name.removeprefix("step_").isdecimal()


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _is_milestone(folder: Path) -> bool:
    try:
        return read_manifest(folder).milestone
    except CheckpointError:
        return True  # damaged: not ours to delete, a person may want to look at it
