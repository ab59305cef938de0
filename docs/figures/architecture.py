"""Draws docs/figures/architecture.png: `python docs/figures/architecture.py`."""

from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyBboxPatch, Polygon

INK, SOFT, FAINT = "#1f2933", "#65758b", "#d5dce4"
BLUE, GREEN, AMBER, VIOLET, GREY, RED = "#cfe3f7", "#d3ecd6", "#fbdca4", "#e2d7f5", "#eef1f5", "#c2352b"
EDGE = {BLUE: "#3b7cb8", GREEN: "#3f8f4f", AMBER: "#d08a1d", VIOLET: "#7a58b8", GREY: "#8a97a8"}

TOKENS, EXPERTS, TOP_K, CAPACITY_FACTOR = 10, 4, 2, 1.25


def box(
    ax: Axes, x: float, y: float, width: float, height: float, text: str, fill: str, size: float = 11
) -> None:
    """A labelled box centred at x, with its lower edge at y."""
    style = "round,pad=0,rounding_size=0.8"
    ax.add_patch(
        FancyBboxPatch(
            (x - width / 2, y), width, height, boxstyle=style, fc=fill, ec=EDGE[fill], lw=1.3, zorder=3
        )
    )
    ax.text(x, y + height / 2, text, ha="center", va="center", size=size, color=INK, zorder=4)


def arrow(ax: Axes, *points: tuple[float, float], color: str = INK, head: bool = True) -> None:
    """A line through the points, with a head at the last one."""
    ax.plot(*zip(*points, strict=True), color=color, lw=1.4, solid_joinstyle="round", zorder=2)
    if head:
        ax.annotate(
            "",
            points[-1],
            points[-2],
            arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.4, "shrinkA": 0, "shrinkB": 0},
            zorder=2,
        )


def plus(ax: Axes, x: float, y: float) -> None:
    ax.add_patch(Circle((x, y), 1.5, fc="white", ec=INK, lw=1.4, zorder=5))
    ax.text(x, y - 0.08, "+", ha="center", va="center", size=15, color=INK, zorder=6)


def title(ax: Axes, x: float, text: str, below: str) -> None:
    ax.text(x, 92.5, text, ha="center", va="center", size=15, weight="bold", color=INK)
    ax.text(x, 89.0, below, ha="center", va="center", size=10.5, color=SOFT)


def decoder(ax: Axes) -> None:
    x, width = 14.0, 18.0
    title(ax, x, "Decoder", "Base: 12 layers, 3 with experts")
    ax.text(x, 4.2, "token ids", ha="center", va="center", size=11, color=INK)
    arrow(ax, (x, 5.8), (x, 8.4))
    box(ax, x, 8.5, width, 4.2, "embedding", GREY)
    for layer in range(12):
        moe = (layer + 1) % 4 == 0
        label = f"{layer}   MoE" if moe else f"{layer}   dense"
        box(ax, x, 15.6 + 4.75 * layer, width, 3.7, label, AMBER if moe else BLUE, 10)
    arrow(ax, (x, 12.7), (x, 15.5))
    arrow(ax, (x, 71.6), (x, 74.2))
    box(ax, x, 74.3, width, 3.8, "RMSNorm", GREY, 10.5)
    arrow(ax, (x, 78.1), (x, 80.3))
    box(ax, x, 80.4, width, 4.6, "head, 256,384 words", GREY, 10.5)


def zoom(ax: Axes, layer: int, left: float, fill: str) -> None:
    """The fan from a layer of the stack to the panel of its block."""
    bottom = 15.6 + 4.75 * layer
    ax.add_patch(
        Polygon(
            [(23, bottom), (23, bottom + 3.7), (left, 86), (left, 13)],
            fc=fill,
            ec="none",
            alpha=0.22,
            zorder=0,
        )
    )


def dense_block(ax: Axes) -> None:
    left, trunk, x = 32.5, 37.5, 50.0
    title(ax, 47.5, "Dense block", "Eq. 3")
    panel(ax, left, 62.5, BLUE)
    arrow(ax, (trunk, 9.5), (trunk, 84.5))
    ax.text(trunk, 7.8, "$x$", ha="center", va="center", size=14)
    branch(ax, trunk, x, 17, [("RMSNorm", GREY), ("causal attention\nRoPE", BLUE)])
    branch(ax, trunk, x, 57.6, [("RMSNorm", GREY), ("FFN\nSwiGLU", GREEN)])
    ax.text(47.5, 2.6, r"$x \leftarrow x + \mathrm{Attn}(\mathrm{norm}_1(x))$", ha="center", size=12)
    ax.text(47.5, -1.6, r"$x \leftarrow x + \mathrm{FFN}(\mathrm{norm}_2(x))$", ha="center", size=12)


def panel(ax: Axes, left: float, right: float, fill: str) -> None:
    ax.add_patch(
        FancyBboxPatch(
            (left, 13), right - left, 73, boxstyle="round,pad=0,rounding_size=1.5", fc="white", ec=EDGE[fill],
            lw=1.2, zorder=1,
        )
    )  # fmt: skip


def branch(ax: Axes, trunk: float, x: float, y: float, parts: list[tuple[str, str]]) -> None:
    """Sub-layers that leave the trunk at y and are added back above."""
    arrow(ax, (trunk, y), (x, y), (x, y + 3))
    at = y + 3
    for i, (text, fill) in enumerate(parts):
        height = 4.4 if "\n" not in text else 7.0
        box(ax, x, at, 17, height, text, fill)
        at += height
        if i < len(parts) - 1:
            arrow(ax, (x, at), (x, at + 3))
            at += 3
    arrow(ax, (x, at), (x, at + 4), (trunk + 1.5, at + 4))
    plus(ax, trunk, at + 4)


def moe_block(ax: Axes) -> None:
    left, trunk = 67.5, 72.0
    title(ax, 89.0, "MoE block", "Eq. 4: experts beside a residual FFN, one norm for both")
    panel(ax, left, 111.0, AMBER)
    arrow(ax, (trunk, 9.5), (trunk, 84.5))
    ax.text(trunk, 7.8, "$x$", ha="center", va="center", size=14)
    branch(ax, trunk, 82.5, 17, [("RMSNorm", GREY), ("causal attention\nRoPE", BLUE)])
    ffn, moe = 82.5, 100.8
    arrow(ax, (trunk, 41.5), (ffn, 41.5), (ffn, 43.5))
    box(ax, ffn, 43.5, 17, 4.4, "RMSNorm", GREY)
    arrow(ax, (ffn, 47.9), (ffn, 62.0))
    arrow(ax, (ffn, 50.0), (moe, 50.0), (moe, 51.8))
    ax.text(83.7, 51.2, "$h$", size=13, color=INK)
    box(ax, ffn, 62.0, 15, 7.0, "FFN\nSwiGLU", GREEN)
    box(ax, moe, 51.8, 16.5, 5.4, "router, float32\nsoftmax, top-2", VIOLET, 10)
    arrow(ax, (moe, 57.2), (moe, 59.0))
    ax.add_patch(
        FancyBboxPatch(
            (moe - 8.25, 59), 16.5, 13.4, boxstyle="round,pad=0,rounding_size=0.8", fc="#fff7e6",
            ec=EDGE[AMBER], lw=1.3, zorder=3,
        )
    )  # fmt: skip
    for i, name in enumerate(("$E_0$", "$E_1$", "…", "$E_{15}$")):
        box(ax, moe - 6.0 + 4.0 * i, 64.6, 3.4, 6.4, name, AMBER if i != 2 else GREY, 10)
    ax.text(moe, 61.8, "16 experts, SwiGLU", ha="center", va="center", size=10, color=INK, zorder=4)
    arrow(ax, (ffn, 69.0), (ffn, 77.5))
    arrow(ax, (moe, 72.4), (moe, 79.0), (ffn + 1.5, 79.0))
    arrow(ax, (ffn, 79.0), (trunk + 1.5, 79.0))
    plus(ax, trunk, 79.0)
    plus(ax, ffn, 79.0)
    attention = r"x \leftarrow x + \mathrm{Attn}(\mathrm{norm}_1(x))"
    ax.text(89, 2.6, rf"${attention}, \quad h = \mathrm{{norm}}_2(x)$", ha="center", size=12)
    ax.text(89, -1.6, r"$x \leftarrow x + \mathrm{MoE}(h) + \mathrm{FFN}(h)$", ha="center", size=12)


def routing(ax: Axes) -> None:
    """One group routed by the model's own rule, from made-up probabilities."""
    left, cell = 124.0, 3.7
    rng = np.random.default_rng(5)
    logits = rng.normal(0, 1.1, (TOKENS, EXPERTS)) + np.array([0.7, 0.0, 0.3, -0.4])
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    choices = np.argsort(-probs, axis=1, kind="stable")[:, :TOP_K]
    capacity = round(CAPACITY_FACTOR * TOKENS / EXPERTS)

    title(ax, 141.5, "Routing", f"one group of {TOKENS} tokens, {EXPERTS} experts, {capacity} slots each")
    heading(ax, 84.3, "1", "Probabilities; each token's first and second choice")
    top = 79.0
    for t in range(TOKENS):
        ax.text(left + (t + 0.5) * cell, top + 1.1, str(t), ha="center", va="center", size=9.5, color=SOFT)
        for e in range(EXPERTS):
            corner = (left + t * cell, top - (e + 1) * cell)
            shade = plt.get_cmap("Purples")(0.05 + 0.6 * probs[t, e])
            ax.add_patch(plt.Rectangle(corner, cell, cell, fc=shade, ec="white", lw=1.5))
            if e in choices[t]:
                rank = list(choices[t]).index(e)
                ax.text(
                    corner[0] + cell / 2, corner[1] + cell / 2, "1st" if rank == 0 else "2nd", ha="center",
                    va="center", size=8.5, color=INK, weight="bold" if rank == 0 else "normal",
                )  # fmt: skip
    for e in range(EXPERTS):
        expert_label(ax, left, top - (e + 0.5) * cell, e)
    ax.text(left - 1.0, top + 1.1, "token", ha="right", va="center", size=9.5, color=SOFT)

    heading(ax, 58.6, "2", "Slots fill with all first choices, then all second ones")
    top = 55.0
    filled = [[(t, rank) for rank in range(TOP_K) for t in range(TOKENS) if choices[t, rank] == e]
              for e in range(EXPERTS)]  # fmt: skip
    for e, queue in enumerate(filled):
        y = top - (e + 1) * (cell + 0.9)
        expert_label(ax, left, y + cell / 2, e)
        for place in range(max(capacity, len(queue))):
            x = left + place * cell + (1.6 if place >= capacity else 0)
            kept = place < capacity
            taken = place < len(queue)
            first = taken and queue[place][1] == 0
            fill = "white" if not (taken and kept) else ("#f3b74f" if first else AMBER)
            ax.add_patch(
                plt.Rectangle(
                    (x, y), cell - 0.35, cell, fc=fill, ec=EDGE[AMBER] if kept else RED, lw=1.2,
                    ls="-" if kept else (0, (2, 2)),
                )
            )  # fmt: skip
            if taken:
                color = INK if kept else RED
                ax.text(
                    x + (cell - 0.35) / 2, y + cell / 2, str(queue[place][0]), ha="center", va="center",
                    size=10, color=color, weight="bold" if first else "normal",
                )  # fmt: skip
    edge = left + capacity * cell + 0.6
    ax.plot([edge, edge], [top - 4 * (cell + 0.9) - 0.6, top - 0.2], color=RED, lw=1.2)
    ax.text(edge - 0.8, top - 0.1, "capacity", ha="right", va="bottom", size=9.5, color=RED)
    ax.text(edge + 1.0, top - 0.1, "dropped", ha="left", va="bottom", size=9.5, color=RED)

    heading(ax, 30.6, "3", "Rows sorted by expert, one GEMM each, then combined")
    kept_by = {
        t: [e for e in range(EXPERTS) if t in [q[0] for q in filled[e][:capacity]]] for t in range(TOKENS)
    }
    two, one, none = (sum(len(kept_by[t]) == n for t in range(TOKENS)) for n in (2, 1, 0))
    combine = r"$\mathrm{MoE}(h_t) = \sum_{e\ \mathrm{kept}}\ p_{t,e}\ E_e(h_t)$"
    ax.text(141.5, 25.6, combine, ha="center", va="center", size=14)
    lines = (
        "Gates are the raw probabilities, not renormalised.",
        f"capacity = round({CAPACITY_FACTOR} · tokens / experts), without the factor k",
        f"Here {two} tokens reach two experts, {one} reach one, {none} none.",
        "A token without an expert keeps its residual and the FFN.",
    )
    for i, line in enumerate(lines):
        ax.text(141.5, 19.6 - 3.1 * i, line, ha="center", va="center", size=10.5, color=SOFT)


def expert_label(ax: Axes, left: float, y: float, expert: int) -> None:
    ax.text(left - 1.0, y, f"$E_{expert}$", ha="right", va="center", size=11.5, color=INK)


def heading(ax: Axes, y: float, number: str, text: str) -> None:
    ax.add_patch(Circle((118.6, y), 1.5, fc=EDGE[VIOLET], ec="none"))
    ax.text(118.6, y - 0.05, number, ha="center", va="center", size=10, color="white", weight="bold")
    ax.text(121.4, y, text, ha="left", va="center", size=11, color=INK)


def main() -> None:
    figure = plt.figure(figsize=(17.0, 10.1))
    ax = figure.add_axes((0, 0, 1, 1))
    ax.set_xlim(-1, 169)
    ax.set_ylim(-5, 96)
    ax.axis("off")
    decoder(ax)
    zoom(ax, 4, 32.5, BLUE)
    dense_block(ax)
    moe_block(ax)
    routing(ax)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=130, facecolor="white")


if __name__ == "__main__":
    main()
