"""From raw text to memory-mapped tokens: tokenizer, held-back split, shards. Cached by content."""

import hashlib
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from openmoe.data.cache import build_once, cache_folder
from openmoe.data.config import DataConfig
from openmoe.data.embedded import embedded_sources
from openmoe.data.errors import DataError
from openmoe.data.raw import RawSource, folder_sources
from openmoe.data.shards import (
    SPLITS,
    TOKENIZER,
    PreparedSource,
    ShardWriter,
    Split,
    is_prepared,
    open_sources,
    part_folder,
    read_manifest,
    shard_files,
    write_manifest,
)
from openmoe.data.tokenizer import Tokenizer, encoding_threads, load_tokenizer, train_tokenizer

# Part of every cache key: raise it when the files or their content change for the same input.
_FORMAT = 2
# Documents handed to the tokenizer at once, and the ones among which at least one is held back.
_BATCH_DOCUMENTS = 256
# Work longer than this gets a progress line.
_PROGRESS_SECONDS = 2.0


@dataclass(frozen=True)
class PreparedData:
    """All that a run reads: tokenizer and sources by name."""

    tokenizer: Tokenizer
    sources: dict[str, PreparedSource]

    @property
    def fingerprint(self) -> dict[str, str | list[str]]:
        """sha256 of the tokenizer and of each source's parts, by name: equal exactly where all tokens are."""
        return {"tokenizer": self.tokenizer.sha256} | {
            f"source {name}": list(source.sha256) for name, source in self.sources.items()
        }


def prepare(
    config: DataConfig, vocab_limit: int | None = None, sources: Sequence[str] | None = None
) -> PreparedData:
    """Tokenise `sources` (None: all there are) unless the cache has them, and open them.

    `vocab_limit` is the number of rows of the model's embedding. Raises DataError for anything wrong with the
    sources, the tokenizer or its size. Safe to call from several processes at once.
    """
    if config.root is not None and is_prepared(Path(config.root)):
        return _open_prepared(config, vocab_limit, sources)
    raw_sources = embedded_sources(sources) if config.root is None else folder_sources(config.root, sources)
    cache = cache_folder(config.cache_dir)
    tokenizer = _tokenizer(config, raw_sources, cache)
    _check_fits(tokenizer, vocab_limit)
    prepared: dict[str, PreparedSource] = {}
    for raw in raw_sources:
        key = _key("tokens", raw.sha256, tokenizer.sha256, config.validation_fraction)
        folder = build_once(cache / f"tokens-{key}", partial(_tokenise, raw, tokenizer, config))
        prepared |= open_sources(folder)
    return PreparedData(tokenizer, prepared)


def _check_fits(tokenizer: Tokenizer, vocab_limit: int | None) -> None:
    if vocab_limit is not None and tokenizer.size > vocab_limit:
        raise DataError(
            f"the tokenizer has {tokenizer.size} ids, sentinels included, but the model's vocabulary only "
            f"{vocab_limit} rows"
        )


def _open_prepared(
    config: DataConfig, vocab_limit: int | None, sources: Sequence[str] | None
) -> PreparedData:
    """What the command `prepare` left in data.root."""
    folder = Path(str(config.root))
    sha256 = read_manifest(folder)["tokenizer"]["sha256"]
    tokenizer = load_tokenizer(str(folder / TOKENIZER))
    if tokenizer.sha256 != sha256:
        raise DataError(
            f"{folder / TOKENIZER} is not the tokenizer that data.root={folder} was prepared with"
        )
    given = config.tokenizer.path
    if given is not None and load_tokenizer(given).sha256 != sha256:
        raise DataError(
            f"data.tokenizer.path={given} is another tokenizer than the one data.root={folder} was prepared "
            "with; leave it null, or prepare the text again"
        )
    _check_fits(tokenizer, vocab_limit)
    found = open_sources(folder)
    for name in sources or ():
        if name not in found:
            raise DataError(f"source {name!r} is not in data.root={folder}; there are {', '.join(found)}")
    return PreparedData(tokenizer, {name: found[name] for name in sorted(set(sources or found))})


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps([_FORMAT, *parts]).encode()).hexdigest()[:32]


def _tokenizer(config: DataConfig, raw_sources: Sequence[RawSource], cache: Path) -> Tokenizer:
    if config.tokenizer.path is not None:
        return load_tokenizer(config.tokenizer.path)
    contents = [raw.sha256 for raw in raw_sources]
    key = _key("tokenizer", contents, config.validation_fraction, config.tokenizer.model_dump())

    def build(folder: Path) -> None:
        _say(f"training a tokenizer of {config.tokenizer.vocab_size} pieces")
        trained = train_tokenizer(_tokenizer_sample(config, raw_sources), config.tokenizer)
        (folder / "tokenizer.model").write_bytes(trained.model)

    folder = build_once(cache / f"tokenizer-{key}", build)
    return load_tokenizer(str(folder / "tokenizer.model"))


def _tokenizer_sample(config: DataConfig, raw_sources: Sequence[RawSource]) -> Iterator[str]:
    """Training documents of every source up to the configured size, chosen by their hash."""
    for raw in raw_sources:
        share = config.tokenizer.sample_bytes_per_source / max(1, raw.size_bytes)
        for split, text in split_documents(raw, config.validation_fraction):
            if split == "train" and _hash_place("sample", text) < share:
                yield text


def split_documents(raw: RawSource, validation_fraction: float) -> Iterator[tuple[Split, str]]:
    """The source's documents with their split, empty ones left out.

    Where the source has no split of its own, a document is held back if the hash of its text falls below
    `validation_fraction`, so adding documents moves no other. Of the first 256 at least one is held back and
    one is not; of a source that is a single document, the end of it.
    """
    documents = ((split, text) for split, text in raw.documents() if text)
    first = list(islice(documents, _BATCH_DOCUMENTS))
    if len(first) == 1 and first[0][0] is None:
        text = first[0][1]
        cut = math.ceil(len(text) * (1 - validation_fraction))
        cut = text.rfind("\n", 1, cut) + 1 or cut
        first = [("train", text[:cut]), ("valid", text[cut:])]
    places = [_hash_place("split", text) for _, text in first]
    lowest, highest = min(places, default=0.0), max(places, default=0.0)
    for (split, text), place in zip(first, places, strict=True):
        held_back = place == lowest or (place < validation_fraction and place != highest)
        yield split or ("valid" if held_back else "train"), text
    for split, text in documents:
        held_back = split is None and _hash_place("split", text) < validation_fraction
        yield split or ("valid" if held_back else "train"), text


def _hash_place(purpose: str, text: str) -> float:
    """A number in [0, 1) that only depends on the purpose and the text."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=purpose.encode()).digest()
    return int.from_bytes(digest, "little") / 2**64


def _tokenise(raw: RawSource, tokenizer: Tokenizer, config: DataConfig, folder: Path) -> None:
    part = part_folder(folder, raw.name, 0)
    part.mkdir(parents=True)
    writers = {split: ShardWriter(shard_files(part, 0, split)) for split in SPLITS}
    progress = _Progress(f"tokenising {raw.name}", raw.size_bytes)
    threads = encoding_threads()
    documents = split_documents(raw, config.validation_fraction)
    while batch := list(islice(documents, _BATCH_DOCUMENTS)):
        texts = [text for _, text in batch]
        for (split, _), ids in zip(batch, tokenizer.encode_batch(texts, threads), strict=True):
            if ids:
                writers[split].add(np.array(ids, np.int32), np.array([len(ids)]))
        progress.add(sum(map(len, texts)))
    entries = {split: writer.close() for split, writer in writers.items()}
    for split, entry in entries.items():
        if not entry["tokens"]:
            kind = "training" if split == "train" else "held-back"
            raise DataError(f"source {raw.name!r} is empty: it has no {kind} text")
    write_manifest(folder, {"sources": {raw.name: {"parts": [{"shards": [entries]}]}}})


class _Progress:
    """A line on stderr now and then, with speed and time left, for work that takes long."""

    def __init__(self, what: str, total_bytes: int) -> None:
        self._what, self._total = what, max(1, total_bytes)
        self._done = 0
        self._start = self._last = time.monotonic()

    def add(self, done_bytes: int) -> None:
        self._done += done_bytes
        now = time.monotonic()
        if now - self._last < _PROGRESS_SECONDS:
            return
        self._last = now
        speed = self._done / (now - self._start)
        left_seconds = max(0.0, (self._total - self._done) / speed)
        _say(
            f"{self._what}: {self._done / 2**20:.1f} of about {self._total / 2**20:.1f} MiB, "
            f"{speed / 2**20:.1f} MiB/s, {left_seconds:.0f} s left"
        )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
