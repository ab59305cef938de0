"""The statistics of a run's rows as tables, for the terminal and for the page alike."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from openmoe.data.config import DenoiserConfig
from openmoe.data.inspection import PlanCounts, RowMeasures, Share, percentile, shares


class Table(NamedTuple):
    title: str
    # The first column names the line, the others are numbers.
    header: Sequence[str]
    lines: Sequence[Sequence[str]]
    note: str
    # For each line the share that is compared, where there is one.
    shares: Sequence[Share] = ()


@dataclass(frozen=True)
class Statistics:
    """The numbers of some rows of one phase, and what they are held against."""

    phase: int
    objective: str
    sources: Sequence[str]
    # Configured share of each source, float64 [sources].
    mix: np.ndarray
    classes: Sequence[str]
    # Line of Table 2 for each class; None for causal LM.
    denoisers: Sequence[DenoiserConfig | None]
    counts: PlanCounts
    measures: RowMeasures

    @property
    def class_rates(self) -> np.ndarray:
        rates = np.array([denoiser.rate if denoiser else 1.0 for denoiser in self.denoisers])
        return rates / rates.sum()


def statistics_tables(statistics: Statistics) -> list[Table]:
    """Rows, sources against the mix, denoisers against their rates, and what the examples look like."""
    tables = [rows_table(statistics.counts), sources_table(statistics)]
    if len(statistics.classes) > 1:
        tables.append(denoisers_table(statistics))
    tables.append(examples_table(statistics))
    return tables + [made for make in (spans_table, prefixes_table) if (made := make(statistics))]


def rows_table(counts: PlanCounts) -> Table:
    """How full the rows are."""
    used = np.flatnonzero(counts.rows_by_segments)
    segments = counts.examples.sum() / counts.rows
    padding = counts.positions - counts.sizes.sum()
    cells = {
        "rows": f"{counts.rows:,}",
        "positions": f"{counts.positions:,}",
        "fill %": _percent(counts.fill),
        "with loss %": _percent(counts.loss_share),
        "loss of filled %": _percent(counts.loss_share / counts.fill),
        "padding a row": f"{padding / counts.rows:,.1f}",
        "segments a row": f"{segments:.2f}",
        "least": f"{used[0]}",
        "most": f"{used[-1]}",
    }
    return Table("Rows", list(cells), [list(cells.values())], "shares of positions")


def sources_table(statistics: Statistics) -> Table:
    """Realised shares of the sources in three ways of counting, against the mix (Table 1 of the paper)."""
    counts = statistics.counts
    examples = counts.examples.sum()
    ways = [
        shares(amounts.sum(axis=1), statistics.mix, squares)
        for amounts, squares in (
            (counts.raw_tokens, counts.raw_squares),
            (counts.examples, int(examples)),
            (counts.sizes, counts.size_squares),
        )
    ]
    lines, bars = [], []
    for index, name in enumerate(statistics.sources):
        own = [way[index] for way in ways]
        if own[0].configured == 0 and own[1].realised == 0:
            continue  # only in another phase's mix
        cells = [cell for share in own for cell in _compared(share)]
        lines.append([name, _percent(own[0].configured), *cells, f"{counts.epochs[name]:.4g}"])
        bars.append(own[0])
    columns = [c for way in ("text", "examples", "positions") for c in (f"of {way} %", "off by", "s.e.")]
    note = (
        "positions without padding; off by: realised less rate, in points (! beyond 3 s.e.); s.e.: standard "
        "error if each example's source were drawn independently; epochs: passes through the source by the "
        "end of the last step"
    )
    return Table("Sources", ["source", "rate %", *columns, "epochs"], lines, note, bars)


def denoisers_table(statistics: Statistics) -> Table:
    """Realised shares of the classes, against their rates (Table 2 of the paper)."""
    counts = statistics.counts
    by_examples = shares(counts.examples.sum(axis=0), statistics.class_rates, int(counts.examples.sum()))
    others = [
        amounts.sum(axis=0) / amounts.sum()
        for amounts in (counts.raw_tokens, counts.sizes, counts.target_tokens)
    ]
    lines = [
        [name, _percent(share.configured), *_compared(share), *(_percent(other[index]) for other in others)]
        for index, (name, share) in enumerate(zip(statistics.classes, by_examples, strict=True))
    ]
    header = [
        *("denoiser", "rate %", "of examples %", "off by", "s.e."),
        *("of text %", "of positions %", "of loss %"),
    ]
    return Table("Denoisers", header, lines, "rates count examples", by_examples)


def examples_table(statistics: Statistics) -> Table:
    """Sizes of each class's examples, by their plans."""
    counts = statistics.counts
    examples = np.maximum(counts.examples.sum(axis=0), 1)
    means = [
        amounts.sum(axis=0) / examples
        for amounts in (counts.raw_tokens, counts.input_tokens, counts.target_tokens)
    ]
    lines = [
        [name, f"{counts.examples.sum(axis=0)[index]:,}", *(f"{mean[index]:,.1f}" for mean in means)]
        for index, name in enumerate(statistics.classes)
    ]
    note = "tokens of an example, on average; inputs with mode string, sentinels and EOS, targets likewise"
    return Table("Examples", ["class", "examples", "text read", "inputs", "targets"], lines, note)


def spans_table(statistics: Statistics) -> Table | None:
    """Mask ratio and spans as read from built rows; None for an objective without spans."""
    measures = statistics.measures
    lines = []
    for index, denoiser in enumerate(statistics.denoisers):
        examples, spans = measures.examples[index], measures.spans[index]
        if denoiser is None or denoiser.mean_span is None or not spans:
            continue
        lengths, masked = measures.span_lengths[index], measures.masked_tokens[index]
        raw_tokens = measures.raw_tokens[index]
        cut = raw_tokens - masked - measures.kept_tokens[index]
        cells = [
            *(_percent(masked / raw_tokens), f"{100 * denoiser.density:g}"),
            *(f"{masked / spans:.3f}", f"{denoiser.mean_span:g}", f"{spans / examples:,.1f}"),
            *(f"{percentile(lengths, share)}" for share in (0.05, 0.5, 0.95)),
            f"{np.flatnonzero(lengths)[-1]}",
            f"{cut / examples:.1f}",
        ]
        lines.append([statistics.classes[index], *cells])
    if not lines:
        return None
    header = [
        *("denoiser", "masked %", "asked", "mean span", "asked", "spans an example"),
        *("5% up to", "half up to", "95% up to", "longest", "cut off"),
    ]
    note = (
        f"read from the sentinels of {measures.rows:,} built rows; masked: share of the text read that is in "
        "the targets; spans in tokens; cut off: text of an example that was trimmed away"
    )
    return Table("Spans", header, lines, note)


def prefixes_table(statistics: Statistics) -> Table | None:
    """Length of the prefixes as read from built rows; None for an objective without prefix LM."""
    measures = statistics.measures
    lines = []
    for index, denoiser in enumerate(statistics.denoisers):
        examples = measures.examples[index]
        if denoiser is None or denoiser.mean_span is not None or not examples:
            continue
        raw_tokens, kept = measures.raw_tokens[index], measures.kept_tokens[index]
        text = raw_tokens / examples
        lengths = measures.kept_lengths[index]
        used = np.flatnonzero(lengths)
        cut = (raw_tokens - kept - measures.masked_tokens[index]) / examples
        error = text / (12 * examples) ** 0.5
        cells = [
            *(f"{text:,.1f}", f"{kept / examples:,.1f}", f"{text / 2:,.1f}", f"{error:.1f}"),
            *(f"{used[0]}", f"{percentile(lengths, 0.5)}", f"{used[-1]}", f"{cut:.1f}"),
        ]
        lines.append([statistics.classes[index], *cells])
    if not lines:
        return None
    header = [
        *("denoiser", "text read", "mean prefix", "asked", "s.e."),
        *("shortest", "half up to", "longest", "cut off"),
    ]
    note = f"text in the inputs of {measures.rows:,} built rows; asked: the mean of an even draw"
    return Table("Prefixes", header, lines, note)


def terminal_table(table: Table) -> str:
    """The table as lines of text."""
    columns = list(zip(table.header, *table.lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    text = [table.title]
    for cells in (table.header, *table.lines):
        first, *others = (
            cell.ljust(width) if at == 0 else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        text.append("  " + "  ".join([first, *others]).rstrip())
    note = textwrap.wrap(table.note, max(90, sum(widths)), initial_indent="  ", subsequent_indent="  ")
    return "\n".join(text + note)


def _percent(share: float) -> str:
    return f"{100 * share:.2f}"


def _compared(share: Share) -> list[str]:
    off = share.realised - share.configured
    beyond = abs(off) > 3 * share.standard_error + 1e-12
    off_by = f"{100 * off:+.3f}{'!' if beyond else ''}"
    return [_percent(share.realised), off_by, f"{100 * share.standard_error:.3f}"]
