"""Draws docs/figures/parallelism.png from the tables of training: `python docs/figures/parallelism.py`."""

from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

from openmoe.model.config import ModelConfig
from openmoe.model.decoder import Decoder
from openmoe.parallel.placement import parameter_layouts
from openmoe.parallel.topology import Topology

INK, SOFT = "#1f2933", "#65758b"
COLOURS = ["#3b7cb8", "#7fb0dd", "#3f8f4f", "#8fc79b", "#d08a1d", "#f3c877", "#7a58b8", "#b9a3de"]
TOPOLOGY = Topology(8, replicate=2, shard=2, tensor=2, expert=4)
ROWS, SEQ_LEN = 8, 8
MODEL = ModelConfig(
    vocab_size=16, d_model=8, n_layers=1, n_heads=4, head_dim=2, d_ff=8, moe_every=1, num_experts=8, top_k=2
)  # fmt: skip


def part(ax: Axes, left: float, top: float, width: float, height: float, ranks: list[int]) -> None:
    """A part of a tensor in the colour of the first rank that holds it, with the numbers of all."""
    ax.add_patch(Rectangle((left, top), width, height, fc=COLOURS[ranks[0]], ec="white", lw=2))
    text = ", ".join(map(str, ranks))
    x, y = left + width / 2, top + height / 2
    ax.text(
        x, y, text, ha="center", va="center", size=11, color=INK if ranks[0] % 2 else "white", weight="bold"
    )


def panel(ax: Axes, title: str, below: str, height: float, width: float, across: str, down: str) -> None:
    ax.set_xlim(-0.02 * width, 1.02 * width)
    ax.set_ylim(1.02 * height, -0.02 * height)
    ax.set_xticks([])
    ax.set_yticks([])
    for spine in ax.spines.values():
        spine.set_visible(False)
    ax.set_title(f"{title}\n", size=13, weight="bold", color=INK)
    ax.text(0.5, 1.02, below, transform=ax.transAxes, ha="center", va="bottom", size=10, color=SOFT)
    ax.set_xlabel(across, size=10, color=INK)
    ax.set_ylabel(down, size=10, color=INK)


def batch(ax: Axes) -> None:
    panel(ax, "Rows of a batch", "between the matrices", ROWS, SEQ_LEN, "positions", "rows")
    for rank in range(TOPOLOGY.world_size):
        rows = TOPOLOGY.rows_of(rank, ROWS)
        width = SEQ_LEN // TOPOLOGY.tensor
        left = TOPOLOGY.coordinate("tensor", rank) * width
        part(ax, left, rows.start, width, rows.stop - rows.start, [rank])


def parameter(ax: Axes, name: str, title: str, below: str, across: str, down: str) -> None:
    with torch.device("meta"):
        layout = parameter_layouts(Decoder(MODEL), TOPOLOGY)[name]
    height, width = (*layout.shape, 2)[:2]
    panel(ax, title, below, height, width, across, down)
    holders: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for rank in range(TOPOLOGY.world_size):
        slices = layout.slices(TOPOLOGY, rank)
        holders.setdefault(tuple((piece.start, piece.stop) for piece in slices), []).append(rank)
    for pieces, ranks in holders.items():
        (top, bottom), (left, right) = pieces[0], pieces[1] if len(pieces) > 1 else (0, width)
        part(ax, left, top, right - left, bottom - top, ranks)


def main() -> None:
    figure, axes = plt.subplots(1, 5, figsize=(15, 4.6), width_ratios=[1.2, 1, 1, 1.2, 0.7])
    batch(axes[0])
    parameter(
        axes[1], "layers.0.attention.q.weight", "Query matrix", "tensor, then shard", "d_model", "heads"
    )
    parameter(axes[2], "layers.0.ffn.wo", "FFN output", "tensor by columns", "d_ff", "d_model")
    parameter(
        axes[3], "layers.0.moe.experts.wi_1", "Experts", "expert group, then its shards", "d_ff", "experts"
    )
    parameter(axes[4], "layers.0.moe_norm.scale", "Norm", "whole over tensor", "", "d_model")
    figure.text(
        0.5, 0.01,
        "8 ranks: replicate 2 × shard 2 × tensor 2; expert 4 × expert_shard 1 in each copy of the model. "
        "Numbers are the ranks that hold a part.",
        ha="center", size=11, color=INK,
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
