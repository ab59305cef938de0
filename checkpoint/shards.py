"""The safetensors files of a checkpoint: each holds parts of tensors, and says where in them they lie.

The same content gives the same bytes, which the safetensors library doesn't promise: it writes the entries of
`__metadata__` in an order that is new in each process. It also needs a file twice in memory, while all other
threads wait; here a file is written from the tensors' own memory.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from openmoe.checkpoint.course import Course
from openmoe.checkpoint.errors import CheckpointError
from openmoe.checkpoint.files import FileEntry, require_plain, write_file
from openmoe.checkpoint.pieces import Piece

SUFFIX = ".safetensors"
# Names of the format, in the order in which its library lays tensors out, the widest first.
DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = {dtype: place for place, dtype in enumerate(DTYPES.values())}
_METADATA, _SHARDING = "__metadata__", "DCP_SHARDING_INFO"  # as torch.distributed.checkpoint reads them
_OFFSETS = "saved_offsets"
_LONGEST_HEADER = 100_000_000  # of the format

# What a process writes of a tensor: all it holds, or boxes by their offsets.
Part = Tensor | Mapping[tuple[int, ...], Tensor]


@dataclass(frozen=True)
class StoredPiece:
    """A part of a tensor in a file."""

    file: str
    dtype: str  # as torch names it
    piece: Piece


class ShardWriter(dcp.HuggingFaceStorageWriter):
    """Writes this process's share of a save into files of its own."""

    def __init__(
        self, folder: Path, files: Mapping[str, int], parts: Mapping[str, Part], course: Course
    ) -> None:
        """`files` says by the name of a tensor in which of a process's files its part goes (from 1);
        `parts` is what this process holds of each: what torch plans from need not be what is written."""
        super().__init__(str(folder), dict(files), save_distributed=True)
        self._folder = folder
        self._parts = parts
        self._course = course
        self._entries: dict[str, FileEntry] = {}
        self._error: Exception | None = None

    def entries(self) -> dict[str, FileEntry]:
        """The files that are written. Raises what went wrong, which torch can't always tell the others."""
        if self._error is not None:
            raise self._error
        return self._entries

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results: list[WriteResult] = []
        try:
            if plan.items:
                results = self._write(plan)
        except Exception as error:
            self._error = error
        self._course.at("waiting for another rank: writing files")
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def _write(self, plan: SavePlan) -> list[WriteResult]:
        number_of, shard = plan.storage_data["fqn_to_index_mapping"], plan.storage_data["shard_index"]
        last = max(number_of.values())
        files: dict[int, dict[str, WriteItem]] = {}
        for item in plan.items:
            number = number_of[item.index.fqn]
            while item.index.fqn in files.setdefault(number, {}):  # a file has one part of a tensor
                number += last
            files[number][item.index.fqn] = item
        results = []
        for number, of_file in files.items():
            name = f"shard-{shard:05d}-model-{number:05d}-of-{last:05d}{SUFFIX}"
            offsets = {tensor: _chunk_offsets(item) for tensor, item in of_file.items()}
            parts = {tensor: self._part(tensor, offsets[tensor]) for tensor in offsets}
            self._entries[name] = write_file(self._folder / name, encode(parts, offsets), self._course)
            results += [
                WriteResult(item.index, parts[tensor].nbytes, name) for tensor, item in of_file.items()
            ]
        return results

    def _part(self, tensor: str, offsets: Sequence[int]) -> Tensor:
        found = self._parts[tensor]
        return found if isinstance(found, Tensor) else found[tuple(offsets)]


def encode(parts: Mapping[str, Tensor], offsets: Mapping[str, list[int]]) -> Iterator[memoryview | bytes]:
    """The bytes of a file with these parts of tensors, each of which begins at `offsets` in its tensor."""
    names = sorted(parts, key=lambda name: (_ORDER[parts[name].dtype], name))
    metadata = {
        _SHARDING: json.dumps({name: {_OFFSETS: offsets[name]} for name in parts}),
        "DCP_VERSION": "1.0",
        "format": "pt",
    }
    header: dict[str, Any] = {_METADATA: metadata}
    start = 0
    for name in names:
        part, end = parts[name], start + parts[name].nbytes
        shape = list(part.shape)
        header[name] = {"dtype": _NAMES[part.dtype], "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data begin at a multiple of 8
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        if parts[name].numel():
            yield _bytes_of(parts[name])


def pieces_in(path: Path) -> dict[str, StoredPiece]:
    """What a file holds of which tensors, from its header.

    Raises CheckpointError where it is no file that `encode` could have written.
    """
    try:
        file_bytes = require_plain(path)
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            text = file.read(min(header_bytes, _LONGEST_HEADER))
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from None
    try:
        header = json.loads(text, object_pairs_hook=_without_repetition)
        sharding = json.loads(header.pop(_METADATA)[_SHARDING], object_pairs_hook=_without_repetition)
        found = {name: _piece(path.name, entry, sharding[name]) for name, entry in header.items()}
        _require_all_of(file_bytes - 8 - header_bytes, header.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged: its header can't be right: {error}") from None
    return found


def _chunk_offsets(item: WriteItem) -> list[int]:
    assert item.tensor_data is not None, "a checkpoint has tensors only"
    return list(item.tensor_data.chunk.offsets)


def _bytes_of(part: Tensor) -> memoryview:
    on_host = part.detach().cpu().contiguous()
    return on_host.view(-1).view(torch.uint8).numpy().data


def _piece(file: str, entry: Mapping[str, Any], place: Mapping[str, Any]) -> StoredPiece:
    shape, offsets = entry["shape"], place[_OFFSETS]
    start, end = entry["data_offsets"]
    dtype = DTYPES[entry["dtype"]]
    for number in (*shape, *offsets, start, end):
        if type(number) is not int or number < 0:
            raise ValueError(f"{number!r} is no size")
    if len(shape) != len(offsets) or end - start != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{end - start} bytes for {entry['dtype']} {shape} at {offsets}")
    return StoredPiece(file, str(dtype).removeprefix("torch."), Piece(offsets, shape))


def _require_all_of(data_bytes: int, entries: Iterable[Mapping[str, Any]]) -> None:
    """The tensors must follow each other without a gap up to the end of the file."""
    end = 0
    for start, stop in sorted(entry["data_offsets"] for entry in entries):
        if start != end:
            raise ValueError(f"bytes {min(start, end)} to {max(start, end)} belong to no tensor or to two")
        end = stop
    if end != data_bytes:
        raise ValueError(f"{end} bytes of tensors in {data_bytes}")


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name stands there twice")
    return found
