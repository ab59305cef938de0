"""From raw tokens of one source to one example: what the model reads (inputs) and what it learns (targets).

Every objective answers two questions. `measure` says how many raw tokens the example numbered `key` reads and
how long its two parts become, without touching a token: plans are made of that. `build` makes the example.
Both are pure functions of the key.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from openmoe.data import ul2
from openmoe.data.config import ObjectiveName
from openmoe.data.errors import DataError
from openmoe.data.rng import RandomKey
from openmoe.data.tokenizer import SENTINELS, Tokenizer


class ExampleSize(NamedTuple):
    """Tokens read from the source, and tokens of the two parts including their EOS."""

    raw_tokens: int
    input_tokens: int
    target_tokens: int


class Objective(Protocol):
    """What the loader needs of an objective."""

    @property
    def joins_with_eos(self) -> bool:
        """Whether the documents of a source are joined with an EOS after each."""
        ...

    def measure(self, key: RandomKey, available_tokens: int | None = None) -> ExampleSize:
        """The example's size, reading at most `available_tokens` (None: there is always enough)."""
        ...

    def build(self, tokens: np.ndarray, key: RandomKey) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, int32, from the raw tokens `measure` asked for."""
        ...


@dataclass(frozen=True)
class CausalLM:
    """Next-token prediction on rows of `seq_len` tokens cut from the joined documents. Facts 5.5."""

    seq_len: int
    row_end_eos: bool
    joins_with_eos: bool = True

    def measure(self, key: RandomKey, available_tokens: int | None = None) -> ExampleSize:
        raw_tokens = _at_most(self.seq_len, available_tokens)
        return ExampleSize(raw_tokens, 0, self._target_tokens(raw_tokens))

    def build(self, tokens: np.ndarray, key: RandomKey) -> tuple[np.ndarray, np.ndarray]:
        targets = ul2.append_eos_after_trim(tokens, self.seq_len) if self.row_end_eos else tokens
        return np.empty(0, np.int32), targets

    def _target_tokens(self, raw_tokens: int) -> int:
        return min(raw_tokens, self.seq_len - 1) + 1 if self.row_end_eos else raw_tokens


@dataclass(frozen=True)
class PrefixLM:
    """A row of text cut at a random place: the first part is read, the second learned."""

    seq_len: int
    joins_with_eos: bool = False

    def measure(self, key: RandomKey, available_tokens: int | None = None) -> ExampleSize:
        raw_tokens = _at_most(self.seq_len - 2, available_tokens)
        prefix = ul2.prefix_length(raw_tokens, key)
        return ExampleSize(raw_tokens, prefix + 1, raw_tokens - prefix + 1)

    def build(self, tokens: np.ndarray, key: RandomKey) -> tuple[np.ndarray, np.ndarray]:
        prefix = ul2.prefix_length(len(tokens), key)
        return (
            ul2.append_eos_after_trim(tokens[:prefix], self.seq_len),
            ul2.append_eos_after_trim(tokens[prefix:], self.seq_len),
        )


class SpanCorruption:
    """T5's denoising alone (mean span 3, density 0.15, no mode string), sized to fill a row."""

    joins_with_eos = False
    mean_span, density = 3.0, 0.15

    def __init__(self, seq_len: int, tokenizer: Tokenizer) -> None:
        self._seq_len = seq_len
        self._first_sentinel = tokenizer.first_sentinel
        raw_tokens = seq_len
        while self._row_tokens(raw_tokens) > seq_len:
            raw_tokens -= 1
        self._raw_tokens = raw_tokens
        _require_sentinels(ul2.noise_counts(raw_tokens, self.mean_span, self.density)[1], seq_len)

    def _row_tokens(self, raw_tokens: int) -> int:
        return raw_tokens + 2 * ul2.noise_counts(raw_tokens, self.mean_span, self.density)[1] + 2

    def measure(self, key: RandomKey, available_tokens: int | None = None) -> ExampleSize:
        raw_tokens = _at_most(self._raw_tokens, available_tokens)
        noise, spans = ul2.noise_counts(raw_tokens, self.mean_span, self.density)
        return ExampleSize(raw_tokens, raw_tokens - noise + spans + 1, noise + spans + 1)

    def build(self, tokens: np.ndarray, key: RandomKey) -> tuple[np.ndarray, np.ndarray]:
        noise = ul2.random_spans_noise_mask(len(tokens), self.mean_span, self.density, key)
        inputs, targets = ul2.span_corruption(tokens, noise, self._first_sentinel)
        return (
            ul2.append_eos_after_trim(inputs, self._seq_len),
            ul2.append_eos_after_trim(targets, self._seq_len),
        )


class UL2:
    """The mixture of the six denoisers: inputs and targets of at most half a row each. Facts 5.3.

    The mode string is put in front after the example was sized, and the inputs are then trimmed: as in the
    released runs, the last tokens of the corrupted text are cut, as many as the mode string has.
    """

    joins_with_eos = False

    def __init__(self, seq_len: int, tokenizer: Tokenizer) -> None:
        self._side_length = seq_len // 2
        self._first_sentinel = tokenizer.first_sentinel
        self._modes = [np.array(tokenizer.encode(d.mode), np.int32) for d in ul2.DENOISERS]
        longest_mode = max(map(len, self._modes))
        if self._side_length < longest_mode + 8:
            raise DataError(
                f"train.seq_len={seq_len} is too short for UL2: its mode strings take {longest_mode} tokens; "
                f"at least {2 * (longest_mode + 8)} is allowed"
            )
        self._raw_tokens = [self._segment_tokens(d) for d in ul2.DENOISERS]
        most_spans = max(
            ul2.noise_counts(raw, d.mean_span, d.density)[1]
            for raw, d in zip(self._raw_tokens, ul2.DENOISERS, strict=True)
            if d.mean_span is not None
        )
        _require_sentinels(most_spans, seq_len)

    def _segment_tokens(self, denoiser: ul2.Denoiser) -> int:
        if denoiser.mean_span is None:
            return self._side_length - 1
        return ul2.random_spans_helper(self._side_length, denoiser.mean_span, denoiser.density)[0]

    def measure(self, key: RandomKey, available_tokens: int | None = None) -> ExampleSize:
        index = ul2.draw_denoiser(key)
        denoiser = ul2.DENOISERS[index]
        raw_tokens = _at_most(self._raw_tokens[index], available_tokens)
        if denoiser.mean_span is None:
            inputs = ul2.prefix_length(raw_tokens, key)
            targets = raw_tokens - inputs
        else:
            noise, spans = ul2.noise_counts(raw_tokens, denoiser.mean_span, denoiser.density)
            inputs, targets = raw_tokens - noise + spans, noise + spans
        longest = self._side_length - 1
        return ExampleSize(
            raw_tokens, min(inputs + len(self._modes[index]), longest) + 1, min(targets, longest) + 1
        )

    def build(self, tokens: np.ndarray, key: RandomKey) -> tuple[np.ndarray, np.ndarray]:
        index = ul2.draw_denoiser(key)
        denoiser = ul2.DENOISERS[index]
        if denoiser.mean_span is None:
            prefix = ul2.prefix_length(len(tokens), key)
            inputs, targets = tokens[:prefix], tokens[prefix:]
        else:
            noise = ul2.random_spans_noise_mask(len(tokens), denoiser.mean_span, denoiser.density, key)
            inputs, targets = ul2.span_corruption(tokens, noise, self._first_sentinel)
        inputs = np.concatenate([self._modes[index], inputs])
        return (
            ul2.append_eos_after_trim(inputs, self._side_length),
            ul2.append_eos_after_trim(targets, self._side_length),
        )


def make_objective(
    name: ObjectiveName, seq_len: int, tokenizer: Tokenizer, row_end_eos: bool = False
) -> Objective:
    """The objective called `name` for rows of `seq_len` tokens.

    Raises DataError where the row is too short for the objective or needs more than the 300 sentinels.
    """
    if seq_len < 8:
        raise DataError(f"train.seq_len={seq_len} is too short; at least 8 is allowed")
    if name == "causal_lm":
        return CausalLM(seq_len, row_end_eos)
    if name == "prefix_lm":
        return PrefixLM(seq_len)
    if name == "span_corruption":
        return SpanCorruption(seq_len, tokenizer)
    return UL2(seq_len, tokenizer)


def _at_most(tokens: int, available_tokens: int | None) -> int:
    return tokens if available_tokens is None else min(tokens, available_tokens)


def _require_sentinels(spans: int, seq_len: int) -> None:
    if spans > SENTINELS:
        raise DataError(
            f"train.seq_len={seq_len} needs {spans} sentinels for one example; the tokenizer has {SENTINELS}"
        )
