"""Preparation against the tokenizer alone: `python benchmarks/prepare.py`, about a minute.

The tokenizer alone is `SentencePieceProcessor.encode` on documents that lie in memory, in batches, one
thread. Preparation is all that one worker does for the same documents: it hashes the raw file, reads and
parses it, splits off held-back text, tokenises, and writes and hashes the shards. Both take turns in one
process; the ratio is the median of the rounds, once of wall time and once of processor time, which other work
on the machine disturbs less but which leaves out waiting for the disk. Real text from OPENMOE_DATA (default
../shared/data).
"""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any, NamedTuple

import sentencepiece

from openmoe.data.encode import Encoder, EncodeSettings
from openmoe.data.raw import file_hashes, folder_sources
from openmoe.data.tasks import cut_tasks
from openmoe.data.tokenizer import load_tokenizer

SOURCES = (
    "arxiv",
    "books",
    "c4",
    "commoncrawl",
    "stack_c",
    "stack_python",
    "stackexchange",
    "wikipedia_en",
    "wikipedia_multi",
)
MODELS = {
    "bpe, 32,768 pieces": "mistral-v3_tokenizer.model",
    "unigram, 32,768 pieces": "maxtext_default_tokenizer.model",
}
BATCH_DOCUMENTS = 256
SHARD_BYTES = 2**26  # the default
SECONDS_PER_MODEL = 25.0


def write_raw_text(data: Path, root: Path) -> list[str]:
    """One jsonl file of all sources; returns its documents."""
    lines = [
        line
        for name in SOURCES
        for path in sorted((data / name / "train").glob("*.jsonl"))
        for line in path.open("rb")
    ]
    lines = lines[::2]  # several rounds in a minute
    (root / "mixed").mkdir(parents=True)
    (root / "mixed" / "text.jsonl").write_bytes(b"".join(lines))
    return [json.loads(line)["text"] for line in lines]


class Seconds(NamedTuple):
    wall: float
    processor: float


def timed(work: Callable[..., None], *arguments: Any) -> Seconds:
    wall, processor = perf_counter(), process_time()
    work(*arguments)
    return Seconds(perf_counter() - wall, process_time() - processor)


def tokenizer_alone(processor: sentencepiece.SentencePieceProcessor, documents: list[str]) -> None:
    for first in range(0, len(documents), BATCH_DOCUMENTS):
        processor.encode(documents[first : first + BATCH_DOCUMENTS], num_threads=1)


def preparation(encoder: Encoder, root: Path) -> None:
    sources = folder_sources(str(root), None)
    for task in cut_tasks("mixed", 0, sources[0].files, file_hashes(sources, 1), SHARD_BYTES):
        encoder.run(task, lambda share, tokens: None)


def main() -> None:
    data = Path(os.environ.get("OPENMOE_DATA", Path(__file__).parents[1] / "../shared/data"))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "raw"
        documents = write_raw_text(data, root)
        megabytes = sum(len(text.encode()) for text in documents) / 1e6
        print(f"{len(documents):,} documents, {megabytes:.1f} MB of text, one thread")
        for name, file in MODELS.items():
            path = data / "tokenizers" / file
            processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
            settings = EncodeSettings("text", 0.05, "stop")
            encoder = Encoder(load_tokenizer(str(path)), settings, Path(folder) / "out")
            rounds: list[tuple[Seconds, Seconds]] = []
            begin = perf_counter()
            while perf_counter() - begin < SECONDS_PER_MODEL:
                alone = timed(tokenizer_alone, processor, documents)
                rounds.append((alone, timed(preparation, encoder, root)))
            wall = [alone.wall / prepared.wall for alone, prepared in rounds]
            busy = [alone.processor / prepared.processor for alone, prepared in rounds]
            speeds = [megabytes / median(each[i].processor for each in rounds) for i in (0, 1)]
            print(
                f"{name}: tokenizer {speeds[0]:.2f} MB/s, preparation {speeds[1]:.2f} MB/s; ratio of wall "
                f"time {median(wall):.3f} ({min(wall):.2f} to {max(wall):.2f}), of processor time "
                f"{median(busy):.3f} ({min(busy):.2f} to {max(busy):.2f}), {len(rounds)} rounds"
            )


if __name__ == "__main__":
    main()
