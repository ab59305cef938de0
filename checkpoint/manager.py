"""The checkpoints of one run: when to write one, which to keep, where to go on."""

import copy
import os
from collections.abc import Callable, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch.distributed as dist
from torch import Tensor

from openmoe.checkpoint.background import Background
from openmoe.checkpoint.config import CheckpointConfig
from openmoe.checkpoint.course import Course
from openmoe.checkpoint.errors import CheckpointError, CheckpointWriteError
from openmoe.checkpoint.host_copies import HostCopies
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
from openmoe.parallel.time_limit import TimeLimit
from openmoe.parallel.watchdog import is_lost_contact

FOLDER = "checkpoints"  # inside a run's folder
STALE = ".stale"  # set aside: a step that the resumed run has yet to reach
_BREAK_OFF_SECONDS = 2.0  # for a save that is not to go on; what it leaves is put away by the next start


class CheckpointManager:
    """Writes to `run_dir`/checkpoints/step_N. Only one run may have a manager of it at a time.

    Each process of the run has one. The first alone renames and deletes; `save` and `finish` need all of
    them. With `config.asynchronous` a save goes on in a thread after `save` has returned, and:

    - `wait_to_update` is to be called before anything changes the tensors again,
    - once `has_failed`, on any process, all are to call `finish`, which raises what went wrong,
    - `finish` or `leave` is to be called in the end.
    """

    def __init__(
        self,
        run_dir: Path,
        config: CheckpointConfig,
        peers: Peers = ALL,
        log_fd: Callable[[], int | None] = lambda: None,
    ) -> None:
        """`log_fd` gives an open file for the last words of a process whose save takes too long."""
        self.directory = run_dir / FOLDER
        self.config = config
        self.peers = peers
        self._log_fd = log_fd
        self._copies = HostCopies()
        self._course = Course()
        self._saving: Background | None = None
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
        other_files: Mapping[str, bytes] = MappingProxyType({}),
        before_commit: Callable[[], None] = lambda: None,
    ) -> Path:
        """Writes the checkpoint of `step`, then deletes those that `keep` no longer covers.

        `tensors` under their logical names (see state.py), `model` the model's configuration, `metadata` any
        JSON that the training loop wants back, `other_files` files to lie beside the tensors; the first
        process's count. `before_commit` is called there before the checkpoint gets its name. Waits for an
        earlier save that is not finished yet.

        Raises CheckpointWriteError where the disk refuses, here or in `finish`; earlier checkpoints are whole
        then.
        """
        self.finish()
        folder = self.directory / f"step_{step}"
        course = self._course = Course()
        write = partial(
            self._write,
            folder,
            tensors,
            step=step,
            tokens_seen=tokens_seen,
            milestone=milestone,
            model=model,
            metadata=copy.deepcopy(metadata),  # of what goes on to count
            other_files=other_files,
            before_commit=before_commit,
            course=course,
        )
        if self.config.asynchronous:
            self._copies.begin(tensors)
            self._saving = Background(partial(write, take=self._copies.take), name=f"save of {folder.name}")
        else:
            write()
        return folder

    @property
    def has_failed(self) -> bool:
        """Has the save in the background gone wrong, as far as this process knows? For a moment only some
        do."""
        return self._saving is not None and self._saving.has_failed

    @property
    def is_saving(self) -> bool:
        return self._saving is not None and not self._saving.ends_within(0)

    def wait_to_update(self) -> None:
        """Returns when nothing is read any more of the tensors of the last `save`."""
        self._copies.wait()

    def finish(self) -> None:
        """Waits for the save in the background, if there is one, and raises what went wrong in it."""
        if self._saving is not None:
            self._saving.ends_within(None)  # Ctrl-C leaves it to `leave`
            saving, self._saving = self._saving, None
            saving.wait()

    def leave(self, error: BaseException) -> None:
        """The run ends with `error`. A save that all processes are still there for is finished, another one
        is broken off; what goes wrong in it is no news then."""
        saving, self._saving = self._saving, None
        if saving is not None:
            if isinstance(error, Exception) and not is_lost_contact(error):
                saving.ends_within(None)
            else:
                self._course.cancel()
                saving.ends_within(_BREAK_OFF_SECONDS)

    def _write(
        self, folder: Path, tensors: Mapping[str, Tensor], *, step: int, course: Course, **rest: Any
    ) -> None:
        def too_long() -> str:
            who = f"rank {dist.get_rank()}: " if self.peers.are_several else ""
            limit = f"{self.config.save_timeout_seconds:g} s (checkpoint.save_timeout_seconds)"
            return f"{who}the save of step {step} is not done after {limit}: {course.place}"

        try:
            with TimeLimit(self.config.save_timeout_seconds, too_long, self._log_fd):
                try:
                    write_checkpoint(folder, tensors, step=step, peers=self.peers, course=course, **rest)
                except CheckpointWriteError as error:
                    last = self.peers.on_first(lambda: latest(self.directory))
                    kept = f"; the last one is whole: {last}" if last else "; there is no earlier one"
                    raise CheckpointWriteError(error.errno, f"{error.strerror}{kept}") from error
                course.at("deleting old checkpoints")
                self.peers.on_first(self._remove_old)
        finally:
            self._copies.release()  # also where it has not come to the copying

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
    return checkpoint_at("checkpoint.resume", resume, other_values="none, auto, ")


def checkpoint_at(key: str, path: str, other_values: str = "") -> Path:
    """The checkpoint that `path`, the value of `key`, names: its folder, or a run's, whose newest is meant.

    Raises CheckpointError where there is none, naming also what else the key may be.
    """
    folder = Path(path)
    try:
        found = folder if (folder / MANIFEST_NAME).is_file() else latest(folder / FOLDER) or latest(folder)
    except OSError as error:
        raise CheckpointError(f"{key}={path}: can't be read: {error.strerror}") from None
    if found is None or found.name.endswith(PARTIAL):
        raise CheckpointError(
            f"{key}={path}: no checkpoint there; allowed: {other_values}"
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
    """The checkpoints in a folder of checkpoints, oldest first; none where there is no such folder.

    Raises CheckpointError where the folder can't be read: a run that took it for empty would start afresh.
    """
    try:
        names = os.listdir(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"{directory}: can't be read: {error.strerror}") from None
    return sorted((directory / name for name in names if _is_step(directory / name)), key=_step)


def _is_step(folder: Path) -> bool:
    number = folder.name.removeprefix("step_")
    return number.isascii() and number.isdecimal() and folder.name == f"step_{int(number)}"


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step_"))


def _is_milestone(folder: Path) -> bool:
    try:
        return read_manifest(folder).milestone
    except CheckpointError:
        return True  # damaged: not ours to delete, a person may want to look at it
