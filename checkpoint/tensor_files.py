"""Safetensors files read and written a part at a time: memory holds a part of a tensor, never a file.

A `TensorParts` is a tensor that is somewhere else: its parts follow each other along the first axis, and the
bytes of all parts in their order are its bytes.
"""

import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from openmoe.checkpoint.errors import CheckpointError, CheckpointWriteError
from openmoe.checkpoint.manifest import FileEntry

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
OTHER_DTYPES = {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8}
NAMES = {dtype: name for name, dtype in (DTYPES | OTHER_DTYPES).items()}
PART_BYTES = 2**26
_LONGEST_HEADER = 100_000_000  # of the format


@dataclass(frozen=True)
class TensorParts:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    parts: Callable[[], Iterator[Tensor]]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def to(self, dtype: torch.dtype) -> "TensorParts":
        return TensorParts(self.name, dtype, self.shape, lambda: (part.to(dtype) for part in self.parts()))


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # in bytes, from the beginning of the file

    def rows(self, first: int, stop: int) -> Tensor:
        """Elements first .. stop of the first axis.

        Raises CheckpointError where the file has become shorter.
        """
        row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        buffer = bytearray((stop - first) * row_bytes)
        with self.path.open("rb") as file:
            file.seek(self.start + first * row_bytes)
            read = file.readinto(buffer)
        if read != len(buffer):
            raise CheckpointError(f"{self.path}: ends within a tensor")
        if not buffer:
            return torch.empty(stop - first, *self.shape[1:], dtype=self.dtype)
        return torch.frombuffer(buffer, dtype=self.dtype).view(stop - first, *self.shape[1:])

    def whole(self) -> Tensor:
        return self.rows(0, self.shape[0] if self.shape else 1).view(self.shape)


def row_ranges(shape: Sequence[int], itemsize: int) -> Iterator[tuple[int, int]]:
    """The first axis in stretches of about PART_BYTES."""
    step = max(1, PART_BYTES // max(1, math.prod(shape[1:]) * itemsize))
    for first in range(0, shape[0], step):
        yield first, min(shape[0], first + step)


def read_header(path: Path) -> tuple[dict[str, str], dict[str, StoredTensor]]:
    """The metadata and the tensors of a safetensors file.

    Raises CheckpointError naming the file where it is missing, cut short, or no such file.
    """
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            text = file.read(min(length, _LONGEST_HEADER))
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from None
    try:
        header = json.loads(text)
        metadata = dict(header.pop("__metadata__", {}))
        tensors = {name: _stored(path, entry, 8 + length) for name, entry in header.items()}
        _require_all_of(file_bytes - 8 - length, [entry["data_offsets"] for entry in header.values()])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: damaged, or no safetensors file: {error}") from None
    return metadata, tensors


def file_bytes(metadata: Mapping[str, str], tensors: Sequence[TensorParts]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, the same each time: tensors in the order given, then metadata."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    start = 0
    for tensor in tensors:
        end = start + tensor.size_bytes
        header[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    yield len(text).to_bytes(8, "little") + text
    for tensor in tensors:
        written = 0
        for part in tensor.parts():
            if part.dtype != tensor.dtype:
                raise TypeError(f"{tensor.name}: a part of {part.dtype} in a tensor of {tensor.dtype}")
            written += part.nbytes
            if part.numel():
                yield part.contiguous().view(-1).view(torch.uint8).numpy().data
        if written != tensor.size_bytes:
            raise ValueError(f"{tensor.name}: parts of {written} bytes for {tensor.size_bytes}")


def write_file(path: Path, buffers: Iterable[bytes | memoryview]) -> FileEntry:
    """Writes a new file, synced to the disk; returns its size and digest."""
    digest, size_bytes = hashlib.sha256(), 0
    with path.open("xb") as file:
        for buffer in buffers:
            file.write(buffer)
            digest.update(buffer)
            size_bytes += len(buffer)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(size_bytes=size_bytes, sha256=digest.hexdigest())


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder that has its name only once all of it is written and synced; what fails leaves nothing.

    It is built under a name of its own, so that two writers of one target do not meet: the second to end is
    told that it exists. What a killed writer of it has left goes, on file systems that can lock a folder.
    Raises CheckpointError where `target` exists, CheckpointWriteError where the disk refuses.
    """
    _require_new(target)
    try:
        _remove_leftovers(target)
        with _held_folder(target) as partial:
            yield partial
            _sync_folder(partial)
            _require_new(target)
            partial.rename(target)
            _sync_folder(target.parent)
    except OSError as error:
        what = f"{target}: not written: {error.strerror or error}"
        raise CheckpointWriteError(error.errno, what) from error


@contextmanager
def _held_folder(target: Path) -> Iterator[Path]:
    """A folder to build `target` in, locked for as long as its writer lives; what fails removes it."""
    while True:
        partial = target.with_name(f"{target.name}.{secrets.token_hex(8)}.partial")
        partial.mkdir(parents=True)
        try:
            held = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another writer has taken it for a leftover
        with suppress(OSError):  # a file system without locks: nobody takes it for one then
            fcntl.flock(held, fcntl.LOCK_EX)
        if partial.exists():
            break
        os.close(held)
    try:
        yield partial
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(held)


def _remove_leftovers(target: Path) -> None:
    pattern = re.compile(re.escape(target.name) + r"\.[0-9a-f]{16}\.partial")
    found = target.parent.iterdir() if target.parent.is_dir() else []
    for folder in [folder for folder in found if pattern.fullmatch(folder.name)]:
        with suppress(OSError):  # its writer lives, or has just ended
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)
            finally:
                os.close(descriptor)


def _require_new(target: Path) -> None:
    if target.exists():
        raise CheckpointError(f"{target}: exists already; choose another")


def cut_into_files(tensors: Sequence[TensorParts], limit_bytes: int) -> list[list[TensorParts]]:
    """Consecutive tensors of at most `limit_bytes` together; one that is larger has a file of its own."""
    files: list[list[TensorParts]] = []
    room = 0
    for tensor in tensors:
        if not files or tensor.size_bytes > room:
            files.append([])
            room = limit_bytes
        files[-1].append(tensor)
        room -= tensor.size_bytes
    return files


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _require_all_of(data_bytes: int, ranges: Sequence[Sequence[int]]) -> None:
    """The tensors must follow each other without a gap up to the end of the file."""
    end = 0
    for start, stop in sorted((start, stop) for start, stop in ranges):
        if start != end:
            raise ValueError(f"bytes {min(start, end)} to {max(start, end)} belong to no tensor or to two")
        end = stop
    if end != data_bytes:
        raise ValueError(f"{end} bytes of tensors in {data_bytes}")


def _stored(path: Path, entry: Mapping[str, Any], data_start: int) -> StoredTensor:
    shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
    dtype = (DTYPES | OTHER_DTYPES)[entry["dtype"]]
    if any(type(number) is not int or number < 0 for number in (*shape, start, end)):
        raise ValueError("a negative size, or none")
    if end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{end - start} bytes for {entry['dtype']} {list(shape)}")
    return StoredTensor(path, dtype, shape, data_start + start)
