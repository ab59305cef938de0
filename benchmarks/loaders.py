"""The loaders that the benchmark compares, each as an endless iterator of batches of tensors."""

import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks import ul2_one_by_one
from benchmarks.corpus import RATES, SEED, SEQ_LEN, Corpus
from openmoe.data.config import DataConfig, PhaseConfig
from openmoe.data.loader import Loader
from openmoe.data.tokenizer import EOS

Tensors = dict[str, torch.Tensor]
# Rows of the dense packing are longer, and hold examples of SEQ_LEN positions.
DENSE_SEQ_LEN = 16 * SEQ_LEN


class Batch(NamedTuple):
    """Tensors [rows, row length], and how many of their positions are what."""

    tensors: Tensors
    positions: int
    # Tokens of the corpus that were read for it.
    text_tokens: int
    nonpad_tokens: int
    loss_tokens: int


# Corpus and rows of SEQ_LEN a batch -> batches.
OpenLoader = Callable[[Corpus, int], Iterator[Batch]]


class Contender(NamedTuple):
    name: str
    # Which of the two tables it belongs to.
    objective: str
    open: OpenLoader
    # Writes the files it reads, which is no part of opening.
    write: Callable[[Corpus], None] | None = None
    # What has to be installed, as it is imported and as `pip install` calls it.
    imports: str | None = None
    package: str | None = None


def _ours(objective: str, packing: str, seq_len: int, corpus: Corpus, rows: int) -> Iterator[Batch]:
    loader = Loader(
        corpus.prepared(),
        [PhaseConfig.model_validate({"mix": RATES, "objective": objective})],
        DataConfig.model_validate(
            {"workers": 0, "repetition": "allow", "packing": packing, "example_tokens": SEQ_LEN}
        ),
        seq_len,
        rows * SEQ_LEN // seq_len,
        SEED,
    )
    for step in loader:
        tensors = {name: torch.as_tensor(array) for name, array in step.arrays.items()}
        text_tokens = sum(step.source_text_tokens.values())
        yield Batch(tensors, step.positions, text_tokens, step.nonpad_tokens, step.loss_tokens)


def _ours_causal(corpus: Corpus, rows: int) -> Iterator[Batch]:
    return _ours("causal_lm", "released", SEQ_LEN, corpus, rows)


def _ours_ul2(corpus: Corpus, rows: int) -> Iterator[Batch]:
    return _ours("ul2", "released", SEQ_LEN, corpus, rows)


def _ours_ul2_dense(corpus: Corpus, rows: int) -> Iterator[Batch]:
    return _ours("ul2", "dense", DENSE_SEQ_LEN, corpus, rows)


def _causal_batch(targets: np.ndarray) -> Batch:
    """The collation all others share: rows int32 [rows, SEQ_LEN], one segment each, loss everywhere."""
    targets = np.ascontiguousarray(targets, np.int32)
    inputs = np.zeros_like(targets)
    inputs[:, 1:] = targets[:, :-1]
    arrays = {
        "input_tokens": inputs,
        "target_tokens": targets,
        "loss_weights": np.ones(targets.shape, np.float32),
        "segment_ids": np.ones(targets.shape, np.int32),
    }
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Batch(tensors, targets.size, targets.size, targets.size, targets.size)


def _datasets_module() -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets


def _write_parquet(corpus: Corpus) -> None:
    for name in RATES:
        corpus.parquet(name)


def _write_arrow(corpus: Corpus) -> None:
    _arrow(_datasets_module(), corpus)


def _datasets_streaming(corpus: Corpus, rows: int) -> Iterator[Batch]:
    datasets = _datasets_module()
    parts = [
        datasets.load_dataset("parquet", data_files=str(corpus.parquet(name)), split="train", streaming=True)
        for name in RATES
    ]
    yield from _interleaved(datasets, parts, rows)


def _datasets_arrow_streaming(corpus: Corpus, rows: int) -> Iterator[Batch]:
    datasets = _datasets_module()
    yield from _interleaved(datasets, [p.to_iterable_dataset() for p in _arrow(datasets, corpus)], rows)


def _interleaved(datasets: Any, parts: list[Any], rows: int) -> Iterator[Batch]:
    endless = [part.repeat(None) for part in parts]
    mixed = datasets.interleave_datasets(endless, probabilities=list(RATES.values()), seed=SEED)
    for batch in mixed.with_format("numpy").iter(batch_size=rows):
        yield _causal_batch(batch["tokens"])


def _datasets_arrow_map(corpus: Corpus, rows: int) -> Iterator[Batch]:
    datasets = _datasets_module()
    mixed = datasets.interleave_datasets(
        [part.shuffle(seed=SEED) for part in _arrow(datasets, corpus)],
        probabilities=list(RATES.values()),
        seed=SEED,
        stopping_strategy="all_exhausted",
    ).with_format("numpy")
    while True:
        for batch in mixed.iter(batch_size=rows, drop_last_batch=True):
            yield _causal_batch(batch["tokens"])


def _arrow(datasets: Any, corpus: Corpus) -> list[Any]:
    """The rows as memory-mapped Arrow files."""
    cache = str(corpus.folder / "arrow")
    return [datasets.Dataset.from_parquet(str(corpus.parquet(name)), cache_dir=cache) for name in RATES]


def _write_megatron(corpus: Corpus) -> None:
    for name in RATES:
        corpus.megatron(name)


class _MegatronTokenizer:
    """What GPTDataset asks of a tokenizer."""

    vocab_size, eod, pad = 100_000, EOS, 0
    unique_identifiers = {"class": "none"}  # noqa: RUF012


def _megatron(corpus: Corpus, rows: int) -> Iterator[Batch]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.blended_megatron_dataset_builder import (  # type: ignore[import-not-found]
            BlendedMegatronDatasetBuilder,
        )
        from megatron.core.datasets.gpt_dataset import (  # type: ignore[import-not-found]
            GPTDataset,
            GPTDatasetConfig,
        )
    if not torch.distributed.is_initialized():
        # The blend asks for its rank even on one process.
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    config = GPTDatasetConfig(
        random_seed=SEED + 1,
        sequence_length=SEQ_LEN,
        blend=([str(corpus.megatron(name)) for name in RATES], list(RATES.values())),
        split="1,0,0",
        path_to_cache=str(corpus.folder / "megatron_cache"),
        tokenizer=_MegatronTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    # One epoch, again and again: its index has to be built for the length of the run.
    samples = corpus.tokens // SEQ_LEN
    dataset = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()[0]
    while True:
        for first in range(0, samples - rows + 1, rows):
            batch = torch.utils.data.default_collate([dataset[first + row] for row in range(rows)])
            batch["segment_ids"] = torch.ones_like(batch["tokens"])
            yield Batch(batch, *[batch["tokens"].numel()] * 4)


class _GrainRows:
    """Rows cut from the tokens of a source without regard to its documents."""

    def __init__(self, tokens: np.ndarray) -> None:
        self._tokens = tokens

    def __len__(self) -> int:
        return len(self._tokens) // SEQ_LEN

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"tokens": self._tokens[index * SEQ_LEN : (index + 1) * SEQ_LEN]}


class _GrainDocuments:
    """Documents of a source, each with its EOS."""

    def __init__(self, tokens: np.ndarray, offsets: np.ndarray) -> None:
        self._tokens, self._offsets = tokens, offsets

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        document = self._tokens[self._offsets[index] : self._offsets[index + 1]]
        return {"tokens": np.append(document, np.int32(EOS))}


def _grain_module() -> Any:
    logging.getLogger("absl").setLevel(logging.ERROR)
    import grain  # type: ignore[import-not-found]
    import grain.experimental  # type: ignore[import-not-found]

    return grain


def _grain_rows(corpus: Corpus, rows: int) -> Iterator[Batch]:
    grain = _grain_module()
    parts = [
        grain.MapDataset.source(_GrainRows(corpus.documents(name)[0])).shuffle(seed=index).repeat()
        for index, name in enumerate(RATES)
    ]
    mixed = grain.MapDataset.mix(parts, weights=list(RATES.values())).batch(rows)
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=1)
    for batch in mixed.to_iter_dataset(options):
        yield _causal_batch(batch["tokens"])


def _grain_documents(corpus: Corpus, rows: int) -> Iterator[Batch]:
    grain = _grain_module()
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=1)
    parts = []
    for index, name in enumerate(RATES):
        documents = grain.MapDataset.source(_GrainDocuments(*corpus.documents(name)))
        stream = documents.shuffle(seed=index).repeat().to_iter_dataset(options)
        cut = grain.experimental.ConcatThenSplitIterDataset(stream, length_struct={"tokens": SEQ_LEN})
        parts.append(cut)
    for batch in grain.IterDataset.mix(parts, weights=list(RATES.values())).batch(rows):
        yield _causal_batch(batch["tokens"])


def _ul2_one_by_one(corpus: Corpus, rows: int) -> Iterator[Batch]:
    for arrays, *counts in ul2_one_by_one.batches(corpus, corpus.prepared().tokenizer, rows):
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        yield Batch(tensors, rows * SEQ_LEN, *counts)


CONTENDERS = (
    Contender("openmoe", "causal_lm", _ours_causal),
    Contender(
        "datasets, streamed parquet", "causal_lm", _datasets_streaming, _write_parquet, "datasets", "datasets"
    ),
    Contender(
        "datasets, streamed arrow",
        "causal_lm",
        _datasets_arrow_streaming,
        _write_arrow,
        "datasets",
        "datasets",
    ),
    Contender(
        "datasets, mapped arrow", "causal_lm", _datasets_arrow_map, _write_arrow, "datasets", "datasets"
    ),
    Contender("megatron-core", "causal_lm", _megatron, _write_megatron, "megatron.core", "megatron-core"),
    Contender("grain, ready-cut rows", "causal_lm", _grain_rows, None, "grain", "grain"),
    Contender("grain, documents", "causal_lm", _grain_documents, None, "grain", "grain"),
    Contender("openmoe, released packing", "ul2", _ours_ul2),
    Contender("openmoe, dense packing", "ul2", _ours_ul2_dense),
    Contender("numpy, one by one", "ul2", _ul2_one_by_one),
)
