"""What the rows of a run consist of, in numbers: shares, sizes, fill, spans.

Two ways of counting. A plan says which source, class and sizes every example has, without touching a token;
`count_plans` adds up many thousands of rows in a second. Where spans lie and how long they are only stands in
the rows themselves; `measure_rows` reads it from their sentinels, as the model does.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from openmoe.data.config import DataConfig, DenoiserConfig, ObjectiveName
from openmoe.data.curriculum import Curriculum
from openmoe.data.loader import StepBatch
from openmoe.data.objectives import T5_SPANS
from openmoe.data.recipe import PlannedExamples
from openmoe.data.tokenizer import EOS, SENTINELS

# What the objectives of a single class stand for in Table 2's terms; causal LM has no such line.
_SINGLE_CLASS = {
    "span_corruption": DenoiserConfig(mode="", mean_span=T5_SPANS[0], density=T5_SPANS[1], rate=1.0),
    "prefix_lm": DenoiserConfig(mode="", mean_span=None, density=0.0, rate=1.0),
}


class Share(NamedTuple):
    """One part of a whole, against what was asked for."""

    realised: float
    configured: float
    # Of the realised share, had every example been drawn independently.
    standard_error: float


@dataclass
class PlanCounts:
    """Sums over the planned examples of some rows. Arrays are int64 [sources, classes]."""

    row_tokens: int
    rows: int
    first_step: int
    # Steps finished after the last row that was counted.
    past_step: int
    examples: np.ndarray
    # Text read; positions of inputs and targets, EOS included.
    raw_tokens: np.ndarray
    input_tokens: np.ndarray
    target_tokens: np.ndarray
    # Sums over all examples, for the standard errors.
    raw_squares: int
    size_squares: int
    # Rows by their number of segments, int64 [most + 1].
    rows_by_segments: np.ndarray
    # How often each source has been gone through after the last step.
    epochs: dict[str, float]

    @property
    def positions(self) -> int:
        return self.rows * self.row_tokens

    @property
    def sizes(self) -> np.ndarray:
        """Positions that hold an example."""
        return self.input_tokens + self.target_tokens

    @property
    def fill(self) -> float:
        """Share of all positions that hold an example."""
        return float(self.sizes.sum() / self.positions)

    @property
    def loss_share(self) -> float:
        """Share of all positions that carry loss."""
        return float(self.target_tokens.sum() / self.positions)


def count_plans(
    batches: Iterable[StepBatch], rows: int, row_tokens: int, sources: int, classes: int
) -> PlanCounts:
    """Count the first `rows` rows of `batches`, which are consecutive steps of one phase.

    Only plans are read: batches made for no rows of the global batch serve as well. Stops early where the
    batches end.
    """
    tables = np.zeros((4, sources, classes), np.int64)
    examples, raw_tokens, input_tokens, target_tokens = tables
    counts = PlanCounts(
        row_tokens=row_tokens,
        rows=0,
        first_step=0,
        past_step=0,
        examples=examples,
        raw_tokens=raw_tokens,
        input_tokens=input_tokens,
        target_tokens=target_tokens,
        raw_squares=0,
        size_squares=0,
        rows_by_segments=np.zeros(1, np.int64),
        epochs={},
    )
    for batch in batches:
        taken = min(rows - counts.rows, batch.positions // row_tokens)
        if counts.rows == 0:
            counts.first_step = batch.step
        past = int(np.searchsorted(batch.examples.row, taken))
        plan = PlannedExamples(*(array[:past] for array in batch.examples))
        sizes = plan.input_tokens + plan.target_tokens
        values = (np.ones_like(sizes), plan.raw_tokens, plan.input_tokens, plan.target_tokens)
        for table, value in zip(tables, values, strict=True):
            np.add.at(table, (plan.source, plan.kind), value)
        counts.raw_squares += int((plan.raw_tokens**2).sum())
        counts.size_squares += int((sizes**2).sum())
        segments = np.bincount(np.bincount(plan.row, minlength=taken))
        counts.rows_by_segments = _add_padded(counts.rows_by_segments, segments)
        counts.rows += taken
        counts.past_step = batch.step + 1
        counts.epochs = batch.source_epochs
        if counts.rows == rows:
            break
    return counts


def _add_padded(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The sum of two histograms of any lengths."""
    longer, shorter = (one, other) if len(one) >= len(other) else (other, one)
    total = longer.copy()
    total[: len(shorter)] += shorter
    return total


def shares(amounts: np.ndarray, configured: np.ndarray, sum_of_squares: float) -> list[Share]:
    """The share of each part, `amounts` [parts] against `configured` [parts] (any scale).

    `sum_of_squares` is that of the sizes of all drawn items; with every item of size 1, their number.
    """
    total = float(amounts.sum())
    rates = configured / configured.sum()
    errors = np.sqrt(rates * (1 - rates) * sum_of_squares) / max(total, 1.0)
    return [
        Share(amount / max(total, 1.0), rate, error)
        for amount, rate, error in zip(amounts.tolist(), rates.tolist(), errors.tolist(), strict=True)
    ]


def expected_mix(
    curriculum: Curriculum, phase: int, sources: Sequence[str], first_step: int, past_step: int
) -> np.ndarray:
    """The configured share of each source over these steps of a phase, ramp included; float64 [sources]."""

    def rates(index: int) -> np.ndarray:
        mix = curriculum.phases[index].mix
        values = np.array([mix.get(name, 0.0) for name in sources])
        return values / values.sum()

    ramp_steps = curriculum.phases[phase].ramp_steps
    if not ramp_steps:
        return rates(phase)
    steps = np.arange(first_step, past_step) - curriculum.first_step(phase)
    done = float(np.clip((steps + 0.5) / ramp_steps, 0, 1).mean())
    return rates(phase - 1) * (1 - done) + rates(phase) * done


def class_denoisers(objective: ObjectiveName, config: DataConfig) -> list[DenoiserConfig | None]:
    """The line of Table 2 behind each class of an objective, in the order of its classes."""
    if objective == "ul2":
        return [denoiser for denoiser in config.denoisers if denoiser.rate > 0]
    return [_SINGLE_CLASS.get(objective)]


@dataclass
class RowMeasures:
    """What was read from built rows, by class; int64 [classes], histograms int64 [classes, tokens + 1]."""

    rows: int
    examples: np.ndarray
    # Text the examples were made of, by their plan.
    raw_tokens: np.ndarray
    # Text in the inputs: without mode string, sentinels and EOS.
    kept_tokens: np.ndarray
    # Text in the targets: without sentinels and the last EOS.
    masked_tokens: np.ndarray
    # How many examples have so much text in their inputs; how many spans are so long.
    kept_lengths: np.ndarray
    span_lengths: np.ndarray

    @property
    def spans(self) -> np.ndarray:
        """Masked spans, int64 [classes]."""
        return self.span_lengths.sum(axis=1)


def measure_rows(
    batches: Iterable[StepBatch], rows: int, first_sentinel: int, mode_tokens: Sequence[int]
) -> RowMeasures:
    """Read the first `rows` rows of `batches`, which are consecutive steps of one phase.

    `mode_tokens` is the length of each class's mode string.
    """
    classes = len(mode_tokens)
    modes = np.array(mode_tokens)
    measures: RowMeasures | None = None
    for batch in batches:
        arrays = batch.arrays
        row_tokens = arrays["target_tokens"].shape[1]
        if measures is None:
            totals = np.zeros((4, classes), np.int64)
            histograms = np.zeros((2, classes, row_tokens + 1), np.int64)
            measures = RowMeasures(0, *totals, *histograms)
        taken = min(rows - measures.rows, len(arrays["target_tokens"]))
        segments = arrays["segment_ids"][:taken]
        # Every array from here on holds the positions that aren't padding, one row after the other.
        row, _ = np.nonzero(segments)
        real = segments > 0
        tokens, loss = arrays["target_tokens"][:taken][real], arrays["loss_weights"][:taken][real] > 0
        segment = segments[real]
        begins = np.ones(len(segment), np.bool_)
        begins[1:] = (segment[1:] != segment[:-1]) | (row[1:] != row[:-1])
        ends = np.roll(begins, -1)
        example = np.cumsum(begins) - 1
        planned = int(np.searchsorted(batch.examples.row, taken))
        kind = batch.examples.kind[:planned]
        sentinel = (tokens > first_sentinel - SENTINELS) & (tokens <= first_sentinel)
        # Text has an EOS of its own where documents are joined, but then there are no spans.
        text = ~sentinel & ~(ends & (tokens == EOS))
        inputs_end = ~loss & (tokens == EOS)
        kept = np.bincount(example[~loss & text & ~inputs_end], minlength=planned)
        kept -= np.where(np.bincount(example[~loss], minlength=planned) > 0, modes[kind], 0)
        masked = np.bincount(example[loss & text], minlength=planned)
        # A span reaches from its sentinel in the targets to the next one, or to the EOS.
        marks = np.flatnonzero(loss & (sentinel | ends))
        starts = sentinel[marks[:-1]] & ~ends[marks[:-1]]
        lengths = (np.diff(marks) - 1)[starts]
        span_kind = kind[example[marks[:-1]][starts]]

        measures.rows += taken
        np.add.at(measures.examples, kind, 1)
        np.add.at(measures.raw_tokens, kind, batch.examples.raw_tokens[:planned])
        np.add.at(measures.kept_tokens, kind, kept)
        np.add.at(measures.masked_tokens, kind, masked)
        np.add.at(measures.kept_lengths, (kind, kept), 1)
        np.add.at(measures.span_lengths, (span_kind, lengths), 1)
        if measures.rows == rows:
            break
    if measures is None:
        raise ValueError("no batch to measure")
    return measures


def percentile(histogram: np.ndarray, share: float) -> int:
    """The smallest value that `share` of the counted items don't exceed; `histogram` [values] of counts."""
    sums = np.cumsum(histogram)
    return int(np.searchsorted(sums, share * sums[-1]))


def composition_shares(total: int, parts: int, longest: int) -> np.ndarray:
    """How likely a part of a random composition has each length, float64 [longest + 1].

    A composition of `total` is any way to write it as a sum of `parts` positive numbers, all alike: T5's span
    lengths.
    """
    result = np.zeros(longest + 1)
    if parts == 1:
        result[total : total + 1] = 1
        return result

    def log_ways(tokens: int, pieces: int) -> float:
        return math.lgamma(tokens) - math.lgamma(pieces) - math.lgamma(tokens - pieces + 1)

    for length in range(1, min(longest, total - parts + 1) + 1):
        result[length] = math.exp(log_ways(total - length, parts - 1) - log_ways(total, parts))
    return result
