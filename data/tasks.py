"""The work of preparation in pieces: each task reads some ranges of raw files and writes one shard.

Each shard of a streamed dataset is a task: nobody knows its size, and the hub's are some 100 MB.

How it is cut depends on the files and on `shard_bytes` alone, so the result is the same for any number of
workers, whatever was finished before an interruption.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from openmoe.data.raw import RawFile
from openmoe.data.readers import FileRange, countable_units
from openmoe.data.shards import Split

# Part of every task's identity: raise it when a shard's content changes for the same input.
_FORMAT = 3


@dataclass(frozen=True)
class Piece:
    """A range of one file. `source.stop` None: to its end."""

    source: FileRange
    split: Split | None
    # Of the file's content.
    sha256: str
    # How much of the work it is: bytes of the file, for shards of a dataset one each.
    weight: float


@dataclass(frozen=True)
class Task:
    """One shard to write."""

    source: str
    part: int
    number: int
    pieces: tuple[Piece, ...]

    @property
    def weight(self) -> float:
        return sum(piece.weight for piece in self.pieces)

    @property
    def name(self) -> str:
        return f"{self.source}/{self.part}/{self.number}"

    def raw(self) -> list[list[str | int | None]]:
        """What it reads: name, start and stop of each range."""
        return [[piece.source.name, piece.source.start, piece.source.stop] for piece in self.pieces]

    def identity(self, *settings: object) -> str:
        """Changes with anything that its shard depends on."""
        contents = [[piece.split, piece.sha256] for piece in self.pieces]
        what = [_FORMAT, self.source, self.part, self.number, self.raw(), contents, *settings]
        return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def cut_tasks(
    source: str, part: int, files: Iterable[RawFile], hashes: Mapping[str, str], shard_bytes: int
) -> list[Task]:
    """The tasks of one part: files above `shard_bytes` cut where they can be, small ones grouped."""
    groups: list[list[Piece]] = []
    room = 0.0
    for file in files:
        for piece in _cut(file, hashes[file.name], shard_bytes):
            if not groups or piece.weight > room or file.dataset is not None:
                groups.append([])
                room = shard_bytes
            groups[-1].append(piece)
            room -= piece.weight
    return [Task(source, part, number, tuple(pieces)) for number, pieces in enumerate(groups)]


def _cut(file: RawFile, sha256: str, shard_bytes: int) -> Iterator[Piece]:
    whole = file.whole()
    ranges = -(-file.size_bytes // shard_bytes)
    if ranges > 1 and file.dataset is None:
        units = countable_units(file.path)
        ranges = min(ranges, units)
        bounds = [number * units // ranges for number in range(ranges)] + [units]
        for start, stop in pairwise(bounds):
            weight = file.size_bytes * (stop - start) / units
            yield Piece(replace(whole, start=start, stop=stop), file.split, sha256, weight)
    else:
        yield Piece(whole, file.split, sha256, file.size_bytes)
