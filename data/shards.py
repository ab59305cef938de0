"""Tokens on disk: what a prepared folder holds, and how it is opened.

    FOLDER/manifest.json                                counts, sizes and sha256 of all that follows
    FOLDER/tokenizer.model
    FOLDER/SOURCE/part_0000/00000_train_tokens.bin      int32, documents one after the other, no separators
    FOLDER/SOURCE/part_0000/00000_train_offsets.bin     int64 [documents + 1], where each document starts
    FOLDER/SOURCE/part_0000/00000_train_blocks.bin      int64 [blocks, 2], counts of each 1024 documents
    FOLDER/SOURCE/part_0000/00000_valid_...             the same for held-back text

A source has one part for each time text was added to it, a part has shards in order, and a document lies in
one shard. These files are little-endian and have no header. Only what the manifest names counts.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from openmoe.data.errors import DataError, one_line

Split = Literal["train", "valid"]
SPLITS: tuple[Split, ...] = ("train", "valid")

MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.model"
# Names a manifest of ours; `version` counts up where old folders can no longer be read.
_FORMAT = {"format": "openmoe tokens", "version": 2}

# Documents that are counted together, so that opening a source need not read all offsets.
BLOCK_DOCUMENTS = 1024


@dataclass(frozen=True)
class TokenShard:
    """One split of one shard, on disk."""

    tokens_path: Path
    offsets_path: Path
    blocks_path: Path
    documents: int
    tokens: int

    def map_tokens(self) -> np.ndarray:
        """int32 [tokens], a read-only map."""
        return np.asarray(np.memmap(self.tokens_path, "<i4", "r"))

    def map_offsets(self) -> np.ndarray:
        """int64 [documents + 1], a read-only map: where each document starts, and where the last one ends."""
        return np.asarray(np.memmap(self.offsets_path, "<i8", "r"))

    def map_blocks(self) -> np.ndarray:
        """int64 [blocks, 2], a read-only map: of each 1024 documents the tokens, and those of the longest."""
        return np.asarray(np.memmap(self.blocks_path, "<i8", "r")).reshape(-1, 2)


# The shards of one part in order; those that hold no document of the split are left out.
Part = tuple[TokenShard, ...]


@dataclass(frozen=True)
class PreparedSource:
    """One source, ready to read."""

    name: str
    # The same number of parts in each split; a part may hold no document of a split.
    splits: dict[Split, tuple[Part, ...]]
    # One for each part, over the tokens and documents of both splits: equal wherever the data is.
    sha256: tuple[str, ...]


class ShardFiles(NamedTuple):
    """Where one split of one shard lies."""

    tokens: Path
    offsets: Path
    blocks: Path


def part_folder(folder: Path, source: str, part: int) -> Path:
    return folder / source / f"part_{part:04}"


def shard_files(folder: Path, number: int, split: Split) -> ShardFiles:
    """The files of shard `number` of the part in `folder`."""
    stem = f"{number:05}_{split}"
    return ShardFiles(*(folder / f"{stem}_{kind}.bin" for kind in ShardFiles._fields))


def is_prepared(folder: Path) -> bool:
    """Does `folder` hold prepared tokens (and no raw text)? Its manifest tells."""
    try:
        return (folder / MANIFEST).is_file()
    except (OSError, ValueError):
        return False


def write_manifest(folder: Path, values: dict[str, Any]) -> None:
    """Put the manifest of `values` in the place of the old one, in one step."""
    replace_file(folder / MANIFEST, (json.dumps(_FORMAT | values, indent=1) + "\n").encode())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that it has its old content or its new one, also after a power cut."""
    fresh = path.with_name(f".{os.getpid()}-{path.name}")
    with fresh.open("wb") as file:
        file.write(content)
        sync(file)
    os.replace(fresh, path)
    sync_path(path.parent)


def sync_path(path: Path) -> None:
    """Make the content of a file, or what was renamed into a folder, outlast a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of `folder`. Raises DataError where it is none that this version can read."""
    path = folder / MANIFEST
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} can't be read: {one_line(error)}") from None
    if not isinstance(values, dict) or {key: values.get(key) for key in _FORMAT} != _FORMAT:
        raise DataError(f"{path} is not of {_FORMAT['format']}, version {_FORMAT['version']}")
    return values


def open_sources(folder: Path) -> dict[str, PreparedSource]:
    """The sources of a prepared folder by name; looks at sizes, blocks and both ends of each index.

    Raises DataError where a file is missing, has another size than the manifest says, or an index that
    does not belong to its shard. The tokens are left to `verify`.
    """
    manifest = read_manifest(folder)
    try:
        return {
            name: _open_source(folder, name, entry["parts"]) for name, entry in manifest["sources"].items()
        }
    except (OSError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"prepared data in {folder} is damaged ({error!r}); delete it, prepare again"
        ) from None


def _open_source(folder: Path, name: str, parts: list[dict[str, Any]]) -> PreparedSource:
    splits: dict[Split, tuple[Part, ...]] = {
        split: tuple(
            tuple(
                open_shard(shard_files(part_folder(folder, name, number), index, split), shard[split])
                for index, shard in enumerate(part["shards"])
                if shard[split]["documents"]
            )
            for number, part in enumerate(parts)
        )
        for split in SPLITS
    }
    return PreparedSource(name, splits, tuple(map(_part_sha256, parts)))


def _part_sha256(part: dict[str, Any]) -> str:
    identity = [[shard[split] for split in SPLITS] for shard in part["shards"]]
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def open_shard(files: ShardFiles, entry: dict[str, Any]) -> TokenShard:
    """One split of one shard, if it is what its manifest entry says. Raises DataError."""
    documents, tokens = entry["documents"], entry["tokens"]
    advice = f"delete {files.tokens.parents[2]} and prepare the data again"
    blocks = -(-documents // BLOCK_DOCUMENTS)
    sizes = (4 * tokens, 8 * (documents + 1), 16 * blocks)
    for path, expected in zip(files, sizes, strict=True):
        try:
            size_bytes = path.stat().st_size
        except OSError as error:
            raise DataError(f"{path} is missing: {error.strerror}; {advice}") from None
        if size_bytes != expected:
            what = "cut short" if size_bytes < expected else "too long"
            raise DataError(f"{path} is {what}: {size_bytes} bytes, its manifest says {expected}; {advice}")
    with files.offsets.open("rb") as file:
        first = int.from_bytes(file.read(8), "little", signed=True)
        file.seek(8 * documents)
        last = int.from_bytes(file.read(8), "little", signed=True)
    if (first, last) != (0, tokens):
        raise DataError(
            f"{files.offsets} is not the index of its shard: it goes from {first} to {last}, the shard has "
            f"{tokens} tokens; {advice}"
        )
    _same_sha256(files.blocks, entry["blocks_sha256"])
    return TokenShard(*files, documents, tokens)


def verify(folder: Path) -> Iterator[Path]:
    """Read every shard that the manifest names, yielding the path of each file whose sha256 is right.

    Raises DataError for one that differs.
    """
    for name, source in read_manifest(folder)["sources"].items():
        for number, part in enumerate(source["parts"]):
            for index, shard in enumerate(part["shards"]):
                for split in SPLITS:
                    if shard[split]["documents"]:
                        files = shard_files(part_folder(folder, name, number), index, split)
                        open_shard(files, shard[split])  # which reads the blocks
                        yield _same_sha256(files.tokens, shard[split]["tokens_sha256"])
                        yield _same_sha256(files.offsets, shard[split]["offsets_sha256"])
                        yield files.blocks


def _same_sha256(path: Path, expected: str) -> Path:
    found = file_sha256(path)
    if found != expected:
        raise DataError(f"{path} has changed: sha256 {found}, the manifest says {expected}")
    return path


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def count_blocks(lengths: np.ndarray) -> np.ndarray:
    """Of each 1024 documents the tokens, and those of the longest: int64 [documents] -> [blocks, 2]."""
    first = np.arange(0, len(lengths), BLOCK_DOCUMENTS)
    counts = np.stack([reduce.reduceat(lengths, first) for reduce in (np.add, np.maximum)], axis=1)
    return counts.astype("<i8", copy=False)


class ShardWriter:
    """Writes one split of one shard, batch by batch."""

    def __init__(self, files: ShardFiles) -> None:
        self._files = files
        # Names of this process's own: one that was killed may be writing its last bytes still.
        self._fresh = ShardFiles(*(path.with_name(f".{os.getpid()}-{path.name}") for path in files))
        self._file = self._fresh.tokens.open("wb")
        self._digest = hashlib.sha256()
        # Of each document, after a 0 for where the first one starts.
        self._lengths = [np.zeros(1, np.int64)]
        # Written so far.
        self.tokens = 0

    def add(self, documents: Sequence[np.ndarray]) -> int:
        """Append documents, each int32 [tokens]. Leaves out empty ones; returns how many these were."""
        lengths = np.fromiter(map(len, documents), np.int64, len(documents))
        if documents:
            tokens = np.concatenate(documents).astype("<i4", copy=False)
            self._file.write(tokens.data)
            self._digest.update(tokens.data)
            self._lengths.append(lengths[lengths > 0])
            self.tokens += len(tokens)
        return int(np.count_nonzero(lengths == 0))

    def close(self) -> dict[str, int | str]:
        """Finish the files and name them, if there is any document; returns the manifest entry."""
        lengths = np.concatenate(self._lengths)
        offsets = np.cumsum(lengths, dtype="<i8")
        blocks = count_blocks(lengths[1:])
        if self.tokens:
            sync(self._file)
            for path, content in ((self._fresh.offsets, offsets), (self._fresh.blocks, blocks)):
                with path.open("wb") as file:
                    file.write(content.data)
                    sync(file)
            for fresh, final in zip(self._fresh, self._files, strict=True):
                os.replace(fresh, final)
        return {
            "documents": len(offsets) - 1,
            "tokens": self.tokens,
            "tokens_sha256": self._digest.hexdigest(),
            "offsets_sha256": hashlib.sha256(offsets.data).hexdigest(),
            "blocks_sha256": hashlib.sha256(blocks.data).hexdigest(),
        }

    def discard(self) -> None:
        """Remove what has not got its name."""
        self._file.close()
        for path in self._fresh:
            path.unlink(missing_ok=True)


def sync(file: BinaryIO) -> None:
    """Make what was written outlast a power cut."""
    file.flush()
    os.fsync(file.fileno())
