"""The picture of a comparison of tokenizers: a row a subset, a colour a tokenizer, a panel a measure."""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from openmoe.launcher.tokenizer_tables import Comparison

COLOURS = ["#222222", "#0b6e99", "#d9822b", "#5b8c5a", "#8e5572", "#c0504d", "#a3a847", "#3f7cac"]
# Where more of the tokens are unknown, a small count is no merit: the mark is hollow.
UNKNOWN_SHARE = 0.01


def draw(comparison: Comparison, path: Path) -> None:
    """Write the three panels to `path`: ratio, bytes per token, share of the vocabulary."""
    subsets = list(comparison.subsets)
    panels = [
        (
            f"Tokens, over {comparison.tokenizers[0]}'s",
            "ratio; to the left is shorter",
            comparison.ratio,
        ),
        (
            "Bytes per token",
            "UTF-8 bytes; to the right is shorter",
            lambda subset, name: comparison.subsets[subset][name].bytes_per_token,
        ),
        (
            "Vocabulary used",
            "ids that occur in the subset",
            lambda subset, name: max(1, comparison.subsets[subset][name].vocabulary_used),
        ),
    ]
    with plt.rc_context({"font.size": 10, "axes.titleweight": "bold", "axes.titlelocation": "left"}):
        figure, axes = plt.subplots(
            1, 3, figsize=(14, 1.9 + 0.3 * len(subsets)), sharey=True, layout="constrained"
        )
        for ax, (title, label, value) in zip(axes, panels, strict=True):
            values = np.array([[value(subset, name) for name in comparison.tokenizers] for subset in subsets])
            _dots(ax, values, _known(comparison))
            ax.set_title(title)
            ax.set_xlabel(label)
        axes[0].set_xscale("log", base=2)
        axes[0].xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes[0].axvline(1, color=COLOURS[0], lw=1)
        axes[1].set_xlim(left=0)
        axes[2].set_xscale("log")
        axes[2].xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axes[0].set_yticks(range(len(subsets)), subsets)
        axes[0].invert_yaxis()
        _legend(figure, comparison)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _known(comparison: Comparison) -> np.ndarray:
    """bool [subsets, tokenizers]: whether (nearly) all tokens are known ones."""
    return np.array(
        [
            [usage.unknown_tokens <= UNKNOWN_SHARE * usage.tokens for usage in usages.values()]
            for usages in comparison.subsets.values()
        ]
    )


def _dots(ax: Axes, values: np.ndarray, known: np.ndarray) -> None:
    """`values` [subsets, tokenizers]: a grey line from the least to the most of a subset, dots on it."""
    rows = np.arange(len(values))
    ax.hlines(rows, values.min(1), values.max(1), color="#d5d8dc", lw=2, zorder=1)
    for column in range(values.shape[1]):
        colour = COLOURS[column % len(COLOURS)]
        faces = [colour if is_known else "white" for is_known in known[:, column]]
        ax.scatter(values[:, column], rows, s=34, c=faces, edgecolors=colour, linewidths=1.3, zorder=3)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color="#e6e8eb")
    ax.set_axisbelow(True)


def _legend(figure: plt.Figure, comparison: Comparison) -> None:
    marks = [
        Line2D([], [], marker="o", ls="", color=COLOURS[i % len(COLOURS)], label=f"{name} ({size:,})")
        for i, (name, size) in enumerate(comparison.vocabulary.items())
    ]
    if not _known(comparison).all():
        marks.append(
            Line2D([], [], marker="o", ls="", mec="#222222", mfc="white", label="over 1% unknown tokens")
        )
    figure.legend(handles=marks, loc="outside upper left", ncols=4, frameon=False)
