"""The picture of a comparison of tokenizers: a row a subset, a colour a tokenizer, a panel a measure."""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D

from openmoe.launcher.tokenizer_tables import Comparison

COLOURS = ["#222222", "#0b6e99", "#d9822b", "#5b8c5a", "#8e5572", "#c0504d", "#a3a847", "#3f7cac"]
BAND, GRID, BASE_LINE = "#f3f4f6", "#dfe2e6", "#9aa0a6"
# Where more of the tokens are unknown, a small count is no merit: the mark is hollow and may lie outside.
UNKNOWN_SHARE = 0.01


def draw(comparison: Comparison, path: Path) -> None:
    """Write the three panels to `path`: ratio, bytes per token, vocabulary used."""
    subsets, names = list(comparison.subsets), comparison.tokenizers
    usages = [[comparison.subsets[subset][name] for name in names] for subset in subsets]
    known = np.array([[u.unknown_tokens <= UNKNOWN_SHARE * u.tokens for u in row] for row in usages])
    with plt.rc_context({"font.size": 10, "axes.titleweight": "bold", "axes.titlelocation": "left"}):
        size = (14, 1.8 + (0.22 + 0.035 * len(names)) * len(subsets))
        layout = ConstrainedLayoutEngine(wspace=0.05)
        figure, (ratio, length, vocabulary) = plt.subplots(1, 3, figsize=size, sharey=True, layout=layout)
        ratios = np.array([[comparison.ratio(subset, name) for name in names] for subset in subsets])
        ratio.axvline(1, color=BASE_LINE, lw=1, zorder=1)
        ratio.set_xscale("log", base=2)
        ratio.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        ratio.set_title(f"Tokens, over those of {names[0]}")
        ratio.set_xlabel("ratio (left is shorter)")
        _marks(ratio, ratios, known)
        _marks(length, np.array([[u.bytes_per_token for u in row] for row in usages]), known)
        length.set_title("Bytes per token")
        length.set_xlabel("UTF-8 bytes (right is shorter)")
        vocabulary.set_xscale("log")
        vocabulary.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        vocabulary.set_title("Vocabulary used")
        vocabulary.set_xlabel("ids that occur in the subset")
        _marks(vocabulary, np.array([[max(1, u.vocabulary_used) for u in row] for row in usages]), known)
        ratio.set_yticks(range(len(subsets)), subsets)
        ratio.set_ylim(len(subsets) - 0.5, -0.5)
        _legend(figure, comparison, bool(known.all()))
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _marks(ax: Axes, values: np.ndarray, known: np.ndarray) -> None:
    """`values` and `known` [subsets, tokenizers]; the axis spans the known ones, others stop at its ends."""
    rows = np.arange(len(values))
    for row in rows[::2]:
        ax.axhspan(row - 0.5, row + 0.5, color=BAND, lw=0, zorder=0)
    within = values[known] if known.any() else values
    margin = 1.15
    least, most = within.min() / margin, within.max() * margin
    ax.set_xlim(least, most)
    tokenizers = values.shape[1]
    for column in range(tokenizers):
        colour = COLOURS[column % len(COLOURS)]
        height = rows + 0.6 * ((column + 0.5) / tokenizers - 0.5)
        for inside, marker in (
            ((values[:, column] >= least) & (values[:, column] <= most), "o"),
            (values[:, column] < least, "<"),
            (values[:, column] > most, ">"),
        ):
            faces = [colour if is_known else "white" for is_known in known[inside, column]]
            x = np.clip(values[inside, column], least, most)
            ax.scatter(
                x, height[inside], s=26, c=faces, edgecolors=colour, linewidths=1.2, marker=marker, zorder=3,
                clip_on=False,
            )  # fmt: skip
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color=GRID)
    ax.set_axisbelow(True)


def _legend(figure: Figure, comparison: Comparison, all_known: bool) -> None:
    marks = [
        Line2D([], [], marker="o", ls="", color=COLOURS[i % len(COLOURS)], label=f"{name} ({size:,} ids)")
        for i, (name, size) in enumerate(comparison.vocabulary.items())
    ]
    if not all_known:
        label = "hollow: over 1% unknown; triangle: beyond"
        marks.append(Line2D([], [], marker="o", ls="", mec=COLOURS[0], mfc="white", label=label))
    figure.legend(handles=marks, loc="outside upper left", ncols=3, frameon=False)
