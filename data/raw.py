"""Raw text as it lies on disk: a folder with one sub-folder per source.

    root/SOURCE/*.jsonl                 one {"text": ...} a line
    root/SOURCE/*.txt                   one document a file
    root/SOURCE/*.parquet, *.arrow      a column `text`
    root/SOURCE/{train,valid}/...       the same, already split

Files of text may be compressed (.gz, .zst). They are read in the order of their names. Links to files and
folders are followed.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from openmoe.data.errors import DataError
from openmoe.data.readers import (
    SUFFIXES,
    DatasetName,
    FileRange,
    OnCorrupt,
    Reading,
    file_suffix,
    open_dataset,
    read_documents,
)
from openmoe.data.shards import Split, file_sha256


@dataclass(frozen=True)
class RawFile:
    """One file of a source, or one shard of a streamed dataset."""

    path: Path
    # SOURCE/..., the same wherever the input lies.
    name: str
    # Where the source comes with a split.
    split: Split | None
    # 1 for the shard of a dataset, whose size is not known.
    size_bytes: int
    dataset: DatasetName | None = None
    # Of the dataset.
    shard: int = 0

    def whole(self) -> FileRange:
        return FileRange(self.path, self.name, self.shard, None, self.dataset)

    def sha256(self) -> str:
        """Of the content; of a dataset, which can't be had without reading it, of the name."""
        if self.dataset is None:
            return file_sha256(self.path)
        return hashlib.sha256(repr((self.dataset, self.name)).encode()).hexdigest()


@dataclass(frozen=True)
class RawSource:
    """One source of text before preparation."""

    name: str
    files: tuple[RawFile, ...]
    # The same wherever a folder lies.
    origin: str = "a folder"

    @property
    def size_bytes(self) -> int:
        """Of the files, compressed ones as they are."""
        return sum(file.size_bytes for file in self.files)

    def documents(
        self, text_field: str = "text", on_corrupt: OnCorrupt = "stop"
    ) -> Iterator[tuple[Split | None, str]]:
        """All documents with their split, None where the source has none. Raises DataError."""
        for file in self.files:
            for text in read_documents(file.whole(), text_field, Reading(on_corrupt)):
                yield file.split, text


def folder_sources(root: str, names: Sequence[str] | None, key: str = "data.root") -> list[RawSource]:
    """The sources called `names` (None: all) under `root`, ordered by name; `key` names it in errors.

    Raises DataError for a missing folder, a missing source or a source without files.
    """
    folder = Path(root)
    try:
        if not folder.is_dir():
            raise DataError(f"{key}={root} is not a folder")
        available = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{key}={root} can't be read: {error}") from None
    if names is None:
        names = [name for name in available if not name.startswith(".")]
    if not names:
        raise DataError(f"{key}={root} has no sub-folder; each source is one")
    for name in names:
        if name not in available:
            raise DataError(f"source {name!r} is not in {key}={root}; there are {', '.join(available)}")
    return [_folder_source(folder / name) for name in sorted(set(names))]


def _folder_source(folder: Path) -> RawSource:
    train, valid = folder / "train", folder / "valid"
    held_back = _text_files(valid) if valid.is_dir() else []
    outside = [path for path in _text_files(folder) if not {train, valid} & set(path.parents)]
    if train.is_dir() and outside:
        raise DataError(
            f"{outside[0]} lies beside {train}; where a source has a folder train, its text must be in train "
            "and valid"
        )
    training = _text_files(train) if train.is_dir() else outside
    split: Split | None = "train" if held_back else None
    files = [_raw_file(folder, path, split) for path in training]
    files += [_raw_file(folder, path, "valid") for path in held_back]
    if not files:
        raise DataError(f"source {folder.name!r} is empty: no {', '.join(SUFFIXES)} file in {folder}")
    return RawSource(folder.name, tuple(files))


def _text_files(folder: Path) -> list[Path]:
    return [path for path in folder_files(folder) if file_suffix(path)]


def folder_files(folder: Path) -> list[Path]:
    """All files below `folder` by name, links followed; a folder with several ways to it is read once.

    Raises DataError for a folder that can't be read.
    """
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    for path, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        status = os.stat(path)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        found += [Path(path, name) for name in names]
    return sorted(path for path in found if path.is_file())


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename} can't be read: {error.strerror}")


def _raw_file(folder: Path, path: Path, split: Split | None) -> RawFile:
    name = f"{folder.name}/{path.relative_to(folder).as_posix()}"
    return RawFile(path, name, split, path.stat().st_size)


def dataset_source(dataset: DatasetName) -> RawSource:
    """The source that a streamed dataset makes: named after it, one file for each of its shards.

    Raises DataError where there is no such dataset.
    """
    parts = [dataset.name.rstrip("/").split("/")[-1], *([dataset.config] if dataset.config else [])]
    name = "".join(letter if letter.isalnum() or letter in "_.-" else "_" for letter in "_".join(parts))
    count = open_dataset(dataset).num_shards
    return RawSource(
        name,
        tuple(
            RawFile(Path(dataset.name), f"{name}/{dataset.split}/{shard}-of-{count}", None, 1, dataset, shard)
            for shard in range(count)
        ),
        origin=f"the dataset {dataset.name}",
    )


def file_hashes(sources: Sequence[RawSource], threads: int | None = None) -> dict[str, str]:
    """sha256 of the content of every file, by its name. Raises DataError where two sources overlap."""
    files = [file for source in sources for file in source.files]
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        hashes = dict(zip((file.name for file in files), pool.map(RawFile.sha256, files), strict=True))
    first: dict[str, tuple[str, RawFile]] = {}
    for source in sources:
        for file in source.files:
            name, other = first.setdefault(hashes[file.name], (source.name, file))
            if file.size_bytes and (name, other.split) != (source.name, file.split):
                raise DataError(
                    f"{file.path} and {other.path} have the same content: the text would count twice, in "
                    f"{source.name} and in {name}; remove one"
                )
    return hashes
