"""One checkpoint as a folder: written atomically, verified in full before anything is taken from it.

Tensors go through torch.distributed.checkpoint and its safetensors storage (the same documented classes in
torch 2.9 and 2.13), so that any layout of processes can write a part of each tensor and read another part.
`manifest.json` states the size and SHA-256 of every file. The folder is built under the name `NAME.partial`
and renamed once all of it is on disk.

In a run of several processes all of them call the functions that write, verify and read, and all get the same
error. A tensor of which a process holds a part is a DTensor then; any other is the same on all of them.
"""

import hashlib
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.tensor import DTensor

from openmoe.checkpoint.errors import CheckpointError, CheckpointWriteError
from openmoe.checkpoint.manifest import MANIFEST_NAME, FileEntry, Manifest, TensorEntry, read_manifest
from openmoe.checkpoint.pieces import Piece, fault_in
from openmoe.checkpoint.together import ALL, Peers

PARTIAL = ".partial"  # not committed yet, or being deleted
REPLACED = ".replaced"  # older checkpoint of the same step, until the newer one has its name

# A file is serialised in memory before it is written, so large models are cut into files of about this size.
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
    peers: Peers = ALL,
) -> None:
    """Writes `tensors` and the rest as the checkpoint `folder`, in place of one that is there already.

    A crash at any moment leaves the old state or the new one (`recover` puts away what else is left). Of
    several processes the first one's `metadata` is written; each writes some of what several hold.

    Raises CheckpointWriteError where the disk refuses, after removing what was written.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    try:
        peers.on_first(lambda: _make_empty(partial))
        _write_tensors(partial, tensors, peers)
        files = _file_entries(partial, peers)

        def finish() -> None:
            manifest = Manifest(
                format="openmoe-checkpoint",
                version=1,
                step=step,
                tokens_seen=tokens_seen,
                milestone=milestone,
                model=model,
                metadata=metadata,
                files=files,
                tensors={name: TensorEntry.of(tensor) for name, tensor in tensors.items()},
            )
            _write_manifest(partial, manifest)
            _commit(partial, folder)

        peers.on_first(finish)
    except OSError as error:
        _give_up(partial, peers)
        raise CheckpointWriteError(
            error.errno, f"{folder}: not written: {error.strerror or error}"
        ) from error
    except BaseException:
        _give_up(partial, peers)
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
        raise CheckpointError(f"{folder / name}: damaged: {says}")
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
    peers.on_first(lambda: _check_pieces(folder, manifest.tensors))
    with _quiet(), _own_errors():
        dcp.load(
            tensors,
            storage_reader=dcp.HuggingFaceStorageReader(str(folder)),
            process_group=peers.group,
            no_dist=not peers.are_several,
        )


def recover(directory: Path) -> None:
    """Puts away what a crash left in the folder of checkpoints. Only the process that writes there may call
    this."""
    for old in directory.glob("*" + REPLACED):
        name = old.with_name(old.name.removesuffix(REPLACED))
        if name.exists():
            remove_checkpoint(old)
        else:
            os.rename(old, name)
    for partial in directory.glob("*" + PARTIAL):
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
    os.rename(partial, folder)
    _sync_folder(folder.parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _give_up(partial: Path, peers: Peers) -> None:
    """All processes have failed together, so none is writing any more."""
    if peers.is_first:
        shutil.rmtree(partial, ignore_errors=True)


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor], peers: Peers) -> None:
    # The first process decides for all. Its parts are the largest, so nobody's files are larger than its own.
    file_of, size = {}, 0
    for name, tensor in tensors.items():
        size += _part_here(tensor).nbytes
        file_of[name] = 1 + size // FILE_BYTES
    index = {number: i for i, number in enumerate(sorted(set(file_of.values())), start=1)}
    writer = dcp.HuggingFaceStorageWriter(
        str(folder),
        fqn_to_index_mapping={name: index[number] for name, number in file_of.items()},
        save_distributed=True,  # each process writes its part; no second file lists the tensors
    )
    contiguous = {name: _contiguous(tensor) for name, tensor in tensors.items()}
    with _quiet(), _own_errors():
        dcp.save(contiguous, storage_writer=writer, process_group=peers.group, no_dist=not peers.are_several)


def _part_here(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _contiguous(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, DTensor):
        return tensor.contiguous()
    return DTensor.from_local(
        tensor.to_local().contiguous(),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def _check_pieces(folder: Path, stated: Mapping[str, TensorEntry]) -> None:
    """Raises CheckpointError naming the first tensor of which the files hold too little or too much."""
    with _quiet():
        found = dcp.HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    for name in sorted(found.keys() | stated.keys()):
        if name not in stated:
            raise CheckpointError(f"{folder}: tensor {name} is in the files and not in the manifest")
        pieces = [Piece(chunk.offsets, chunk.sizes) for chunk in getattr(found.get(name), "chunks", ())]
        fault = fault_in(stated[name].shape, pieces)
        if fault:
            raise CheckpointError(f"{folder}: tensor {name} is not stored exactly once: {fault}")


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


def _file_entry(path: Path) -> FileEntry:
    with path.open("rb") as file:
        return FileEntry(
            size_bytes=os.fstat(file.fileno()).st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest()
        )


def _file_entries(folder: Path, peers: Peers) -> dict[str, FileEntry]:
    """Size and digest of all files, each of them read by one process."""
    names = peers.on_first(lambda: sorted(path.name for path in folder.iterdir()))
    parts = peers.on_every(lambda: {name: _file_entry(folder / name) for name in peers.dealt(names)})
    return {name: entry for part in parts for name, entry in part.items()}


def _complete(folder: Path) -> Manifest:
    """The manifest of a folder that has all its files and no other."""
    manifest = read_manifest(folder)
    found = {path.name for path in folder.iterdir()} - {MANIFEST_NAME}
    for name in sorted(found ^ manifest.files.keys()):
        fault = "is not part of the checkpoint" if name in found else "is missing"
        raise CheckpointError(f"{folder / name}: {fault}")
    return manifest


def _first_fault(folder: Path, manifest: Manifest, names: Iterable[str]) -> tuple[str, str] | None:
    """The first of these files that is not as it was written, and what is wrong with it."""
    for name in names:
        stated, size_bytes = manifest.files[name], (folder / name).stat().st_size
        if size_bytes != stated.size_bytes:
            return name, f"{size_bytes} bytes, the manifest states {stated.size_bytes}"
        if _file_entry(folder / name) != stated:
            return name, "its SHA-256 differs from the manifest's"
    return None


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    with (folder / MANIFEST_NAME).open("w", encoding="utf-8") as file:
        file.write(manifest.text())
        file.flush()
        os.fsync(file.fileno())
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
