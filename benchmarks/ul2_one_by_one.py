"""The baseline for UL2: the same six denoisers, one example at a time in plain numpy, as in seqio.

Sizes are the released ones for rows of 2048 (facts 5.3): each example takes at most 1024 + 1024 positions.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from benchmarks.corpus import RATES, SEED, SEQ_LEN, Corpus
from openmoe.data.tokenizer import EOS, Tokenizer

_SIDE = SEQ_LEN // 2


class _Denoiser(NamedTuple):
    mode: str
    raw_tokens: int
    # 0 is the prefix language model.
    mean_span: int
    density: float
    rate: float


_DENOISERS = (
    _Denoiser("[NLU] ", 1137, 3, 0.15, 0.1),
    _Denoiser("[NLU] ", 1178, 8, 0.15, 0.1),
    _Denoiser("[NLG] ", 1534, 3, 0.5, 0.1),
    _Denoiser("[NLG] ", 1818, 8, 0.5, 0.1),
    _Denoiser("[NLG] ", 2014, 64, 0.5, 0.1),
    _Denoiser("[S2S] ", 1023, 0, 0.0, 0.5),
)


class Example(NamedTuple):
    inputs: np.ndarray
    targets: np.ndarray
    raw_tokens: int


def _stream(corpus: Corpus, source: str, random: np.random.Generator) -> Iterator[np.ndarray]:
    """The documents of a source in a new order each epoch."""
    tokens, offsets = corpus.documents(source)
    while True:
        for document in random.permutation(len(offsets) - 1):
            yield tokens[offsets[document] : offsets[document + 1]]


def _pieces(items: int, pieces: int, random: np.random.Generator) -> np.ndarray:
    """`items` as a sum of `pieces` random positive lengths: shuffled marks say where each starts."""
    starts = np.zeros(items, np.int64)
    marks = np.arange(items - 1) < pieces - 1
    random.shuffle(marks)
    starts[1:] = marks
    return np.bincount(np.cumsum(starts), minlength=pieces)


def _noise_mask(length: int, denoiser: _Denoiser, random: np.random.Generator) -> np.ndarray:
    noise = round(length * denoiser.density)
    spans = max(1, round(noise / denoiser.mean_span))
    kept_lengths = _pieces(length - noise, spans, random)
    lengths = np.stack([kept_lengths, _pieces(noise, spans, random)], axis=1).ravel()
    starts = np.zeros(length, np.int64)
    starts[np.cumsum(lengths)[:-1]] = 1
    return np.cumsum(starts) % 2 == 1


def _with_sentinels(tokens: np.ndarray, noise: np.ndarray, first_sentinel: int) -> np.ndarray:
    before = np.concatenate([[False], noise[:-1]])
    firsts = noise & ~before
    replaced = np.where(firsts, first_sentinel + 1 - np.cumsum(firsts), tokens)
    return replaced[~(noise & before)].astype(np.int32)


def _end(tokens: np.ndarray) -> np.ndarray:
    return np.append(tokens[: _SIDE - 1], np.int32(EOS))


def examples(corpus: Corpus, tokenizer: Tokenizer) -> Iterator[Example]:
    """Endless examples of the mix."""
    random = np.random.default_rng(SEED)
    modes = [np.array(tokenizer.encode(denoiser.mode), np.int32) for denoiser in _DENOISERS]
    streams = [_stream(corpus, source, random) for source in RATES]
    left = [np.empty(0, np.int32) for _ in RATES]
    rates = [denoiser.rate for denoiser in _DENOISERS]
    while True:
        source = int(random.choice(len(left), p=list(RATES.values())))
        index = int(random.choice(len(_DENOISERS), p=rates))
        denoiser = _DENOISERS[index]
        parts, have = [left[source]], len(left[source])
        while have < denoiser.raw_tokens:
            parts.append(next(streams[source]))
            have += len(parts[-1])
        joined = np.concatenate(parts)
        tokens, left[source] = joined[: denoiser.raw_tokens], joined[denoiser.raw_tokens :]
        if denoiser.mean_span:
            noise = _noise_mask(len(tokens), denoiser, random)
            inputs = _with_sentinels(tokens, noise, tokenizer.first_sentinel)
            targets = _with_sentinels(tokens, ~noise, tokenizer.first_sentinel)
        else:
            prefix = int(random.integers(1, len(tokens)))
            inputs, targets = tokens[:prefix], tokens[prefix:]
        yield Example(_end(np.concatenate([modes[index], inputs])), _end(targets), len(tokens))


class UL2Batch(NamedTuple):
    """Arrays [rows, SEQ_LEN] and what is in them."""

    arrays: dict[str, np.ndarray]
    text_tokens: int
    nonpad_tokens: int
    loss_tokens: int


def batches(corpus: Corpus, tokenizer: Tokenizer, rows: int) -> Iterator[UL2Batch]:
    """Endless batches, packed next-fit."""
    stream = examples(corpus, tokenizer)
    example = next(stream)
    while True:
        inputs = np.zeros((rows, SEQ_LEN), np.int32)
        targets = np.zeros((rows, SEQ_LEN), np.int32)
        weights = np.zeros((rows, SEQ_LEN), np.float32)
        segments = np.zeros((rows, SEQ_LEN), np.int32)
        text = nonpad = loss = 0
        for row in range(rows):
            start, segment = 0, 1
            while start + len(example.inputs) + len(example.targets) <= SEQ_LEN:
                middle = start + len(example.inputs)
                stop = middle + len(example.targets)
                targets[row, start:middle] = example.inputs
                targets[row, middle:stop] = example.targets
                inputs[row, start + 1 : stop] = targets[row, start : stop - 1]
                weights[row, middle:stop] = 1
                segments[row, start:stop] = segment
                text += example.raw_tokens
                nonpad += stop - start
                loss += stop - middle
                start, segment, example = stop, segment + 1, next(stream)
        arrays = {
            "input_tokens": inputs,
            "target_tokens": targets,
            "loss_weights": weights,
            "segment_ids": segments,
        }
        yield UL2Batch(arrays, text, nonpad, loss)
