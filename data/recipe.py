"""What the rows of a phase consist of: which source and which class of example stands where.

Rows come in blocks. Every block has the same number of examples of each class, packed in the same pattern
into the same number of rows, and the examples of a class are dealt out to the sources so that the number each
got up to any block is a formula. So row -> block -> token number in each source takes the same short time at
the first row and after a trillion tokens, and no share strays from its rate by more than a few examples.

Within a block the order is random, but spread evenly over the sources.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from openmoe.data.errors import DataError
from openmoe.data.objectives import ExampleClass, Objective
from openmoe.data.packing import dense_pattern
from openmoe.data.rng import mix_bits, random_key

# Rows of a block are at least this many where several examples share a row: the last one may stay half empty.
_PACKED_ROWS = 128
# Examples in a block: the first of these multiples that gives each class a whole number, or the last.
_BLOCK_EXAMPLES = range(200, 4001, 200)
# Blocks of a ramp that are added up in one go.
_RAMP_BLOCKS = 4096


class PlannedExamples(NamedTuple):
    """Examples in the order of their rows; every array [examples]."""

    source: np.ndarray
    # Which class of the phase's objective.
    kind: np.ndarray
    # The example's own randomness, uint64.
    draw: np.ndarray
    # Row, counted from the first row asked for; first position in it; number in it, from 1.
    row: np.ndarray
    place: np.ndarray
    segment: np.ndarray
    # Tokens its source gave before it, since the phase began.
    start: np.ndarray
    raw_tokens: np.ndarray
    # Positions of its two parts, EOS included.
    input_tokens: np.ndarray
    target_tokens: np.ndarray


def apportion(total: np.ndarray, shares: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Deal items out: total int64 [...], shares and offsets [..., sources] -> int64 [..., sources].

    Sums exactly to the total, lies within a few items of `total * shares`, and never falls as the total
    grows: source after source takes its share of what is left, rounded down after adding its offset in
    [0, 1).
    """
    dealt: np.ndarray = np.empty(
        np.broadcast_shapes((*total.shape, 1), shares.shape, offsets.shape), np.int64
    )
    left = np.broadcast_to(total, dealt.shape[:-1]).copy()
    rest = np.cumsum(shares[..., ::-1], axis=-1)[..., ::-1]  # so the last share of the rest is exactly 1
    parts = np.divide(shares, rest, out=np.zeros_like(shares), where=rest > 0)
    for source in range(shares.shape[-1]):
        taken = np.floor(left * parts[..., source] + offsets[..., source]).astype(np.int64)
        dealt[..., source] = np.minimum(taken, left)
        left -= dealt[..., source]
    return dealt


class PhaseRecipe:
    """The blocks of one phase."""

    def __init__(
        self,
        objective: Objective,
        rates: np.ndarray,
        row_tokens: int,
        packed: bool,
        seed: int,
        phase: int,
        ramp_from: np.ndarray | None = None,
        ramp_rows: int = 0,
    ) -> None:
        """`rates` float64 [sources] sum to 1. `packed` lets several examples share a row.

        Over the first `ramp_rows` rows the rates go from `ramp_from` to `rates`, in one step a block. Raises
        DataError for a class that is too rare to be in any block.
        """
        self._objective = objective
        self._rates = rates
        self._key = (seed, phase)
        self._raw_tokens = np.array([c.raw_tokens for c in objective.classes], np.int64)
        # Examples of each class in a block, int64 [classes].
        self.class_counts = _class_counts(objective.classes, row_tokens, packed)
        sizes = [c.row_tokens for c in objective.classes]
        classes = len(sizes)
        # int64 [rows, classes]; None where every example has a row of its own, in the order they come.
        self._pattern: np.ndarray | None = None
        self.block_rows = int(self.class_counts.sum())
        if packed:
            self._pattern = dense_pattern(sizes, self.class_counts.tolist(), row_tokens)
            self.block_rows = len(self._pattern)
        offsets = mix_bits(np.arange(classes * len(rates), dtype=np.uint64) ^ self._word("offsets"))
        self._offsets = _fraction(offsets).reshape(classes, len(rates))
        self._ramp_from = rates if ramp_from is None else ramp_from
        self._ramp_blocks = -(-ramp_rows // self.block_rows)
        self._ramp_sums = [np.zeros((classes, len(rates)), np.int64)]
        # A step's end is the next one's begin, and a block serves several steps.
        self._block = lru_cache(maxsize=8)(self._make_block)
        self._examples_before = lru_cache(maxsize=8)(self._count_examples_before)

    def tokens_before(self, row: int) -> np.ndarray:
        """Text tokens that each source gives to the rows before `row`, int64 [sources]."""
        block, inside = divmod(row, self.block_rows)
        tokens = self._raw_tokens @ self._examples_before(block)
        if inside:
            examples = self._block(block)
            used = slice(np.searchsorted(examples.row, inside))
            given = np.bincount(examples.source[used], examples.raw_tokens[used], len(tokens))
            tokens = tokens + given.astype(np.int64)
        return tokens

    def examples(self, first_row: int, rows: int) -> PlannedExamples:
        """The examples of rows `first_row` .. `first_row + rows - 1`."""
        parts = []
        past_row = first_row + rows
        for block in range(first_row // self.block_rows, -(-past_row // self.block_rows)):
            examples = self._block(block)
            shift = block * self.block_rows - first_row
            first, past = np.searchsorted(examples.row, [-shift, rows - shift])
            cut = PlannedExamples(*(array[first:past] for array in examples))
            parts.append(cut._replace(row=cut.row + shift))
        return PlannedExamples(*map(np.concatenate, zip(*parts, strict=True)))

    def _word(self, *parts: str | int) -> np.uint64:
        return np.uint64(random_key("recipe", *self._key, *parts).first)

    def _count_examples_before(self, block: int) -> np.ndarray:
        """Examples of the earlier blocks, int64 [classes, sources]."""
        ramp = min(block, self._ramp_blocks)
        constant = apportion(self.class_counts * (block - ramp), self._rates, self._offsets)
        if not ramp:
            return constant
        whole = ramp // _RAMP_BLOCKS
        while len(self._ramp_sums) <= whole:
            first = (len(self._ramp_sums) - 1) * _RAMP_BLOCKS
            self._ramp_sums.append(self._ramp_sums[-1] + self._ramp(first, first + _RAMP_BLOCKS))
        return constant + self._ramp_sums[whole] + self._ramp(whole * _RAMP_BLOCKS, ramp)

    def _ramp(self, first: int, past: int) -> np.ndarray:
        """Examples of the ramp's blocks `first` .. `past - 1` together, int64 [classes, sources]."""
        blocks = np.arange(first, past)
        done = ((blocks + 0.5) / max(1, self._ramp_blocks))[:, None, None]
        rates = self._ramp_from * (1 - done) + self._rates * done
        # Fresh offsets a block: with fixed ones a source of a small rate would always be rounded alike.
        words = mix_bits(blocks.astype(np.uint64) ^ self._word("ramp"))[:, None, None]
        places = np.arange(self._offsets.size, dtype=np.uint64).reshape(self._offsets.shape)
        return apportion(self.class_counts, rates, _fraction(mix_bits(words + places))).sum(axis=0)

    def _make_block(self, block: int) -> PlannedExamples:
        before = self._examples_before(block)
        counts = (self._examples_before(block + 1) - before).T  # [sources, classes]
        sources, classes = counts.shape
        source = np.repeat(np.arange(sources), counts.sum(axis=1))
        kind = np.repeat(np.tile(np.arange(classes), sources), counts.ravel())
        words = mix_bits(np.arange(len(source), dtype=np.uint64) ^ self._word("order", block))
        kind = kind[np.lexsort((words, source))]  # any order of classes within each source
        # The j-th of a source's n examples comes at (j + offset) / n of the block.
        number = np.arange(len(source)) - np.searchsorted(source, source)
        offsets = _fraction(
            mix_bits(np.arange(sources, dtype=np.uint64) ^ self._word("source offsets", block))
        )
        order = np.argsort((number + offsets[source]) / counts.sum(axis=1)[source], kind="stable")
        source, kind = source[order], kind[order]
        row = np.arange(len(source)) if self._pattern is None else self._rows(kind, block)
        order = np.argsort(row, kind="stable")
        source, kind, row = source[order], kind[order], row[order]

        draw = mix_bits(np.arange(len(source), dtype=np.uint64) ^ self._word("draws", block))
        raw_tokens = self._raw_tokens[kind]
        input_tokens, target_tokens = np.empty((2, len(source)), np.int64)
        for which, raw in enumerate(self._raw_tokens.tolist()):
            mine = np.flatnonzero(kind == which)
            input_tokens[mine], target_tokens[mine] = self._objective.sizes(which, raw, draw[mine])
        start = _before(raw_tokens, source) + (self._raw_tokens @ before)[source]
        place = _before(input_tokens + target_tokens, row)
        segment = np.arange(len(row)) - np.searchsorted(row, row) + 1
        return PlannedExamples(
            source, kind, draw, row, place, segment, start, raw_tokens, input_tokens, target_tokens
        )

    def _rows(self, kind: np.ndarray, block: int) -> np.ndarray:
        """The row of each example, from the pattern's rows in an order of the block's own."""
        assert self._pattern is not None
        words = mix_bits(np.arange(self.block_rows, dtype=np.uint64) ^ self._word("rows", block))
        pattern = self._pattern[np.argsort(words, kind="stable")]
        row = np.empty(len(kind), np.int64)
        for which in range(pattern.shape[1]):
            row[kind == which] = np.repeat(np.arange(self.block_rows), pattern[:, which])
        return row


def _fraction(words: np.ndarray) -> np.ndarray:
    """Random uint64 as float64 in [0, 1)."""
    return (words >> np.uint64(11)) * 2.0**-53


def _before(sizes: np.ndarray, group: np.ndarray) -> np.ndarray:
    """The sum of the earlier sizes of the same group, int64 [n]."""
    order = np.argsort(group, kind="stable")
    sums = np.cumsum(sizes[order]) - sizes[order]
    sums -= sums[np.searchsorted(group[order], group[order])]
    result = np.empty_like(sums)
    result[order] = sums
    return result


def _class_counts(classes: Sequence[ExampleClass], row_tokens: int, packed: bool) -> np.ndarray:
    """Examples of each class in a block, int64 [classes]: at their exact rates where 4000 allow it."""
    rates = np.array([c.rate for c in classes])
    for examples in _BLOCK_EXAMPLES:
        counts = np.rint(rates * examples)
        if np.abs(counts - rates * examples).max() < 1e-6:
            break
    else:  # the largest remainders round up
        counts = np.floor(rates * examples + 1e-9)
        # Rounded and stable, so that equal rates are told apart by their order on every machine.
        remainders = np.round(rates * examples - counts, 9)
        counts[np.argsort(-remainders, kind="stable")[: examples - int(counts.sum())]] += 1
    for example_class, count in zip(classes, counts, strict=True):
        if not count:
            raise DataError(
                f"data.denoisers: {example_class.name} has a share of {example_class.rate:.2g} of the "
                f"examples; allowed 0 or at least {1 / _BLOCK_EXAMPLES[-1]}"
            )
    if packed:
        block_tokens = sum(c.row_tokens * n for c, n in zip(classes, counts, strict=True))
        counts *= np.ceil(_PACKED_ROWS * row_tokens / block_tokens)
    return counts.astype(np.int64)
