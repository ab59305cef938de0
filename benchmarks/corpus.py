"""The synthetic corpus of the loading benchmark, in the form that each loader wants.

Three sources of random tokens, documents of log-normal length around 1000 tokens. Every form holds the same
documents in the same order; what a loader would be given ready-made (rows cut, EOS put in) is so given here.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from openmoe.data.config import TokenizerConfig
from openmoe.data.prepare import PreparedData
from openmoe.data.shards import PreparedSource, TokenShard, count_blocks
from openmoe.data.tokenizer import EOS, SENTINELS, Tokenizer, train_tokenizer

SEQ_LEN = 2048
# Rate of each source in the mix, and its share of the corpus.
RATES = {"web": 0.5, "code": 0.3, "books": 0.2}
SEED = 0

_MEAN_DOCUMENT_TOKENS = 1000
# Documents written at once, so that writing takes little memory.
_CHUNK_DOCUMENTS = 20_000


@dataclass(frozen=True)
class Corpus:
    """Where the forms lie. `tokens` are those of all sources, without EOS."""

    folder: Path
    tokens: int

    def documents(self, source: str) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int32 [tokens] and offsets int64 [documents + 1] of a source, memory-mapped."""
        return (
            np.asarray(np.memmap(self.folder / f"{source}_tokens.bin", np.int32, "r")),
            np.asarray(np.memmap(self.folder / f"{source}_offsets.bin", np.int64, "r")),
        )

    def prepared(self) -> PreparedData:
        """As our own loader opens it."""
        sources = {}
        for name in RATES:
            tokens, offsets = self.documents(name)
            blocks_path = self.folder / f"{name}_blocks.bin"
            if not blocks_path.exists():
                count_blocks(np.diff(offsets)).tofile(blocks_path)
            shard = TokenShard(
                self.folder / f"{name}_tokens.bin",
                self.folder / f"{name}_offsets.bin",
                blocks_path,
                len(offsets) - 1,
                len(tokens),
            )
            parts = ((shard,),)
            sources[name] = PreparedSource(name, {"train": parts, "valid": parts}, ("synthetic",))
        return PreparedData(_tokenizer(), sources)

    def joined(self, source: str) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Documents with an EOS after each, some at a time: tokens int32 [n], lengths [documents]."""
        tokens, offsets = self.documents(source)
        for first in range(0, len(offsets) - 1, _CHUNK_DOCUMENTS):
            bounds = np.asarray(offsets[first : first + _CHUNK_DOCUMENTS + 1])
            ends = bounds[1:] - bounds[0]
            yield np.insert(tokens[bounds[0] : bounds[-1]], ends, EOS), np.diff(bounds) + 1

    def parquet(self, source: str) -> Path:
        """Rows of SEQ_LEN tokens of the joined documents; plain and uncompressed, which reads fastest."""
        path = self.folder / f"{source}_rows.parquet"
        if not path.exists():
            import pyarrow as pa
            import pyarrow.parquet as pq

            schema = pa.schema([("tokens", pa.list_(pa.int32(), SEQ_LEN))])
            left = np.empty(0, np.int32)
            fresh = path.with_suffix(".new")
            with pq.ParquetWriter(fresh, schema, use_dictionary=False, compression="none") as writer:
                for tokens, _ in self.joined(source):
                    left = np.concatenate([left, tokens])
                    whole = len(left) // SEQ_LEN * SEQ_LEN
                    rows = pa.FixedSizeListArray.from_arrays(pa.array(left[:whole]), SEQ_LEN)
                    writer.write_table(pa.table([rows], schema=schema), row_group_size=1024)
                    left = left[whole:]
            fresh.rename(path)
        return path

    def megatron(self, source: str) -> Path:
        """Prefix of an IndexedDataset of the joined documents."""
        prefix = self.folder / f"{source}_megatron"
        if not prefix.with_suffix(".idx").exists():
            import torch
            from megatron.core.datasets.indexed_dataset import (  # type: ignore[import-not-found]
                IndexedDatasetBuilder,
            )

            builder = IndexedDatasetBuilder(str(prefix.with_suffix(".bin")), dtype=np.int32)
            for tokens, lengths in self.joined(source):
                builder.add_document(torch.from_numpy(tokens), lengths.tolist())
            builder.finalize(str(prefix.with_suffix(".idx")))
        return prefix


def write_corpus(folder: Path, tokens: int) -> Corpus:
    """The corpus of about `tokens` tokens in `folder`; what is already there is kept."""
    folder.mkdir(parents=True, exist_ok=True)
    largest_id = _tokenizer().size - SENTINELS
    for index, (source, share) in enumerate(RATES.items()):
        random = np.random.default_rng([SEED, index])
        documents = max(1, round(tokens * share / _MEAN_DOCUMENT_TOKENS))
        offsets_path = folder / f"{source}_offsets.bin"
        if offsets_path.exists():
            continue
        # The mean of a log-normal is exp(mu + sigma^2 / 2).
        lengths = random.lognormal(np.log(_MEAN_DOCUMENT_TOKENS) - 0.5, 1.0, documents).astype(np.int64)
        lengths = np.clip(lengths, 1, 65_536)
        with (folder / f"{source}_tokens.bin").open("wb") as file:
            for first in range(0, documents, _CHUNK_DOCUMENTS):
                count = int(lengths[first : first + _CHUNK_DOCUMENTS].sum())
                random.integers(3, largest_id, count, np.int32).tofile(file)
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64).tofile(offsets_path)
    return Corpus(folder, tokens)


def _tokenizer() -> Tokenizer:
    """Some tokenizer: only its mode strings and sentinels are used."""
    text = Path(__file__).read_text()
    return train_tokenizer([text], TokenizerConfig(vocab_size=512))
