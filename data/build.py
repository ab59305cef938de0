"""Fills a prepared folder: works out what is new, runs the tasks that are not done yet, publishes the result.

    FOLDER/.unfinished/SOURCE/PART/SHARD.json   receipt of a finished task

A shard counts for a continued run once it has its receipt, and for a reader once the manifest names it. The
manifest is replaced in one step at the very end, so a reader sees all of a part or nothing.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from openmoe.data.config import TokenizerConfig
from openmoe.data.encode import EncodeSettings, Receipt
from openmoe.data.errors import DataError
from openmoe.data.held_back import hash_place, split_documents
from openmoe.data.pool import run_tasks
from openmoe.data.progress import PrepareProgress
from openmoe.data.raw import RawFile, RawSource
from openmoe.data.shards import (
    SPLITS,
    TOKENIZER,
    is_prepared,
    open_shard,
    part_folder,
    read_manifest,
    replace_file,
    shard_files,
    sync_path,
    write_manifest,
)
from openmoe.data.tasks import Task, cut_tasks
from openmoe.data.tokenizer import Tokenizer, train_tokenizer

UNFINISHED = ".unfinished"
# In a part's folder: the records that were skipped.
SKIPPED = "skipped.txt"


@dataclass(frozen=True)
class Work:
    """How to do it. The number of workers never changes the result."""

    encode: EncodeSettings
    shard_bytes: int
    workers: int


@dataclass(frozen=True)
class _NewPart:
    """Files of a source that are not in the folder yet."""

    source: RawSource
    number: int
    files: list[RawFile]
    tasks: list[Task]


def build(
    folder: Path, sources: Sequence[RawSource], hashes: Mapping[str, str], tokenizer: Tokenizer, work: Work
) -> dict[str, Any]:
    """Bring the prepared folder up to `sources`, going on from what an earlier run finished; its manifest.

    `hashes` is the sha256 of each file by name. Raises DataError for bad text, for a source without text, and
    where a file that the folder was made from has changed or gone.
    """
    manifest: dict[str, Any] = read_manifest(folder) if is_prepared(folder) else {"sources": {}}
    entries = manifest["sources"]
    parts = [_new_part(source, entries.get(source.name), hashes, work.shard_bytes) for source in sources]
    parts = [part for part in parts if part.files]
    _check_apart(parts, entries, hashes)
    receipts = _run(folder, [task for part in parts for task in part.tasks], tokenizer, work)
    for part in parts:
        _check_unchanged(part.files)
        entry = entries.setdefault(part.source.name, {"input": part.source.origin, "parts": []})
        entry["parts"].append(_part_entry(part, hashes, [receipts[task.name] for task in part.tasks]))
        _check_has_text(part.source.name, entry["parts"])
    if parts:
        for part in parts:
            _tidy(part_folder(folder, part.source.name, part.number), part, receipts)
        replace_file(folder / TOKENIZER, tokenizer.model)
        manifest = {
            "tokenizer": {"sha256": tokenizer.sha256, "size": tokenizer.size},
            "validation_fraction": work.encode.validation_fraction,
            "sources": {name: _with_totals(entries[name]) for name in sorted(entries)},
        }
        write_manifest(folder, manifest)
    shutil.rmtree(folder / UNFINISHED, ignore_errors=True)
    return manifest


def _new_part(
    source: RawSource, entry: dict[str, Any] | None, hashes: Mapping[str, str], shard_bytes: int
) -> _NewPart:
    """What the folder lacks of a source. Raises DataError where it has something that the source lacks."""
    entry = entry or {"input": source.origin, "parts": []}
    if entry["input"] != source.origin:
        raise DataError(
            f"source {source.name!r} was prepared from {entry['input']}, not from {source.origin}; choose "
            "another data.output"
        )
    known = {file["name"]: file["sha256"] for part in entry["parts"] for file in part["inputs"]}
    here = {file.name for file in source.files}
    for name, sha256 in known.items():
        if name not in here or hashes[name] != sha256:
            what = "has changed" if name in here else "is gone"
            raise DataError(
                f"{name} {what} since it was prepared; put it back as it was, or choose another data.output"
            )
    files = [file for file in source.files if file.name not in known]
    number = len(entry["parts"])
    return _NewPart(source, number, files, cut_tasks(source.name, number, files, hashes, shard_bytes))


def _check_apart(
    parts: Sequence[_NewPart], entries: Mapping[str, dict[str, Any]], hashes: Mapping[str, str]
) -> None:
    """Raises DataError where new text is in the folder already, as another source's."""
    known = {
        file["sha256"]: (name, file["name"])
        for name, entry in entries.items()
        for part in entry["parts"]
        for file in part["inputs"]
        if file["bytes"]
    }
    for part in parts:
        for file in part.files:
            name, other = known.get(hashes[file.name], (part.source.name, file.name))
            if name != part.source.name:
                raise DataError(
                    f"{file.path} has the same content as {other} in data.output: the text would count "
                    f"twice, in {part.source.name} and in {name}; leave it out, or choose another data.output"
                )


def _run(folder: Path, tasks: Sequence[Task], tokenizer: Tokenizer, work: Work) -> dict[str, Receipt]:
    """Receipts of all tasks by name, from earlier runs and from this one."""
    receipts = {}
    for task in tasks:
        receipt = _valid_receipt(folder, task, tokenizer, work.encode)
        if receipt is not None:
            receipts[task.name] = receipt
    missing = [task for task in tasks if task.name not in receipts]
    progress = PrepareProgress(len(missing), sum(task.weight for task in missing))
    finished = run_tasks(missing, tokenizer, work.encode, folder, work.workers, progress.update)
    with closing(progress), closing(finished):
        for task, receipt in finished:
            path = _receipt_path(folder, task)
            path.parent.mkdir(parents=True, exist_ok=True)
            sync_path(part_folder(folder, task.source, task.part))
            replace_file(path, json.dumps(asdict(receipt)).encode())
            receipts[task.name] = receipt
            progress.finish(task, sum(int(entry["tokens"]) for entry in receipt.shard.values()))
    return receipts


def _receipt_path(folder: Path, task: Task) -> Path:
    return folder / UNFINISHED / f"{task.name}.json"


def _valid_receipt(
    folder: Path, task: Task, tokenizer: Tokenizer, settings: EncodeSettings
) -> Receipt | None:
    """The receipt that an earlier run left for the same task, if its shard is there."""
    try:
        receipt = Receipt(**json.loads(_receipt_path(folder, task).read_bytes()))
        part = part_folder(folder, task.source, task.part)
        for split in SPLITS:
            if receipt.shard[split]["documents"]:
                open_shard(shard_files(part, task.number, split), receipt.shard[split])
    except (OSError, ValueError, TypeError, LookupError):
        return None
    same = receipt.identity == task.identity(tokenizer.sha256, *settings.identity())
    return receipt if same and (settings.on_corrupt == "skip" or not receipt.skipped) else None


def _part_entry(part: _NewPart, hashes: Mapping[str, str], receipts: Sequence[Receipt]) -> dict[str, Any]:
    return {
        "empty_documents": sum(receipt.empty_documents for receipt in receipts),
        "skipped_records": sum(len(receipt.skipped) for receipt in receipts),
        "inputs": [
            {"name": file.name, "bytes": file.size_bytes, "sha256": hashes[file.name]} for file in part.files
        ],
        "shards": [{**receipt.shard, "raw": receipt.raw} for receipt in receipts],
    }


def _with_totals(entry: dict[str, Any]) -> dict[str, Any]:
    """The entry of a source with the sums over its parts, and each part with those over its shards."""
    parts = [{**_totals(part["shards"]), **part} for part in entry["parts"]]
    return {"input": entry["input"], **_totals(parts), "parts": parts}


def _totals(of: Iterable[dict[str, Any]]) -> dict[str, Any]:
    of = list(of)
    return {
        split: {count: sum(each[split][count] for each in of) for count in ("documents", "tokens")}
        for split in SPLITS
    }


def _check_unchanged(files: Sequence[RawFile]) -> None:
    for file in files:
        if file.dataset is None and file.path.stat().st_size != file.size_bytes:
            raise DataError(f"{file.path} has changed while it was read; start again when it is finished")


def _check_has_text(name: str, parts: Sequence[dict[str, Any]]) -> None:
    for split, kind in (("train", "training"), ("valid", "held-back")):
        if not sum(shard[split]["tokens"] for part in parts for shard in part["shards"]):
            raise DataError(f"source {name!r} is empty: it has no {kind} text")


def _tidy(folder: Path, part: _NewPart, receipts: Mapping[str, Receipt]) -> None:
    """Leave in a finished part's folder what belongs there and nothing else; list what was skipped."""
    expected = {
        path
        for task in part.tasks
        for split in SPLITS
        if receipts[task.name].shard[split]["documents"]
        for path in shard_files(folder, task.number, split)
    }
    for path in set(folder.iterdir()) - expected:
        path.unlink()
    skipped = [line for task in part.tasks for line in receipts[task.name].skipped]
    if skipped:
        replace_file(folder / SKIPPED, "".join(f"{line}\n" for line in skipped).encode())


def train_on(sources: Iterable[RawSource], config: TokenizerConfig, settings: EncodeSettings) -> Tokenizer:
    """A tokenizer trained on documents of every source, chosen by hash, up to about the configured size."""
    return train_tokenizer(_sample(sources, config.sample_bytes_per_source, settings), config)


def _sample(sources: Iterable[RawSource], limit_bytes: int, settings: EncodeSettings) -> Iterator[str]:
    for source in sources:
        share = limit_bytes / max(1, source.size_bytes)
        documents = source.documents(settings.text_field, settings.on_corrupt)
        room = 2 * limit_bytes  # where the files are compressed, their size tells little of the text's
        for split, text in split_documents(documents, settings.validation_fraction):
            if split == "train" and hash_place("sample", text) < share:
                yield text
                room -= len(text)
            if room < 0:
                break
