"""Tokens on disk: one flat int32 file per source and split, with the index of its documents.

FOLDER/manifest.json                counts, sizes and sha256 of what follows
FOLDER/{train,valid}/tokens.bin     int32, all documents one after the other, no separators
FOLDER/{train,valid}/offsets.npy    int64 [documents + 1], where each document starts
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from openmoe.data.errors import DataError
from openmoe.data.raw import Split

SPLITS: tuple[Split, ...] = ("train", "valid")


@dataclass(frozen=True)
class TokenShard:
    """One split of one source, memory-mapped."""

    # int32 [tokens]
    tokens: np.ndarray
    # int64 [documents + 1]
    offsets: np.ndarray

    @property
    def documents(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True)
class PreparedSource:
    """One source, ready to read."""

    name: str
    splits: dict[Split, TokenShard]
    # sha256 over the tokens of both splits and their documents: the same data has the same one anywhere.
    sha256: str


class ShardWriter:
    """Writes one split document by document."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder = folder
        self._file = (folder / "tokens.bin").open("wb")
        self._lengths: list[int] = []

    def add(self, ids: Sequence[int]) -> None:
        """Append one document."""
        np.asarray(ids, np.int32).tofile(self._file)
        self._lengths.append(len(ids))

    def close(self) -> dict[str, int | str]:
        """Finish the files; returns their manifest entry."""
        self._file.close()
        offsets = np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)]).astype(np.int64)
        np.save(self._folder / "offsets.npy", offsets)
        return {
            "documents": len(self._lengths),
            "tokens": int(offsets[-1]),
            "tokens_sha256": _file_sha256(self._folder / "tokens.bin"),
            "offsets_sha256": hashlib.sha256(offsets.tobytes()).hexdigest(),
        }


def write_manifest(folder: Path, manifest: dict) -> None:
    """Write `manifest.json`; `manifest["splits"]` holds what the writers returned."""
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def open_source(folder: Path, name: str) -> PreparedSource:
    """Memory-map what was written to `folder`. Raises DataError where sizes don't match the manifest."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        splits = {split: _open_shard(folder / split, manifest["splits"][split]) for split in SPLITS}
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"prepared data of source {name!r} in {folder} is damaged ({error}); "
            "delete that folder to prepare it again"
        ) from None
    identity = json.dumps(manifest["splits"], sort_keys=True)
    return PreparedSource(name, splits, hashlib.sha256(identity.encode()).hexdigest())


def _open_shard(folder: Path, entry: dict) -> TokenShard:
    offsets = np.load(folder / "offsets.npy", mmap_mode="r")
    size_bytes = (folder / "tokens.bin").stat().st_size
    if size_bytes != 4 * entry["tokens"]:
        raise ValueError(f"tokens.bin has {size_bytes} bytes, the manifest says {4 * entry['tokens']}")
    if len(offsets) != entry["documents"] + 1 or offsets[-1] != entry["tokens"]:
        raise ValueError("offsets.npy does not match the manifest")
    return TokenShard(np.memmap(folder / "tokens.bin", np.int32, "r"), offsets)


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
