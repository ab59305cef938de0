"""From raw tokens to examples: what the model reads (inputs) and what it learns (targets).

An objective is a short list of classes of examples; UL2 has one for each denoiser, the others have one. All
examples of a class read the same number of raw tokens, so whole groups are built at once. Every example is a
pure function of its tokens and of one random word (`draws`, uint64), whatever else is in the call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from openmoe.data import ul2
from openmoe.data.config import DataConfig, DenoiserConfig, ObjectiveName
from openmoe.data.errors import DataError
from openmoe.data.tokenizer import EOS, SENTINELS, Tokenizer

# Raw tokens that are corrupted at a time: what a step leaves is still in the processor's cache at the next.
_GROUP_TOKENS = 32768

# T5's mean span and density.
T5_SPANS = (3.0, 0.15)


class ExampleClass(NamedTuple):
    """Examples that are sized alike."""

    # For people; unique within the objective.
    name: str
    # Share of the objective's examples; the rates of all classes sum to one.
    rate: float
    # Tokens an example reads from its source.
    raw_tokens: int
    # The most positions of a row it can take, EOS and all.
    row_tokens: int


class Examples(NamedTuple):
    """Examples of one class, one a row: inputs, then targets, each with their EOS."""

    # int32 [n, width], 0 beyond the example.
    sequences: np.ndarray
    # int64 [n]
    input_tokens: np.ndarray
    # int64 [n]
    target_tokens: np.ndarray


class _Kind(Protocol):
    """How the examples of one class are made."""

    def sizes(self, raw_tokens: int, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...

    def build(self, tokens: np.ndarray, draws: np.ndarray) -> Examples: ...


@dataclass(frozen=True)
class Objective:
    """What a phase of the run learns from."""

    classes: Sequence[ExampleClass]
    # Whether the documents of a source are joined with an EOS after each.
    joins_with_eos: bool
    _kinds: Sequence[_Kind]

    def sizes(self, index: int, raw_tokens: int, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Input and target tokens, EOS included, of examples of class `index`; two int64 [n].

        `raw_tokens` is the class's, or less at the end of a text but at least 1; `draws` is uint64 [n].
        """
        return self._kinds[index].sizes(raw_tokens, draws)

    def build(self, index: int, tokens: np.ndarray, draws: np.ndarray) -> Examples:
        """The examples of class `index` from `tokens`, int32 [n, raw_tokens], and `draws`, uint64 [n]."""
        return self._kinds[index].build(tokens, draws)


@dataclass(frozen=True)
class _CausalRows:
    """Next-token prediction on tokens cut from the joined documents, all of them targets. Facts 5.5."""

    length: int
    row_end_eos: bool

    def sizes(self, raw_tokens: int, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        targets = min(raw_tokens, self.length - 1) + 1 if self.row_end_eos else raw_tokens
        return np.zeros(len(draws), np.int64), np.full(len(draws), targets)

    def build(self, tokens: np.ndarray, draws: np.ndarray) -> Examples:
        input_tokens, target_tokens = self.sizes(tokens.shape[1], draws)
        if self.row_end_eos:
            tokens = np.pad(tokens[:, : self.length - 1], ((0, 0), (0, 1)), constant_values=EOS)
        return Examples(tokens, input_tokens, target_tokens)


@dataclass(frozen=True)
class _PrefixSplits:
    """Text cut at a random place: the first part is read, the second learned. Each takes at most `side`."""

    side: int
    mode: tuple[int, ...]

    def sizes(self, raw_tokens: int, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        prefixes = ul2.prefix_lengths(raw_tokens, draws)
        most = self.side - 1  # what is cut lies before the EOS
        inputs = np.minimum(prefixes + len(self.mode), most)
        return inputs + 1, np.minimum(raw_tokens - prefixes, most) + 1

    def build(self, tokens: np.ndarray, draws: np.ndarray) -> Examples:
        raw_tokens = tokens.shape[1]
        input_tokens, target_tokens = self.sizes(raw_tokens, draws)
        prefixes = ul2.prefix_lengths(raw_tokens, draws)
        mode_tokens = len(self.mode)
        sequences = np.zeros((len(tokens), raw_tokens + mode_tokens + 2), np.int32)
        sequences[:, :mode_tokens] = self.mode
        for sequence, text, prefix, inputs, targets in zip(
            sequences, tokens, prefixes.tolist(), input_tokens.tolist(), target_tokens.tolist(), strict=True
        ):
            last = inputs + targets - 1
            sequence[mode_tokens : inputs - 1] = text[: inputs - 1 - mode_tokens]
            sequence[inputs - 1] = EOS
            sequence[inputs:last] = text[prefix : prefix + targets - 1]
            sequence[last] = EOS
        return Examples(sequences, input_tokens, target_tokens)


@dataclass(frozen=True)
class _SpanCorruption:
    """Random spans are taken out of the text and learned. Inputs and targets take at most `side` each.

    The mode string comes in front after the example was sized, and the inputs are then trimmed: as in the
    released runs, the last tokens of the corrupted text are cut, as many as the mode string has. Facts 5.3.
    """

    side: int
    mode: tuple[int, ...]
    mean_span: float
    density: float
    first_sentinel: int

    def sizes(self, raw_tokens: int, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        inputs, targets = self._part_sizes(raw_tokens)
        return np.full(len(draws), inputs), np.full(len(draws), targets)

    def _part_sizes(self, raw_tokens: int) -> tuple[int, int]:
        noise, spans = ul2.noise_counts(raw_tokens, self.mean_span, self.density)
        most = self.side - 1  # what is cut lies before the EOS
        inputs = min(len(self.mode) + raw_tokens - noise + spans, most)
        # A single token has no noise, but a sentinel stands for it in the targets.
        return inputs + 1, min(max(1, noise + spans), most) + 1

    def build(self, tokens: np.ndarray, draws: np.ndarray) -> Examples:
        examples, raw_tokens = tokens.shape
        input_tokens, target_tokens = self._part_sizes(raw_tokens)
        counts = ul2.noise_counts(raw_tokens, self.mean_span, self.density)
        mode_tokens = len(self.mode)
        sequences = np.empty((examples, input_tokens + target_tokens), np.int32)
        sequences[:, :mode_tokens] = self.mode
        sequences[:, [input_tokens - 1, -1]] = EOS
        group = max(1, _GROUP_TOKENS // raw_tokens)
        for start in range(0, examples, group):
            rows = slice(start, start + group)
            ends = ul2.span_ends(raw_tokens, *counts, draws[rows])
            inputs, targets = ul2.corrupt_spans(tokens[rows], ends, self.first_sentinel)
            sequences[rows, mode_tokens : input_tokens - 1] = inputs[:, : input_tokens - 1 - mode_tokens]
            sequences[rows, input_tokens:-1] = targets[:, : target_tokens - 1]
        return Examples(sequences, *self.sizes(raw_tokens, draws))


def make_objective(
    name: ObjectiveName, example_tokens: int, tokenizer: Tokenizer, data_config: DataConfig
) -> Objective:
    """The objective called `name`, with examples of at most `example_tokens` tokens.

    Raises DataError where that is too short for the objective or takes more than the 300 sentinels, and where
    no denoiser of UL2 has a rate.
    """
    key = "train.seq_len" if data_config.example_tokens is None else "data.example_tokens"
    where = f"{key}={example_tokens}"
    if example_tokens < 8:
        raise DataError(f"{where} is too short; at least 8 is allowed")
    if name == "causal_lm":
        return _one_class(name, example_tokens, _CausalRows(example_tokens, data_config.row_end_eos), True)
    if name == "prefix_lm":
        return _one_class(name, example_tokens - 2, _PrefixSplits(example_tokens, ()), False)
    if name == "span_corruption":
        kind = _SpanCorruption(example_tokens, (), *T5_SPANS, tokenizer.first_sentinel)
        raw_tokens = example_tokens
        while _row_tokens(kind, raw_tokens) > example_tokens:
            raw_tokens -= 1
        _require_sentinels(ul2.noise_counts(raw_tokens, *T5_SPANS)[1], where)
        return _one_class(name, raw_tokens, kind, False)
    return _ul2(example_tokens, tokenizer, data_config, where)


def _ul2(example_tokens: int, tokenizer: Tokenizer, data_config: DataConfig, where: str) -> Objective:
    """The mixture of denoisers: inputs and targets of at most half of `example_tokens` each. Facts 5.3."""
    side = example_tokens // 2
    denoisers = [d for d in data_config.denoisers if d.rate > 0]
    if not denoisers:
        raise DataError("the rates of data.denoisers sum to 0; at least one must be above 0")
    modes = [tuple(tokenizer.encode(d.mode)) if data_config.mode_strings else () for d in denoisers]
    longest = max(map(len, modes))
    if side < longest + 8:
        raise DataError(
            f"{where} is too short for UL2: its mode strings take {longest} tokens; "
            f"at least {2 * (longest + 8)} is allowed"
        )
    total = sum(d.rate for d in denoisers)
    classes: list[ExampleClass] = []
    kinds: list[_Kind] = []
    for denoiser, mode in zip(denoisers, modes, strict=True):
        kind: _Kind
        if denoiser.mean_span is None:
            kind, raw_tokens = _PrefixSplits(side, mode), side - 1
        else:
            spans = (denoiser.mean_span, denoiser.density)
            kind = _SpanCorruption(side, mode, *spans, tokenizer.first_sentinel)
            raw_tokens = ul2.random_spans_helper(side, *spans)[0]
            _require_sentinels(ul2.noise_counts(raw_tokens, *spans)[1], where)
        name = _unique(_denoiser_name(denoiser), [c.name for c in classes])
        classes.append(ExampleClass(name, denoiser.rate / total, raw_tokens, _row_tokens(kind, raw_tokens)))
        kinds.append(kind)
    return Objective(classes, False, kinds)


def _one_class(name: str, raw_tokens: int, kind: _Kind, joins_with_eos: bool) -> Objective:
    example_class = ExampleClass(name, 1.0, raw_tokens, _row_tokens(kind, raw_tokens))
    return Objective([example_class], joins_with_eos, [kind])


def _row_tokens(kind: _Kind, raw_tokens: int) -> int:
    """The most positions an example takes. Word 0 draws the shortest prefix, which is trimmed least."""
    inputs, targets = kind.sizes(raw_tokens, np.zeros(1, np.uint64))
    return int(inputs[0] + targets[0])


def _denoiser_name(denoiser: DenoiserConfig) -> str:
    spans = "prefix" if denoiser.mean_span is None else f"{denoiser.mean_span} x {denoiser.density}"
    return f"{denoiser.mode.strip()} {spans}".strip()


def _unique(name: str, taken: Sequence[str]) -> str:
    same = sum(other == name or other.startswith(f"{name} #") for other in taken)
    return f"{name} #{same + 1}" if same else name


def _require_sentinels(spans: int, where: str) -> None:
    if spans > SENTINELS:
        raise DataError(f"{where} needs {spans} sentinels for one example; the tokenizer has {SENTINELS}")
