"""One task of preparation: read documents, split and tokenise them, write a shard, return the receipt."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from openmoe.data.held_back import Document, split_documents
from openmoe.data.readers import OnCorrupt, Reading, read_documents
from openmoe.data.shards import SPLITS, ShardWriter, Split, part_folder, shard_files
from openmoe.data.tasks import Task
from openmoe.data.tokenizer import Tokenizer

# Documents, and about the characters, handed to the tokenizer at once.
_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class EncodeSettings:
    """What a shard depends on beside its raw text and the tokenizer."""

    text_field: str
    validation_fraction: float
    on_corrupt: OnCorrupt
    # Threads of the tokenizer: no matter for the result.
    threads: int = 1

    def identity(self) -> list[object]:
        return [self.text_field, self.validation_fraction]


@dataclass(frozen=True)
class Receipt:
    """What a finished task leaves beside its shard."""

    identity: str
    raw: list[list[str | int | None]]
    # Manifest entries of the two splits.
    shard: dict[str, dict[str, int | str]]
    empty_documents: int
    # Place and reason of each corrupt record.
    skipped: list[str]


# Share of the task that is done, and tokens written so far.
Progress = Callable[[float, int], None]


class Encoder:
    """Writes the shards of tasks to a folder. One lives in each worker."""

    def __init__(self, tokenizer: Tokenizer, settings: EncodeSettings, folder: Path) -> None:
        self._tokenizer = tokenizer
        self._settings = settings
        self._folder = folder

    def run(self, task: Task, progress: Progress) -> Receipt:
        """Write one shard. Raises DataError for a corrupt record, unless they are to be skipped."""
        folder = part_folder(self._folder, task.source, task.part)
        folder.mkdir(parents=True, exist_ok=True)
        reading = TaskReading(task, self._settings)
        documents = split_documents(
            reading.documents(), self._settings.validation_fraction, task.part == task.number == 0
        )
        writers = {split: ShardWriter(shard_files(folder, task.number, split)) for split in SPLITS}
        try:
            while batch := take_batch(documents):
                texts = [text for _, text in batch]
                encoded = self._tokenizer.encode_arrays(texts, self._settings.threads)
                for split, writer in writers.items():
                    chosen = [ids for (place, _), ids in zip(batch, encoded, strict=True) if place == split]
                    reading.empty_documents += writer.add(chosen)
                progress(reading.share, sum(writer.tokens for writer in writers.values()))
            return Receipt(
                identity=task.identity(self._tokenizer.sha256, *self._settings.identity()),
                raw=task.raw(),
                shard={split: writer.close() for split, writer in writers.items()},
                empty_documents=reading.empty_documents,
                skipped=reading.skipped,
            )
        finally:
            for writer in writers.values():
                writer.discard()


def take_batch(documents: Iterator[tuple[Split, str]]) -> list[tuple[Split, str]]:
    """The next documents for one call of the tokenizer; none at the end."""
    batch = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document[1])
        if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
            break
    return batch


class TaskReading:
    """The documents of one task, and what was met on the way."""

    def __init__(self, task: Task, settings: EncodeSettings) -> None:
        self._task = task
        self._settings = settings
        self._done_weight = 0.0
        self._current: tuple[Reading, float] | None = None
        self.skipped: list[str] = []
        self.empty_documents = 0

    def documents(self) -> Iterator[Document]:
        for piece in self._task.pieces:
            reading = Reading(self._settings.on_corrupt)
            self._current = reading, piece.weight
            for text in read_documents(piece.source, self._settings.text_field, reading):
                self.empty_documents += not text
                yield piece.split, text
            self._current = None
            self._done_weight += piece.weight
            self.skipped += reading.skipped

    @property
    def share(self) -> float:
        """Of the task that has been read."""
        done = self._done_weight
        if self._current is not None:
            reading, weight = self._current
            done += min(1.0, reading.share) * weight
        return done / max(1.0, self._task.weight)
