"""The picture of a run: loss and accuracy with the switch, realised data mix, expert load."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from openmoe.launcher.schema import Config

COLOURS = ["#0b6e99", "#d9822b", "#5b8c5a", "#8e5572", "#6c6f7f", "#c0504d", "#3f7cac", "#a3a847", "#444444"]
QUIET = "#9aa0a6"


def draw(lines: list[dict[str, Any]], config: Config, bars: dict[str, dict[str, float]], path: Path) -> None:
    """Write the four panels to `path`. `bars` are unigram and bigram entropies by source."""
    with plt.rc_context(
        {
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.grid": True,
            "grid.color": "#e6e8eb",
            "axes.axisbelow": True,
            "legend.edgecolor": "none",
            "legend.framealpha": 0.85,
        }
    ):
        figure, axes = plt.subplots(2, 2, figsize=(13, 8.2), layout="constrained")
        scale, unit = _unit(lines[-1]["tokens_seen"])
        tokens = np.array([line["tokens_seen"] for line in lines]) / scale
        colours = dict(zip(bars, COLOURS, strict=False))
        _validation(axes[0, 0], lines, tokens, colours, "loss")
        _bars(axes[0, 0], bars, colours, tokens[-1])
        _validation(axes[0, 1], lines, tokens, colours, "accuracy")
        _mix(axes[1, 0], lines, tokens, colours)
        _load(axes[1, 1], lines, tokens, config)
        for ax in axes.flat:
            ax.set_xlim(0, tokens[-1])
            ax.set_xlabel(f"tokens seen ({unit})")
            for x in _switches(lines, tokens):
                ax.axvline(x, color="#222222", lw=1.1, ls=(0, (4, 3)))
        _name_phases(axes[0, 0], lines, tokens)
        _name_phases(axes[0, 1], lines, tokens)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def _validation(
    ax: Axes, lines: list[dict[str, Any]], tokens: np.ndarray, colours: dict[str, str], what: str
) -> None:
    train = [line["lm_loss"] if what == "loss" else line["accuracy"] for line in lines]
    ax.plot(tokens, _smooth(train, len(train) // 60), color=QUIET, lw=1.0, label="training, own objective")
    for source, colour in colours.items():
        key = f"eval/causal_lm/{source}/{what}"
        points = [(x, line[key]) for x, line in zip(tokens, lines, strict=True) if key in line]
        ax.plot(*zip(*points, strict=True), color=colour, lw=1.8, marker="o", ms=3.5, label=source)
    title = "Loss on held-back text" if what == "loss" else "Token accuracy on held-back text"
    ax.set_title(f"{title} (causal LM)")
    ax.set_ylabel("nats per token" if what == "loss" else "share of tokens")
    ax.legend(loc="upper right" if what == "loss" else "upper left")


def _bars(ax: Axes, bars: dict[str, dict[str, float]], colours: dict[str, str], right: float) -> None:
    for source, bar in bars.items():
        for name, style in (("unigram", ":"), ("bigram", "--")):
            ax.hlines(bar[name], 0.93 * right, right, color=colours[source], lw=1.6, ls=style)
    ax.plot([], [], color="black", ls=":", label="unigram entropy")
    ax.plot([], [], color="black", ls="--", label="bigram model")
    ax.legend(loc="upper right", ncols=2)


def _mix(ax: Axes, lines: list[dict[str, Any]], tokens: np.ndarray, colours: dict[str, str]) -> None:
    window = len(lines) // 60
    shares = [_smooth([line.get(f"share/{source}", 0.0) for line in lines], window) for source in colours]
    ax.stackplot(tokens, shares, colors=list(colours.values()), labels=list(colours), alpha=0.9, lw=0)
    ax.set_ylim(0, 1)
    ax.set_title("Realised data mix")
    ax.set_ylabel("share of text tokens")
    ax.grid(False)
    bases = np.cumsum([np.zeros(len(tokens)), *shares[:-1]], 0)
    phases = np.array([line["phase"] for line in lines])
    for source, share, base in zip(colours, shares, bases, strict=True):
        for phase in np.unique(phases):
            mean, bottom = share[phases == phase].mean(), base[phases == phase].mean()
            at = tokens[phases == phase].mean()
            if mean > 0.06:
                ax.text(
                    at, bottom + mean / 2, f"{source} {mean:.0%}", color="white", ha="center", va="center"
                )


def _load(ax: Axes, lines: list[dict[str, Any]], tokens: np.ndarray, config: Config) -> None:
    layers = config.model.moe_layers
    ax.grid(False)
    if not layers:
        ax.text(0.5, 0.5, "dense model: no experts", ha="center", va="center", transform=ax.transAxes)
        return
    experts = config.model.num_experts
    columns = np.array_split(np.arange(len(lines)), min(len(lines), 120))
    load = np.array(
        [[lines[i][f"router/layer{layer:02d}/load"] for i in range(len(lines))] for layer in layers]
    )
    image = np.concatenate([load[j] for j in range(len(layers))], 1) * experts  # [steps, layers * experts]
    image = np.stack([image[column].mean(0) for column in columns], 1)
    shown = ax.imshow(
        image, aspect="auto", origin="lower", cmap="RdYlBu_r", vmin=0, vmax=2, interpolation="nearest",
        extent=(0, tokens[-1], 0, len(layers) * experts),
    )  # fmt: skip
    for j in range(1, len(layers)):
        ax.axhline(j * experts, color="white", lw=3)
    ax.set_yticks([(j + 0.5) * experts for j in range(len(layers))], [f"layer {layer}" for layer in layers])
    ax.set_title("Expert load, before dropping (1 = fair share)")
    ax.figure.colorbar(shown, ax=ax, pad=0.01, aspect=30)


def _name_phases(ax: Axes, lines: list[dict[str, Any]], tokens: np.ndarray) -> None:
    for at in _phase_middles(lines):
        ax.annotate(
            lines[at]["objective"].upper().replace("_", " "), (tokens[at], 0.02),
            xycoords=("data", "axes fraction"), ha="center", va="bottom", color="#222222", fontsize=9,
        )  # fmt: skip


def _phase_middles(lines: list[dict[str, Any]]) -> list[int]:
    phases = np.array([line["phase"] for line in lines])
    return [int(np.flatnonzero(phases == phase).mean()) for phase in np.unique(phases)]


def _switches(lines: list[dict[str, Any]], tokens: np.ndarray) -> list[float]:
    """Where the phase changes, in shown tokens."""
    return [float(tokens[i]) for i in range(len(lines) - 1) if lines[i + 1]["phase"] != lines[i]["phase"]]


def _smooth(values: list[float], window: int) -> np.ndarray:
    """Mean over the last `window` values."""
    sums = np.concatenate(([0.0], np.cumsum(values)))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - max(1, window))
    return (sums[ends] - sums[starts]) / (ends - starts)


def _unit(tokens: float) -> tuple[float, str]:
    for power, name in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")):
        if tokens >= power:
            return power, name
    return 1.0, "tokens"
