"""The picture of a plan: memory and time of the best layouts, by kind."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from openmoe.plan.cluster import ClusterConfig
from openmoe.plan.search import Candidate

COLOURS = [
    "#0b6e99",
    "#3f7cac",
    "#8fb8de",
    "#d9822b",
    "#c0504d",
    "#5b8c5a",
    "#a3a847",
    "#8e5572",
    "#444444",
    "#bbbbbb",
]
GIB = 2**30


def draw(candidates: Sequence[Candidate], cluster: ClusterConfig, path: Path) -> None:
    """Write both panels to `path`; the candidates fit."""
    names = [_name(candidate) for candidate in candidates]
    memory = [
        {kind.replace("_", " "): size / GIB for kind, size in vars(candidate.memory).items()}
        for candidate in candidates
    ]
    seconds = [
        candidate.seconds.compute | {"waiting for others": candidate.seconds.waiting}
        for candidate in candidates
        if candidate.seconds is not None
    ]
    height = 2.2 + 0.42 * len(candidates)
    figure, (left, right) = plt.subplots(1, 2, figsize=(15, height), sharey=True, layout="constrained")
    _bars(left, names, memory, "memory of a device (GiB)")
    left.axvline((cluster.memory_bytes - cluster.reserved_bytes) / GIB, color="#222222", ls="--", lw=1)
    _bars(right, names, seconds, "time of a step (s)")
    left.invert_yaxis()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _bars(ax: Axes, names: list[str], stacks: Sequence[dict[str, float]], title: str) -> None:
    kinds = list(dict.fromkeys(kind for stack in stacks for kind in stack))
    start = [0.0] * len(names)
    for kind, colour in zip(kinds, COLOURS, strict=False):
        sizes = [stack.get(kind, 0.0) for stack in stacks]
        ax.barh(names, sizes, left=start, color=colour, label=kind, height=0.7)
        start = [a + b for a, b in zip(start, sizes, strict=True)]
    ax.set_title(title, loc="left", fontweight="bold")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="x", color="#e6e8eb")
    ax.set_axisbelow(True)
    ax.legend(ncols=5, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.08), frameon=False)


def _name(candidate: Candidate) -> str:
    topology = candidate.step.topology
    degrees = f"{topology.replicate} x {topology.shard} x {topology.tensor}, expert {topology.expert}"
    return f"{degrees}\n{candidate.step.parallel.recompute}, {candidate.step.micro_batch_rows} rows"
