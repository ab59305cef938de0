"""How training opens its data: a prepared folder as it is, raw text through a cache."""

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from openmoe.data.build import Work, build, train_on
from openmoe.data.cache import build_once, cache_folder
from openmoe.data.config import DataConfig
from openmoe.data.embedded import embedded_sources
from openmoe.data.encode import EncodeSettings
from openmoe.data.errors import DataError
from openmoe.data.raw import RawSource, file_hashes, folder_sources
from openmoe.data.shards import TOKENIZER, PreparedSource, is_prepared, open_sources, read_manifest
from openmoe.data.tokenizer import Tokenizer, encoding_threads, load_tokenizer

# Part of every cache key: raise it when the files or their content change for the same input.
_FORMAT = 4
# Raw bytes of a shard of cached data.
_SHARD_BYTES = 2**26


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
    """Open `sources` (None: all there are), tokenised first where data.root is raw text not in the cache.

    `vocab_limit` is the number of rows of the model's embedding. Raises DataError for anything wrong with the
    sources, the tokenizer or its size. Safe to call from several processes at once.
    """
    if config.root is not None and is_prepared(Path(config.root)):
        return open_prepared(Path(config.root), config.tokenizer.path, vocab_limit, sources)
    cache = cache_folder(config.cache_dir)
    raw_sources, hashes, work = _raw_text(config, sources, cache)
    contents = _contents(raw_sources, hashes)
    tokenizer = _tokenizer(config, raw_sources, contents, cache, work)
    _check_fits(tokenizer, vocab_limit)
    prepared: dict[str, PreparedSource] = {}
    for raw in raw_sources:
        key = _key("tokens", contents[raw.name], tokenizer.sha256, work.shard_bytes, *work.encode.identity())
        folder = build_once(
            cache / f"tokens-{key}",
            partial(build, sources=[raw], hashes=hashes, tokenizer=tokenizer, work=work),
        )
        prepared |= open_sources(folder)
    return PreparedData(tokenizer, prepared)


def open_tokenizer(config: DataConfig, sources: Sequence[str]) -> Tokenizer:
    """The tokenizer that `prepare` would read these sources with; no text is tokenised for it."""
    if config.root is not None and is_prepared(Path(config.root)):
        return load_tokenizer(str(Path(config.root) / TOKENIZER), "data.root")
    if config.tokenizer.path is not None:
        return load_tokenizer(config.tokenizer.path)
    cache = cache_folder(config.cache_dir)
    raw_sources, hashes, work = _raw_text(config, sources, cache)
    return _tokenizer(config, raw_sources, _contents(raw_sources, hashes), cache, work)


def open_prepared(
    folder: Path, tokenizer_path: str | None, vocab_limit: int | None, names: Sequence[str] | None
) -> PreparedData:
    """What the command `prepare` left in data.root; a given tokenizer must be the folder's own.

    Raises DataError where it isn't, or where the folder is damaged or lacks one of `names`.
    """
    sha256 = read_manifest(folder)["tokenizer"]["sha256"]
    tokenizer = load_tokenizer(str(folder / TOKENIZER), "data.root")
    if tokenizer.sha256 != sha256:
        raise DataError(f"{folder / TOKENIZER} is not the tokenizer that this folder was prepared with")
    if tokenizer_path is not None and load_tokenizer(tokenizer_path).sha256 != sha256:
        raise DataError(
            f"data.tokenizer.path={tokenizer_path} is another tokenizer than the one data.root={folder} was "
            "prepared with; leave it null, or prepare the text again"
        )
    _check_fits(tokenizer, vocab_limit)
    found = open_sources(folder)
    for name in names or ():
        if name not in found:
            raise DataError(f"source {name!r} is not in data.root={folder}; there are {', '.join(found)}")
    return PreparedData(tokenizer, {name: found[name] for name in sorted(set(names or found))})


def _raw_text(
    config: DataConfig, sources: Sequence[str] | None, cache: Path
) -> tuple[list[RawSource], dict[str, str], Work]:
    """The sources, the sha256 of their files by name, and how they are tokenised."""
    if config.root is None:
        raw_sources = embedded_sources(sources, cache)
    else:
        raw_sources = folder_sources(config.root, sources)
    settings = EncodeSettings("text", config.validation_fraction, "stop", encoding_threads())
    return raw_sources, file_hashes(raw_sources), Work(settings, _SHARD_BYTES, workers=1)


def _contents(
    raw_sources: Sequence[RawSource], hashes: Mapping[str, str]
) -> dict[str, list[tuple[str, str | None, str]]]:
    """What a source is made of, for cache keys."""
    return {
        raw.name: [(file.name, file.split, hashes[file.name]) for file in raw.files] for raw in raw_sources
    }


def _check_fits(tokenizer: Tokenizer, vocab_limit: int | None) -> None:
    if vocab_limit is not None and tokenizer.size > vocab_limit:
        raise DataError(
            f"the tokenizer has {tokenizer.size} ids, sentinels included, but the model's vocabulary only "
            f"{vocab_limit} rows"
        )


def _key(*parts: object) -> str:
    return hashlib.sha256(json.dumps([_FORMAT, *parts]).encode()).hexdigest()[:32]


def _tokenizer(
    config: DataConfig, raw_sources: Sequence[RawSource], contents: object, cache: Path, work: Work
) -> Tokenizer:
    if config.tokenizer.path is not None:
        return load_tokenizer(config.tokenizer.path)
    key = _key("tokenizer", contents, work.encode.identity(), config.tokenizer.model_dump())

    def train(folder: Path) -> None:
        print(f"training a tokenizer of {config.tokenizer.vocab_size} pieces", file=sys.stderr, flush=True)
        (folder / TOKENIZER).write_bytes(train_on(raw_sources, config.tokenizer, work.encode).model)

    return load_tokenizer(str(build_once(cache / f"tokenizer-{key}", train) / TOKENIZER))
