"""A small made-up corpus, prepared once for all tests of this room."""

import json
import random
from pathlib import Path

import pytest

from openmoe.data.config import DataConfig, TokenizerConfig
from openmoe.data.prepare import PreparedData, prepare

TOKENIZER = TokenizerConfig(vocab_size=512, sample_bytes_per_source=50_000)


def write_source(folder: Path, documents: list[str], name: str = "part.jsonl") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


def made_up_documents(seed: int, documents: int, words: int) -> list[str]:
    draw = random.Random(seed)
    vocabulary = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 7))) for _ in range(80)]
    return [
        " ".join(draw.choice(vocabulary) for _ in range(draw.randint(words // 4, words)))
        for _ in range(documents)
    ]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources: many short documents, some middling ones, a few long ones."""
    root = tmp_path_factory.mktemp("corpus")
    write_source(root / "short", made_up_documents(1, 150, 40))
    write_source(root / "middle", made_up_documents(2, 40, 200))
    write_source(root / "long", made_up_documents(3, 8, 2000))
    return root


@pytest.fixture(scope="session")
def config(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    return DataConfig(
        root=str(corpus),
        cache_dir=str(tmp_path_factory.mktemp("cache")),
        workers=0,
        validation_fraction=0.1,
        tokenizer=TOKENIZER,
        document_chunk_tokens=400,
    )


@pytest.fixture(scope="session")
def prepared(config: DataConfig) -> PreparedData:
    return prepare(config)
