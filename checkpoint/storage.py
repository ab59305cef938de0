"""One checkpoint as a folder: written atomically, verified in full before anything is taken from it.

Tensors go through torch.distributed.checkpoint and its safetensors storage (the same documented classes in
torch 2.9 and 2.13), so that any layout of processes can write a part of each tensor and read another part.
`manifest.json` states the size and SHA-256 of every file. The folder is built under the name `NAME.partial`
and renamed once all of it is on disk.

In a run of several processes all of them call the functions that write, verify and read, and all get the same
error. A tensor of which a process holds a part is a DTensor then, or under XLA, where it may hold several, a
SpreadTensor; any other is the same on all of them.
"""

import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.tensor import DTensor

from openmoe.checkpoint.course import Course
from openmoe.checkpoint.errors import CheckpointError, CheckpointWriteError
from openmoe.checkpoint.files import FileEntry, fault_in_file, sync_folder, write_file
from openmoe.checkpoint.manifest import MANIFEST_NAME, Manifest, TensorEntry, read_manifest
from openmoe.checkpoint.pieces import fault_in
from openmoe.checkpoint.shards import SUFFIX, Part, ShardWriter, StoredPiece, pieces_in
from openmoe.checkpoint.together import ALL, Peers
from openmoe.parallel.spread_tensors import SpreadTensor

Result = TypeVar("Result")

PARTIAL = ".partial"  # not committed yet, or being deleted
REPLACED = ".replaced"  # older checkpoint of the same step, until the newer one has its name

# A file is verified by one process, so large models are cut into files of about this size.
FILE_BYTES = 2**30


def write_checkpoint(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    step: int,
    tokens_seen: int,
    milestone: bool,
    model: dict[str, Any],
    metadata: dict[str, Any],
    other_files: Mapping[str, bytes] = MappingProxyType({}),
    peers: Peers = ALL,
    take: Callable[[], Mapping[str, Part]] | None = None,
    before_commit: Callable[[], None] = lambda: None,
    course: Course | None = None,
) -> None:
    """Writes `tensors` and the rest as the checkpoint `folder`, in place of one that is there already.

    A crash at any moment leaves the old state or the new one (`recover` puts away what else is left). Of
    several processes the first one's `metadata` and `other_files` (by name) are written; each writes some of
    what several hold.

    `take` gives what this process holds of each tensor where that is not to be taken from `tensors`
    themselves, which may change meanwhile. `before_commit` is called on the first process before the
    checkpoint gets its name. `course` is kept up to date.

    Raises CheckpointWriteError where the disk refuses, after removing what was written.
    """
    building = folder.with_name(folder.name + PARTIAL)
    course = course or Course()
    parts: dict[str, Part] = {}
    try:
        _on_every(
            peers, course, "copying tensors", lambda: parts.update(take() if take else _parts_here(tensors))
        )
        _on_first(peers, course, f"making {building.name}", lambda: _make_empty(building))
        files = _write_tensors(building, tensors, parts, peers, course)

        def finish() -> None:
            others = {
                name: write_file(building / name, [content], course) for name, content in other_files.items()
            }
            manifest = Manifest(
                format="openmoe-checkpoint",
                version=1,
                step=step,
                tokens_seen=tokens_seen,
                milestone=milestone,
                model=model,
                metadata=metadata,
                files=files | others,
                tensors={name: TensorEntry.of(tensor) for name, tensor in tensors.items()},
            )
            write_file(building / MANIFEST_NAME, [manifest.text().encode()], course)
            sync_folder(building)
            before_commit()
            course.go_on(f"renaming {building.name}")
            _commit(building, folder)

        _on_first(peers, course, f"finishing {building.name}", finish)
    except OSError as error:
        _give_up(building, peers)
        raise CheckpointWriteError(
            error.errno, f"{folder}: not written: {error.strerror or error}"
        ) from error
    except BaseException:
        _give_up(building, peers)
        raise


def verify_checkpoint(folder: Path, peers: Peers = ALL) -> Manifest:
    """Reads every file of the checkpoint and compares it with the manifest.

    Raises CheckpointError naming the first file that is missing, too many, or not as it was written.
    """
    manifest = peers.on_first(lambda: _complete(folder))
    names = sorted(manifest.files)
    faults = peers.on_every(lambda: _first_fault(folder, manifest, peers.dealt(names)))
    fault = min((fault for fault in faults if fault), default=None)
    if fault:
        name, says = fault
        raise CheckpointError(f"{folder / name}: {says}")
    return manifest


def read_checkpoint(
    folder: Path,
    manifest: Manifest,
    tensors: dict[str, Tensor],
    model: dict[str, Any],
    peers: Peers = ALL,
) -> None:
    """Fills `tensors` in place from a verified checkpoint; `model` is the configuration of the model here.

    `tensors` may leave out whole kinds (the part of a name before the first slash), so that evaluation
    reads "model" alone; within a kind names, shapes and types must be those of the checkpoint. How many
    processes wrote it, and which part of a tensor each of them, does not matter.

    Raises CheckpointError for a checkpoint of another model, and for one that does not hold each element of
    each tensor exactly once; no tensor is touched then.
    """

    def compare() -> None:
        _compare_models(folder, manifest.model, model)
        _compare_tensors(folder, manifest.tensors, tensors)

    peers.on_every(compare)
    peers.on_first(lambda: _check_pieces(folder, manifest))
    with _quiet(), _own_errors():
        dcp.load(
            tensors,
            storage_reader=dcp.HuggingFaceStorageReader(str(folder)),
            planner=_LoadPlanner(),
            process_group=peers.group,
            no_dist=not peers.are_several,
        )


def recover(directory: Path) -> None:
    """Puts away what a crash left in the folder of checkpoints. Only the process that writes there may call
    this."""
    for old in directory.glob("step_*" + REPLACED):
        name = old.with_name(old.name.removesuffix(REPLACED))
        if name.exists():
            remove_checkpoint(old)
        else:
            os.rename(old, name)
    for partial in directory.glob("step_*" + PARTIAL):
        shutil.rmtree(partial)


def remove_checkpoint(folder: Path) -> None:
    """Deletes a checkpoint; a crash in between leaves a leftover for `recover`, not half a checkpoint."""
    partial = folder.with_name(folder.name + PARTIAL)
    os.rename(folder, partial)
    shutil.rmtree(partial)


def _commit(partial: Path, folder: Path) -> None:
    replaced = folder.with_name(folder.name + REPLACED)
    if folder.exists():
        os.rename(folder, replaced)
    try:
        os.rename(partial, folder)
    except OSError:
        if replaced.exists():
            os.rename(replaced, folder)
        raise
    sync_folder(folder.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _give_up(partial: Path, peers: Peers) -> None:
    """All processes have failed together, so none is writing any more."""
    if peers.is_first:
        shutil.rmtree(partial, ignore_errors=True)


def _write_tensors(
    folder: Path,
    tensors: Mapping[str, Tensor],
    parts: Mapping[str, Part],
    peers: Peers,
    course: Course,
) -> dict[str, FileEntry]:
    """Writes them together with the other processes; size and digest of all files."""
    # The first process decides for all. It holds the largest parts, so nobody's files are larger than that.
    file_of, size = {}, 0
    for name, tensor in tensors.items():
        size += tensor.bytes_here if isinstance(tensor, SpreadTensor) else part_here(tensor).nbytes
        file_of[name] = 1 + size // FILE_BYTES
    index = {number: i for i, number in enumerate(sorted(set(file_of.values())), start=1)}
    writer = ShardWriter(folder, {name: index[number] for name, number in file_of.items()}, parts, course)
    course.at("waiting for another rank: who writes what")
    with _quiet(), _own_errors():
        # torch takes shapes and places from `tensors`, and the writer the values from `parts`.
        dcp.save(
            dict(tensors), storage_writer=writer, process_group=peers.group, no_dist=not peers.are_several
        )
    entries = _on_every(peers, course, "digests", writer.entries)
    return {name: entry for part in entries for name, entry in part.items()}


def _on_first(peers: Peers, course: Course, what: str, work: Callable[[], None]) -> None:
    course.at(what if peers.is_first else f"waiting for rank 0: {what}")
    peers.on_first(work)


def _on_every(peers: Peers, course: Course, what: str, work: Callable[[], Result]) -> list[Result]:
    def then_wait() -> Result:
        course.at(what)
        result = work()
        course.at(f"waiting for another rank: {what}")
        return result

    return peers.on_every(then_wait)


def _parts_here(tensors: Mapping[str, Tensor]) -> dict[str, Part]:
    return {
        name: tensor.written_here() if isinstance(tensor, SpreadTensor) else part_here(tensor)
        for name, tensor in tensors.items()
    }


def part_here(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class _LoadPlanner(dcp.DefaultLoadPlanner):
    """Hands a tensor of many devices over to them as soon as all of it is read."""

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        whole = self.state_dict[read_item.dest_index.fqn]
        if isinstance(whole, SpreadTensor):
            whole.filled(tensor.numel())


def _check_pieces(folder: Path, manifest: Manifest) -> None:
    """Raises CheckpointError naming the first file that is not as it should be, or the first tensor of which
    the files hold too little or too much, or another type."""
    stored: dict[str, list[StoredPiece]] = {}
    for file in sorted(name for name in manifest.files if name.endswith(SUFFIX)):
        for name, piece in pieces_in(folder / file).items():
            stored.setdefault(name, []).append(piece)
    for name in sorted(stored.keys() | manifest.tensors.keys()):
        pieces = stored.get(name, [])
        if name not in manifest.tensors:
            raise CheckpointError(
                f"{folder / pieces[0].file}: tensor {name} is there and not in {MANIFEST_NAME}"
            )
        stated = manifest.tensors[name]
        for piece in pieces:
            if piece.dtype != stated.dtype:
                raise CheckpointError(
                    f"{folder / piece.file}: tensor {name} is {piece.dtype} there and {stated.dtype} in "
                    f"{MANIFEST_NAME}"
                )
        fault = fault_in(stated.shape, [piece.piece for piece in pieces])
        if fault:
            files = ", ".join(sorted({piece.file for piece in pieces})) or "no file"
            raise CheckpointError(f"{folder}: tensor {name} is not stored exactly once: {fault} (in {files})")


@contextmanager
def _own_errors() -> Iterator[None]:
    """What went wrong on the first process that failed, in place of torch's BaseException that hides it."""
    try:
        yield
    except dcp.api.CheckpointException as error:
        raise next(iter(error.failures.values()))[0] from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences what torch says about one process alone, and torch 2.9 about its own use of TypedStorage."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)
        yield


def _complete(folder: Path) -> Manifest:
    """The manifest of a folder that has all its files and no other."""
    manifest = read_manifest(folder)
    named = folder.name.removeprefix("step_")
    if folder.name != named and named.isdecimal() and int(named) != manifest.step:
        raise CheckpointError(f"{folder / MANIFEST_NAME}: is of step {manifest.step}, not of {folder.name}")
    try:
        found = {path.name for path in folder.iterdir()} - {MANIFEST_NAME}
    except OSError as error:
        raise CheckpointError(f"{folder}: can't be read: {error.strerror}") from None
    for name in sorted(found ^ manifest.files.keys()):
        fault = "is not part of the checkpoint" if name in found else "is missing"
        raise CheckpointError(f"{folder / name}: {fault}")
    return manifest


def _first_fault(folder: Path, manifest: Manifest, names: Iterable[str]) -> tuple[str, str] | None:
    """The first of these files that is not as it was written, and what is wrong with it."""
    for name in names:
        fault = fault_in_file(folder / name, manifest.files[name])
        if fault:
            return name, fault
    return None


def _compare_models(folder: Path, stored: dict[str, Any], here: dict[str, Any]) -> None:
    for key in sorted(stored.keys() | here.keys()):
        theirs, ours = stored.get(key, "absent"), here.get(key, "absent")
        if theirs != ours:
            raise CheckpointError(_another_model(folder, f"model.{key}", theirs, ours))


def _compare_tensors(folder: Path, stored: dict[str, TensorEntry], here: Mapping[str, Tensor]) -> None:
    kinds = {name.split("/")[0] for name in here}
    wanted = {name: TensorEntry.of(tensor) for name, tensor in here.items()}
    of_kinds = {name: entry for name, entry in stored.items() if name.split("/")[0] in kinds}
    for name in sorted(of_kinds.keys() | wanted.keys()):
        theirs, ours = of_kinds.get(name, "absent"), wanted.get(name, "absent")
        if theirs != ours:
            raise CheckpointError(_another_model(folder, f"tensor {name}", theirs, ours))


def _another_model(folder: Path, what: str, theirs: object, ours: object) -> str:
    return f"{folder}: checkpoint of another run: {what} is {theirs} in the checkpoint, {ours} here"
