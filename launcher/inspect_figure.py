"""Pictures of what the built rows hold: span lengths and prefixes against what was asked for."""

import io

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from openmoe.data.inspection import composition_shares, percentile
from openmoe.launcher.inspect_tables import Statistics

BARS, ASKED, TEXT = "#6aa3c8", "#c4581c", "#444444"
COLUMNS = 3
PREFIX_BINS = 20


def draw_lengths(statistics: Statistics) -> bytes | None:
    """A PNG with a panel for each denoiser that has been built; None where the objective has none."""
    measures = statistics.measures
    shown = [i for i, d in enumerate(statistics.denoisers) if d is not None and measures.examples[i]]
    if not shown:
        return None
    lines = -(-len(shown) // COLUMNS)
    with plt.rc_context(
        {
            "font.size": 9,
            "text.color": TEXT,
            "axes.edgecolor": "#bbbbbb",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "legend.frameon": False,
        }
    ):
        figure, axes = plt.subplots(
            lines, COLUMNS, figsize=(12, 2.5 * lines), layout="constrained", squeeze=False
        )
        for ax in axes.flat[len(shown) :]:
            ax.set_visible(False)
        for ax, index in zip(axes.flat, shown, strict=False):
            denoiser = statistics.denoisers[index]
            ax.set_title(statistics.classes[index])
            if denoiser is not None and denoiser.mean_span is None:
                _prefixes(ax, statistics, index)
            else:
                _spans(ax, statistics, index)
            ax.yaxis.set_major_locator(MaxNLocator(4))
            ax.yaxis.set_major_formatter(PercentFormatter(1))
            ax.legend(loc="upper right")
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=110)
        plt.close(figure)
    return file.getvalue()


def _spans(ax: Axes, statistics: Statistics, index: int) -> None:
    """Lengths of spans; the line is T5's way of drawing them, a random composition of the masked tokens."""
    measures = statistics.measures
    lengths = measures.span_lengths[index]
    spans, examples = int(measures.spans[index]), int(measures.examples[index])
    longest = max(percentile(lengths, 0.995), 2)
    step = max(1, longest // 60)
    edges = np.arange(1, longest + 1, step)
    past = int(edges[-1]) + step
    realised = np.add.reduceat(lengths[:past], edges) / spans
    masked = round(int(measures.masked_tokens[index]) / examples)
    asked = np.add.reduceat(composition_shares(masked, round(spans / examples), past - 1), edges)
    middles = edges + (step - 1) / 2
    ax.bar(middles, realised, width=0.85 * step, color=BARS, label="read from the rows")
    ax.plot(middles, asked, color=ASKED, lw=1.4, marker="." if longest < 25 else None, label="T5's draw")
    ax.set_xlabel("tokens of a span")
    ax.set_xlim(0, past)


def _prefixes(ax: Axes, statistics: Statistics, index: int) -> None:
    measures = statistics.measures
    lengths, examples = measures.kept_lengths[index], int(measures.examples[index])
    text_tokens = round(int(measures.raw_tokens[index]) / examples)
    bins = min(PREFIX_BINS, text_tokens)
    edges = np.linspace(0, text_tokens + 1, bins + 1)
    counts, _ = np.histogram(np.arange(len(lengths)), edges, weights=lengths)
    widths = 0.9 * np.diff(edges)
    ax.bar(edges[:-1], counts / examples, widths, align="edge", color=BARS, label="read from the rows")
    ax.set_ylim(0, 1.6 * max(counts.max() / examples, 1 / bins))  # leaves room for the legend
    ax.axhline(1 / bins, color=ASKED, lw=1.4, label="an even draw")
    ax.set_xlabel("tokens of the prefix")
