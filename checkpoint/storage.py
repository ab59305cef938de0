"""One checkpoint as a folder: written atomically, verified in full before anything is taken from it.

Tensors go through torch.distributed.checkpoint and its safetensors storage (the same documented classes in
torch 2.9 and 2.13), so that any layout of processes can write a part of each tensor and read another part.
`manifest.json` states the size and SHA-256 of every file. The folder is built under the name `NAME.partial`
and renamed once all of it is on disk.
"""

import hashlib
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor

from openmoe.checkpoint.errors import CheckpointError, CheckpointWriteError
from openmoe.checkpoint.manifest import MANIFEST_NAME, FileEntry, Manifest, TensorEntry, read_manifest

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
) -> None:
    """Writes `tensors` and the rest as the checkpoint `folder`, in place of one that is there already.

    A crash at any moment leaves the old state or the new one (`recover` puts away what else is left).

    Raises CheckpointWriteError where the disk refuses, after removing what was written.
    """
    partial = folder.with_name(folder.name + PARTIAL)
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_tensors(partial, tensors)
        manifest = Manifest(
            format="openmoe-checkpoint",
            version=1,
            step=step,
            tokens_seen=tokens_seen,
            milestone=milestone,
            model=model,
            metadata=metadata,
            files={path.name: _file_entry(path) for path in sorted(partial.iterdir())},
            tensors={name: TensorEntry.of(tensor) for name, tensor in tensors.items()},
        )
        with (partial / MANIFEST_NAME).open("w", encoding="utf-8") as file:
            file.write(manifest.text())
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(partial)
        _commit(partial, folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointWriteError(
            error.errno, f"{folder}: not written: {error.strerror or error}"
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def verify_checkpoint(folder: Path) -> Manifest:
    """Reads every file of the checkpoint and compares it with the manifest.

    Raises CheckpointError naming the first file that is missing, too many, or not as it was written.
    """
    manifest = read_manifest(folder)
    found = {path.name for path in folder.iterdir()} - {MANIFEST_NAME}
    for name in sorted(found ^ manifest.files.keys()):
        fault = "is not part of the checkpoint" if name in found else "is missing"
        raise CheckpointError(f"{folder / name}: {fault}")
    for name, stated in sorted(manifest.files.items()):
        size_bytes = (folder / name).stat().st_size
        if size_bytes != stated.size_bytes:
            raise CheckpointError(
                f"{folder / name}: damaged: {size_bytes} bytes, the manifest states {stated.size_bytes}"
            )
        if _file_entry(folder / name) != stated:
            raise CheckpointError(f"{folder / name}: damaged: its SHA-256 differs from the manifest's")
    return manifest


def read_checkpoint(
    folder: Path, manifest: Manifest, tensors: dict[str, Tensor], model: dict[str, Any]
) -> None:
    """Fills `tensors` in place from a verified checkpoint; `model` is the configuration of the model here.

    `tensors` may leave out whole kinds (the part of a name before the first slash), so that evaluation
    reads "model" alone; within a kind names, shapes and types must be those of the checkpoint.

    Raises CheckpointError for a checkpoint of another model; no tensor is touched then.
    """
    _compare_models(folder, manifest.model, model)
    _compare_tensors(folder, manifest.tensors, tensors)
    with _quiet():
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)


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


def _write_tensors(folder: Path, tensors: Mapping[str, Tensor]) -> None:
    file_of, size = {}, 0
    for name, tensor in tensors.items():
        size += tensor.nbytes
        file_of[name] = 1 + size // FILE_BYTES
    index = {number: i for i, number in enumerate(sorted(set(file_of.values())), start=1)}
    writer = dcp.HuggingFaceStorageWriter(
        str(folder),
        fqn_to_index_mapping={name: index[number] for name, number in file_of.items()},
        save_distributed=True,  # each process writes its part; no second file lists the tensors
    )
    try:
        with _quiet():
            dcp.save({k: v.contiguous() for k, v in tensors.items()}, storage_writer=writer, no_dist=True)
    except dcp.api.CheckpointException as error:  # a BaseException that hides the cause
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
