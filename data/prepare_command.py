"""What the command `prepare` does with its page of configuration."""

import errno
import fcntl
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openmoe.data.build import SKIPPED, UNFINISHED, Work, build, train_on
from openmoe.data.encode import EncodeSettings
from openmoe.data.errors import DataError
from openmoe.data.prepare_config import InputConfig, PrepareConfig
from openmoe.data.raw import RawSource, dataset_source, file_hashes, folder_files, folder_sources
from openmoe.data.readers import DatasetName, file_suffix
from openmoe.data.shards import MANIFEST, TOKENIZER, is_prepared, read_manifest, replace_file, verify
from openmoe.data.tokenizer import Tokenizer, load_tokenizer

_LOCK = ".lock"
_SOURCE_NAME = r"[A-Za-z0-9][A-Za-z0-9_.\-]{0,127}"  # what a mix can name


def prepare_folder(config: PrepareConfig) -> None:
    """Bring data.output up to data.input, verify it where asked, and say on stdout what it holds.

    Raises DataError for anything wrong with input, output or tokenizer, OSError where the disk is.
    """
    output = Path(config.data.output)
    if config.data.input is not None:
        with _sole_writer(output):
            _bring_up(config, config.data.input, output)
    manifest = read_manifest(output)
    _print_summary(output, manifest)
    if config.data.verify:
        if load_tokenizer(str(output / TOKENIZER), "data.output").sha256 != manifest["tokenizer"]["sha256"]:
            raise DataError(f"{output / TOKENIZER} has changed: its sha256 is not the manifest's")
        files = sum(1 for _ in verify(output))
        print(f"{files:,} files of tokens and the tokenizer have the sha256 that the manifest says")


def _bring_up(config: PrepareConfig, text_input: str, output: Path) -> None:
    data = config.data
    settings = EncodeSettings(data.text_field, data.validation_fraction, data.on_corrupt)
    manifest = read_manifest(output) if is_prepared(output) else None
    sources = _sources(data, text_input, output)
    for source in sources:
        if not re.fullmatch(_SOURCE_NAME, source.name) or source.name in (MANIFEST, TOKENIZER):
            raise DataError(
                f"source {source.name!r} can't be named so; allowed are letters, digits and _ . - after a "
                "first letter or digit"
            )
    if manifest is not None:
        _check_continues(manifest, data, sources)
    _say(f"checking {sum(len(source.files) for source in sources):,} files")
    hashes = file_hashes(sources, data.workers)
    tokenizer = _tokenizer(config, output, manifest, sources, hashes, settings)
    build(output, sources, hashes, tokenizer, Work(settings, data.shard_bytes, data.workers))


def _sources(data: InputConfig, text_input: str, output: Path) -> list[RawSource]:
    if not os.path.isdir(text_input):
        if data.sources is not None:
            raise DataError(f"data.sources={data.sources} with data.input={text_input}, which is no folder")
        if text_input.startswith((os.sep, ".")):
            raise DataError(f"data.input={text_input} is not a folder")
        return [dataset_source(DatasetName(text_input, data.dataset_config, data.dataset_split))]
    folder = Path(text_input).resolve()
    if folder == output.resolve() or folder in output.resolve().parents:
        raise DataError(f"data.output={output} lies in data.input={text_input}: it would be a source itself")
    sources = folder_sources(text_input, data.sources, "data.input")
    for source in sources:
        others = [path for path in folder_files(Path(text_input) / source.name) if not file_suffix(path)]
        if others:
            _say(f"{source.name}: {len(others):,} files are not of a kind that is read, e.g. {others[0]}")
    return sources


def _check_continues(manifest: dict[str, Any], data: InputConfig, sources: Sequence[RawSource]) -> None:
    if manifest["validation_fraction"] != data.validation_fraction:
        raise DataError(
            f"data.validation_fraction={data.validation_fraction}, but data.output={data.output} was made "
            f"with {manifest['validation_fraction']}; give the same, or choose another data.output"
        )
    if data.sources is None:
        here = {source.name for source in sources}
        for name, entry in manifest["sources"].items():
            if entry["input"] == sources[0].origin and name not in here:
                raise DataError(
                    f"source {name!r} of data.output={data.output} is gone from data.input={data.input}; "
                    "put it back, name the others in data.sources, or choose another data.output"
                )


def _tokenizer(
    config: PrepareConfig,
    output: Path,
    manifest: dict[str, Any] | None,
    sources: Sequence[RawSource],
    hashes: Mapping[str, str],
    settings: EncodeSettings,
) -> Tokenizer:
    path = config.tokenizer.path
    given = load_tokenizer(path, "tokenizer.path") if path is not None else None
    if manifest is not None:
        if given is not None and given.sha256 != manifest["tokenizer"]["sha256"]:
            raise DataError(
                f"tokenizer.path={path} is another tokenizer than the one data.output={output} was prepared "
                "with; leave it null, or choose another data.output"
            )
        return load_tokenizer(str(output / TOKENIZER), "data.output")
    if given is not None:
        return given
    # Trained once: a run that goes on needs the very same one.
    what = [hashes, config.tokenizer.model_dump(), settings.identity()]
    key = hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:32]
    trained = output / UNFINISHED / f"{key}.model"
    if not trained.exists():
        _say(f"training a tokenizer of {config.tokenizer.vocab_size} pieces")
        trained.parent.mkdir(exist_ok=True)
        replace_file(trained, train_on(sources, config.tokenizer, settings).model)
    return load_tokenizer(str(trained), "data.output")


@contextmanager
def _sole_writer(output: Path) -> Iterator[None]:
    """Makes the folder and holds it. The lock goes with the process, however it ends."""
    try:
        if (
            output.is_dir()
            and not is_prepared(output)
            and not (output / _LOCK).exists()
            and os.listdir(output)
        ):
            raise DataError(f"data.output={output} holds other files; give a new folder or a prepared one")
        output.mkdir(parents=True, exist_ok=True)
        lock = os.open(output / _LOCK, os.O_CREAT | os.O_RDWR, 0o644)
    except (OSError, ValueError) as error:
        if isinstance(error, DataError) or getattr(error, "errno", None) == errno.ENOSPC:
            raise
        raise DataError(f"data.output={output} can't be written: {error}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise DataError(f"data.output={output}: another process is preparing data there") from None
    else:
        yield
    finally:
        os.close(lock)


def _print_summary(output: Path, manifest: dict[str, Any]) -> None:
    for name, source in manifest["sources"].items():
        train, valid, parts = source["train"], source["valid"], source["parts"]
        print(
            f"{name}: {train['tokens']:,} tokens in {train['documents']:,} documents, held back "
            f"{valid['tokens']:,} in {valid['documents']:,}; "
            f"{sum(part['empty_documents'] for part in parts):,} empty documents left out"
        )
        for number, part in enumerate(parts):
            if part["skipped_records"]:
                listed = output / name / f"part_{number:04}" / SKIPPED
                print(f"{name}: {part['skipped_records']:,} corrupt records skipped, listed in {listed}")
    tokens = sum(source["train"]["tokens"] for source in manifest["sources"].values())
    print(f"{output}: {tokens:,} tokens to train on, tokenizer of {manifest['tokenizer']['size']:,} ids")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
