"""Raw text as it lies on disk: a folder with one sub-folder per source, of jsonl, txt or parquet files.

    root/SOURCE/*.jsonl                 one {"text": ...} a line
    root/SOURCE/*.txt                   one document a file
    root/SOURCE/*.parquet               a column `text`
    root/SOURCE/{train,valid}/...       the same, already split

Files are read in the order of their names. Anything that can't be read is an error with file and line.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from openmoe.data.errors import DataError
from openmoe.data.shards import Split

SUFFIXES = (".jsonl", ".parquet", ".txt")


@dataclass(frozen=True)
class RawSource:
    """One source of text before preparation."""

    name: str
    # Identifies the text: changes when any document does.
    sha256: str
    # Of the files; for progress only.
    size_bytes: int
    # Documents, with their split where the source comes with one.
    documents: Callable[[], Iterator[tuple[Split | None, str]]]


def folder_sources(root: str, names: Sequence[str] | None) -> list[RawSource]:
    """The sources called `names` (None: all) under `root`, ordered by name.

    Raises DataError for a missing folder, a missing source or a source without files.
    """
    folder = Path(root)
    try:
        if not folder.is_dir():
            raise DataError(f"data.root={root} is not a folder")
        available = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
    except (OSError, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"data.root={root} can't be read: {error}") from None
    if names is None:
        names = [name for name in available if not name.startswith(".")]
    if not names:
        raise DataError(f"data.root={root} has no sub-folder; each source is one")
    for name in names:
        if name not in available:
            raise DataError(f"source {name!r} is not in data.root={root}; there are {', '.join(available)}")
    return [_folder_source(folder / name) for name in sorted(set(names))]


def _folder_source(folder: Path) -> RawSource:
    files = _files(folder)
    if not files:
        raise DataError(f"source {folder.name!r} is empty: no {', '.join(SUFFIXES)} file in {folder}")
    return RawSource(
        name=folder.name,
        sha256=_content_sha256(folder, files),
        size_bytes=sum(path.stat().st_size for _, path in files),
        documents=lambda: _documents(files),
    )


def _files(folder: Path) -> list[tuple[Split | None, Path]]:
    train, valid = folder / "train", folder / "valid"
    held_back = _text_files(valid) if valid.is_dir() else []
    training = _text_files(train) if train.is_dir() else _text_files(folder)
    split: Split | None = "train" if held_back else None
    files: list[tuple[Split | None, Path]] = [(split, path) for path in training if path not in held_back]
    return files + [("valid", path) for path in held_back]


def _text_files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file())


def _content_sha256(folder: Path, files: Sequence[tuple[Split | None, Path]]) -> str:
    digest = hashlib.sha256()
    for split, path in files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{split}\0{path.relative_to(folder)}\0{content}\n".encode())
    return digest.hexdigest()


def _documents(files: Sequence[tuple[Split | None, Path]]) -> Iterator[tuple[Split | None, str]]:
    readers = {".jsonl": _read_jsonl, ".txt": _read_text, ".parquet": _read_parquet}
    for split, path in files:
        for text in readers[path.suffix](path):
            yield split, text


def _read_jsonl(path: Path) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
                text = record["text"]
                text.encode("utf-8")  # a lone surrogate, written as \ud800, is no text
            except (UnicodeDecodeError, UnicodeEncodeError) as error:
                raise DataError(f"{path}:{number}: not UTF-8: {error.reason}") from None
            except ValueError as error:
                raise DataError(f"{path}:{number}: not JSON: {error}") from None
            except (KeyError, TypeError, AttributeError, RecursionError):
                raise DataError(f'{path}:{number}: expected a JSON object with a string "text"') from None
            yield text


def _read_text(path: Path) -> Iterator[str]:
    content = path.read_bytes()
    try:
        yield content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8: {error.reason}") from None


def _read_parquet(path: Path) -> Iterator[str]:
    import datasets  # seconds to import, needed for this format only

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs the error that it raises
    try:
        rows = datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        for number, record in enumerate(rows, start=1):
            text = record.get("text")
            if not isinstance(text, str):
                raise DataError(f"{path}: row {number}: expected a string in the column `text`")
            yield text
    except DataError:
        raise
    except Exception as error:  # pyarrow's and datasets' own errors share no base class
        raise DataError(f"{path}: not a parquet file: {' '.join(str(error).split())}") from None
