"""`python -m openmoe.launcher.tokenizer command=train|check|compare`: make, examine, compare tokenizers."""

import csv
import json
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal

from pydantic import BaseModel, Field

from openmoe.data.config import PathText, SourceName, TokenizerConfig
from openmoe.data.errors import DataError
from openmoe.data.raw import RawSource, folder_sources
from openmoe.data.tokenizer import (
    SENTINELS,
    TextEncoder,
    Tokenizer,
    TrainingStyle,
    encoding_threads,
    parse_model,
    read_model,
    train_tokenizer,
)
from openmoe.data.tokenizer_measures import Usage, count_usage, round_trip, sample_documents
from openmoe.launcher.entry import run_command
from openmoe.launcher.errors import ConfigError
from openmoe.launcher.tokenizer_figure import draw
from openmoe.launcher.tokenizer_tables import (
    Comparison,
    comparison_table,
    description,
    speed_line,
    trip_table,
)

PROGRESS_SECONDS = 5.0
TOTAL = "all"  # the row over all subsets


class TextConfig(BaseModel, strict=True, extra="forbid", frozen=True):
    # Folder with one sub-folder per source; `check` can do without.
    root: PathText | None = None
    # The sub-folders to read; null = all.
    sources: list[SourceName] | None = Field(None, min_length=1)


class TokenizerSection(TokenizerConfig, TrainingStyle):
    """The keys of data.tokenizer, and how a new tokenizer treats text."""


class CompareConfig(BaseModel, strict=True, extra="forbid", frozen=True):
    # Model files; ratios are to the first.
    paths: list[PathText] = Field(default_factory=list)
    # Folder that receives the table and the picture.
    output: PathText | None = None


class TokenizerPage(BaseModel, strict=True, extra="forbid", frozen=True):
    command: Literal["train", "check", "compare"]
    data: TextConfig
    tokenizer: TokenizerSection
    compare: CompareConfig


def main() -> None:
    run_command(run, TokenizerPage, "tokenizer")


def run(page: TokenizerPage) -> None:
    {"train": train, "check": check, "compare": compare}[page.command](page)


def train(page: TokenizerPage) -> None:
    """Train on the sources' training documents, write `tokenizer.path`, print its check."""
    path = Path(_required(page.tokenizer.path, "tokenizer.path", "the file to write"))
    if path.exists():
        raise ConfigError(f"tokenizer.path={path}: exists already; give a new name")
    _make_folder(path.parent, "tokenizer.path")
    texts = [text for source in _sources(page) for text in _sample(page, source, training=True)]
    size_mib = sum(len(text.encode()) for text in texts) / 2**20
    wanted = page.tokenizer.vocab_size
    with Progress(f"training {page.tokenizer.model_type} of {wanted:,} on {size_mib:.1f} MiB") as progress:
        progress.print()
        trained = train_tokenizer(texts, page.tokenizer, page.tokenizer)
    pieces = trained.size - SENTINELS
    if pieces < wanted:
        raise DataError(f"tokenizer.vocab_size={wanted}: this text allows at most {pieces} pieces")
    fresh = path.with_name(path.name + ".new")
    fresh.write_bytes(trained.model)
    os.replace(fresh, path)
    check(page)


def check(page: TokenizerPage) -> None:
    """Print what `tokenizer.path` is and, where there is text, whether it brings it back and how fast."""
    path = _required(page.tokenizer.path, "tokenizer.path", "the file to check")
    model = read_model(path, "tokenizer.path")
    begin = time.perf_counter()
    tokenizer = Tokenizer(model, f"tokenizer.path={path}")
    load_seconds = time.perf_counter() - begin
    sources = [] if page.data.root is None else _sources(page)
    print(description(path, model, tokenizer))
    if not sources:
        print("round trip   not tried: data.root is null")
        return
    threads = encoding_threads()
    trips = {}
    for source in sources:
        texts = _sample(page, source)
        with Progress(f"encoding and decoding {source.name}"):
            trips[source.name] = round_trip(tokenizer, texts, threads)
    print(trip_table(trips))
    print(speed_line(trips, load_seconds, threads))


def compare(page: TokenizerPage) -> None:
    """Count tokens and vocabulary of every tokenizer on every source, as table, CSV, JSON and picture."""
    output = Path(_required(page.compare.output, "compare.output", "the folder for table and picture"))
    if not page.compare.paths:
        raise ConfigError("compare.paths=[]: name the model files; ratios are to the first")
    _make_folder(output, "compare.output")
    files = _names(page.compare.paths)
    encoders = {}
    for name, path in files.items():
        model, origin = read_model(path, "compare.paths"), f"compare.paths={path}"
        parse_model(model, origin)
        encoders[name] = TextEncoder(model, origin)
    subsets: dict[str, dict[str, Usage]] = {}
    for source in _sources(page):
        texts = _sample(page, source)
        with Progress(f"counting {source.name}"):
            subsets[source.name] = count_usage(encoders, texts, encoding_threads())
    if len(subsets) > 1:
        subsets[TOTAL] = {name: _sum([usage[name] for usage in subsets.values()]) for name in files}
    comparison = Comparison(subsets, {name: e.processor.vocab_size() for name, e in encoders.items()})
    print(comparison_table(comparison))
    rows = comparison.rows()
    with (output / "comparison.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    record = {"tokenizers": files, "vocabulary": comparison.vocabulary, "rows": rows}
    (output / "comparison.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(comparison, output / "comparison.png")
    print(f"written: {output}/comparison.csv, .json and .png")


def _sources(page: TokenizerPage) -> list[RawSource]:
    root = _required(page.data.root, "data.root", "the folder with one sub-folder per source")
    return folder_sources(root, page.data.sources)


def _sample(page: TokenizerPage, source: RawSource, training: bool = False) -> list[str]:
    """Documents of the source, up to the configured size; for training none that is held back."""
    with Progress(f"reading {source.name}") as progress:
        texts = (text for split, text in source.documents() if not (training and split == "valid"))
        sample = sample_documents(progress.count(texts), page.tokenizer.sample_bytes_per_source)
    if not sample:
        raise DataError(f"source {source.name!r} of data.root={page.data.root} has no text")
    return sample


def _names(paths: Sequence[str]) -> dict[str, str]:
    """A name for each model file: its own without ending, or its path where two files have the same one."""
    stems = [Path(path).stem for path in paths]
    names = {stem if stems.count(stem) == 1 else path: path for stem, path in zip(stems, paths, strict=True)}
    if len(names) < len(paths):
        raise ConfigError("compare.paths: a file is named twice")
    return names


def _sum(parts: Sequence[Usage]) -> Usage:
    total = parts[0]
    for part in parts[1:]:
        total += part
    return total


def _required(value: str | None, key: str, what: str) -> str:
    if value is None:
        raise ConfigError(f"{key}=null: give {what}")
    return value


def _make_folder(folder: Path, key: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{key}: the folder {folder} can't be made: {error.strerror}") from None


class Progress:
    """A line on stderr every few seconds while something runs that takes long."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._text_bytes = 0
        self._begin = time.monotonic()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._repeat, daemon=True)

    def count(self, texts: Iterable[str]) -> Iterator[str]:
        """The same texts; their size stands in the lines."""
        for text in texts:
            self._text_bytes += len(text.encode())
            yield text

    def print(self) -> None:
        size = f" {self._text_bytes / 2**20:.1f} MiB," if self._text_bytes else ""
        print(f"{self._what}:{size} {time.monotonic() - self._begin:.0f} s", file=sys.stderr, flush=True)

    def _repeat(self) -> None:
        while not self._done.wait(PROGRESS_SECONDS):
            self.print()

    def __enter__(self) -> "Progress":
        self._thread.start()
        return self

    def __exit__(self, *exception: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._done.set()
        self._thread.join()


if __name__ == "__main__":
    main()
