"""Optimizers on parts of parameters against the whole: ranks are threads, and a sum is a meeting of them.

The axes of a grid are the groups. All comparisons are in float64 and to 1e-12 unless they say more.
"""

import math
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from openmoe.optim import adafactor
from openmoe.optim.adafactor import Adafactor
from openmoe.optim.build import build_optimizer, set_learning_rate, state_dims
from openmoe.optim.config import AdafactorConfig, AdamWConfig
from openmoe.optim.factor_rules import FactorRule
from tests.optim.test_adafactor import NoHostSync

CONFIG = AdafactorConfig(name="adafactor", min_dim_size_to_factor=16)
ADAMW = AdamWConfig(name="adamw", weight_decay=0.5)
# Scales of the gradients: a rise is clipped, a fall makes old moments count for more than new ones.
GRADIENT_SCALES = (1.0, 30.0, 0.1, 3.0)

Splits = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Grids:
    """Row-major grids of named axes over the same ranks. An axis cuts as FSDP does: ceiling lengths first."""

    grids: tuple[dict[str, int], ...]

    @property
    def ranks(self) -> int:
        return math.prod(self.grids[0].values())

    def coordinates(self, rank: int, grid: dict[str, int]) -> dict[str, int]:
        found = {}
        for axis, size in reversed(grid.items()):
            rank, found[axis] = divmod(rank, size)
        return found

    def peers(self, rank: int, groups: frozenset[str]) -> list[int]:
        """The ranks in the product of the groups, all of one grid."""
        grid = next(grid for grid in self.grids if groups <= grid.keys())
        others = [
            {axis: at for axis, at in self.coordinates(r, grid).items() if axis not in groups}
            for r in range(self.ranks)
        ]
        return [r for r in range(self.ranks) if others[r] == others[rank]]

    def part(self, whole: Tensor, splits: Sequence[tuple[str, ...]], rank: int) -> Tensor:
        at = {axis: i for grid in self.grids for axis, i in self.coordinates(rank, grid).items()}
        size = {axis: n for grid in self.grids for axis, n in grid.items()}
        for dim, axes in enumerate(splits):
            for axis in axes:
                length = whole.shape[dim]
                run = -(-length // size[axis])
                start = min(at[axis] * run, length)
                whole = whole.narrow(dim, start, min(run, length - start))
        return whole.clone()


@dataclass
class Meeting:
    """Where the ranks of one run put down their parts."""

    ranks: int
    barrier: threading.Barrier = field(init=False)
    tables: list[Sequence[tuple[Tensor, frozenset[str]]]] = field(init=False)

    def __post_init__(self) -> None:
        self.barrier = threading.Barrier(self.ranks, timeout=20)
        self.tables = [()] * self.ranks


@dataclass
class ThreadShards:
    """`Shards` of one rank."""

    grids: Grids
    whole: dict[str, tuple[int, ...]]
    cuts: dict[str, Splits]
    rank: int
    meeting: Meeting
    elements: list[int] = field(default_factory=list)  # sent in each call

    def shape(self, name: str) -> tuple[int, ...]:
        return self.whole[name]

    def splits(self, name: str) -> Splits:
        return self.cuts[name]

    def sum_(self, parts: Sequence[tuple[Tensor, frozenset[str]]]) -> None:
        self.meeting.tables[self.rank] = parts
        self.meeting.barrier.wait()
        tables = self.meeting.tables
        assert {len(table) for table in tables} == {len(parts)}
        sums = []
        for i, (tensor, groups) in enumerate(parts):
            assert groups
            terms = [tables[peer][i] for peer in self.grids.peers(self.rank, groups)]
            assert all(term.shape == tensor.shape and theirs == groups for term, theirs in terms)
            sums.append(sum((term for term, _ in terms[1:]), terms[0][0].clone()))
        self.meeting.barrier.wait()
        for (tensor, _), total in zip(parts, sums, strict=True):
            tensor.copy_(total)
        self.elements.append(sum(tensor.numel() for tensor, _ in parts))


def on_all_ranks(meeting: Meeting, work: Callable[[int], dict]) -> list[dict]:
    """Results of the ranks; the first failure of one frees the others."""

    def one(rank: int) -> dict:
        try:
            return work(rank)
        except BaseException:
            meeting.barrier.abort()
            raise

    with ThreadPoolExecutor(meeting.ranks) as pool:
        jobs = [pool.submit(one, rank) for rank in range(meeting.ranks)]
    errors = [error for job in jobs if (error := job.exception()) is not None]
    for error in sorted(errors, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
        raise error
    return [job.result() for job in jobs]


def ramp(shape: tuple[int, ...], seed: int) -> Tensor:
    """Random values that grow along every dimension, so that no part has the statistics of the whole."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for dim, length in enumerate(shape):
        growth = 0.2 + torch.arange(length, dtype=torch.float64) / length
        values *= growth.view([-1 if d == dim else 1 for d in range(len(shape))])
    return values


def gradients(shapes: dict[str, tuple[int, ...]], step: int) -> dict[str, Tensor]:
    return {
        name: ramp(shape, 1000 * step + i) * GRADIENT_SCALES[step]
        for i, (name, shape) in enumerate(shapes.items())
    }


def train(
    optimizer: torch.optim.Optimizer,
    params: dict[str, Tensor],
    gradient_of: Callable[[int, str], Tensor | None],
) -> None:
    for step in range(len(GRADIENT_SCALES)):
        for name, param in params.items():
            param.grad = gradient_of(step, name)
        set_learning_rate(optimizer, 0.01)
        optimizer.step()


def result_of(optimizer: torch.optim.Optimizer, params: dict[str, Tensor]) -> dict[str, Tensor]:
    """<name> -> parameter, <name>/<key> -> state."""
    states = {
        f"{name}/{key}": value for name, p in params.items() for key, value in optimizer.state[p].items()
    }
    return {name: p.detach() for name, p in params.items()} | states


def compare_with_whole(
    grids: Grids,
    layout: dict[str, tuple[tuple[int, ...], Splits]],
    config: AdafactorConfig | AdamWConfig = CONFIG,
    without_gradient: tuple[int, str] | None = None,
) -> list[ThreadShards]:
    """Trains the parameters {name: (shape, splits)} whole and in parts; the shards, with what they sent."""
    shapes = {name: shape for name, (shape, _) in layout.items()}
    cuts = {name: splits for name, (_, splits) in layout.items()}
    start = {name: ramp(shape, 77 + i) * 0.1 for i, (name, shape) in enumerate(shapes.items())}
    grads = [gradients(shapes, step) for step in range(len(GRADIENT_SCALES))]

    params = {name: value.clone().requires_grad_() for name, value in start.items()}
    optimizer = build_optimizer(config, params.items())
    train(optimizer, params, lambda s, n: None if (s, n) == without_gradient else grads[s][n])
    whole = result_of(optimizer, params)
    dims = {name: tuple(range(len(shape))) for name, shape in shapes.items()}
    for name, keys in state_dims(optimizer).items():
        dims |= {f"{name}/{key}": kept for key, kept in keys.items()}
    assert dims.keys() == whole.keys()

    meeting = Meeting(grids.ranks)
    shards = [ThreadShards(grids, shapes, cuts, rank, meeting) for rank in range(grids.ranks)]

    def work(rank: int) -> dict[str, Tensor]:
        mine = {name: grids.part(value, cuts[name], rank).requires_grad_() for name, value in start.items()}
        own = build_optimizer(config, mine.items(), shards[rank])
        train(
            own,
            mine,
            lambda s, n: None if (s, n) == without_gradient else grids.part(grads[s][n], cuts[n], rank),
        )
        return result_of(own, mine)

    copies: dict[tuple, Tensor] = {}
    for rank, found in enumerate(on_all_ranks(meeting, work)):
        assert found.keys() == whole.keys()
        for key, tensor in found.items():
            splits = [cuts[key.split("/")[0]][d] for d in dims[key]]
            expected = grids.part(whole[key], splits, rank)
            torch.testing.assert_close(
                tensor, expected, rtol=1e-12, atol=1e-14, msg=lambda m, k=key: f"{k}: {m}"
            )
            # Ranks that hold the same part must never drift apart.
            runs = [
                tuple(grids.part(torch.arange(n), [s], rank).tolist())
                for n, s in zip(whole[key].shape, splits, strict=True)
            ]
            copy = copies.setdefault((key, *runs), tensor)
            assert torch.equal(tensor, copy), f"{key}: rank {rank} differs from a copy"
    return shards


def one_grid(**axes: int) -> Grids:
    return Grids((axes,))


S, T, E, X = ("shard",), ("tensor",), ("expert",), ("expert_shard",)
WHOLE: tuple[str, ...] = ()
DENSE, EXPERT = one_grid(shard=2, tensor=2), one_grid(expert_shard=2, expert=2)
FOUR = one_grid(shard=4)


@pytest.mark.parametrize("tile_elements", [50, 2**18])
@pytest.mark.parametrize(
    ("grids", "name", "shape", "splits"),
    [
        pytest.param(FOUR, "attention.q.weight", (40, 32), (S, WHOLE), id="column side split"),
        pytest.param(FOUR, "attention.q.weight", (40, 33), (WHOLE, S), id="row side split"),
        pytest.param(FOUR, "attention.o.weight", (32, 41), (S, WHOLE), id="row side split, left"),
        pytest.param(FOUR, "attention.o.weight", (32, 41), (WHOLE, S), id="column side split, right"),
        pytest.param(DENSE, "embedding.weight", (41, 33), (S, T), id="both sides"),
        pytest.param(DENSE, "attention.o.weight", (33, 41), (S, T), id="both sides, row left"),
        pytest.param(DENSE, "embedding.weight", (41, 32), (T + S, WHOLE), id="one side by two groups"),
        pytest.param(DENSE, "embedding.weight", (41, 32), (WHOLE, T), id="copies in another group"),
        pytest.param(one_grid(shard=7), "head.weight", (16, 17), (S, WHOLE), id="an empty part of a side"),
        pytest.param(FOUR, "final_norm.scale", (7,), (S,), id="scale, uneven"),
        pytest.param(FOUR, "final_norm.scale", (5,), (S,), id="scale, an empty part"),
        pytest.param(FOUR, "moe.router.weight", (4, 30), (S, WHOLE), id="not factored, dim 0"),
        pytest.param(FOUR, "moe.router.weight", (4, 30), (WHOLE, S), id="not factored, dim 1"),
        pytest.param(DENSE, "moe.router.weight", (4, 30), (S, T), id="not factored, both"),
        pytest.param(FOUR, "ffn.wi_0", (2, 24, 40), (WHOLE, S, WHOLE), id="wi_0, F split"),
        pytest.param(FOUR, "ffn.wi_0", (2, 24, 40), (S, WHOLE, WHOLE), id="wi_0, halves split, two empty"),
        pytest.param(DENSE, "ffn.wi_0", (2, 24, 40), (S, T, WHOLE), id="wi_0, halves and F"),
        pytest.param(DENSE, "ffn.wi_0", (2, 24, 40), (S, WHOLE, T), id="wi_0, halves and D"),
        pytest.param(EXPERT, "moe.experts.wi_0", (4, 2, 6, 20), (E, WHOLE, X, WHOLE), id="experts, F split"),
        pytest.param(EXPERT, "moe.experts.wi_0", (4, 2, 6, 20), (E, X, WHOLE, WHOLE), id="experts, halves"),
        pytest.param(EXPERT, "moe.experts.wo", (4, 20, 6), (E, X, WHOLE), id="experts, dim 1 split"),
        pytest.param(EXPERT, "moe.experts.wo", (1, 20, 6), (E, X, WHOLE), id="no expert, dim 1 split"),
        pytest.param(EXPERT, "moe.experts.wo", (4, 20, 7), (WHOLE, E, X), id="experts whole, both sides"),
    ],
)
def test_parts_train_as_the_whole(
    grids: Grids,
    name: str,
    shape: tuple[int, ...],
    splits: Splits,
    tile_elements: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A sum over the wrong side's groups, a mean over local elements, RMS or clip of a part, factoring
    decided on the part, an empty part that raises: training would depend on the layout."""
    monkeypatch.setattr(adafactor, "CPU_TILE_ELEMENTS", tile_elements)
    for shards in compare_with_whole(grids, {name: (shape, splits)}):
        assert len(shards.elements) == 2 * len(GRADIENT_SCALES)


@pytest.mark.parametrize(
    ("grids", "shape", "splits"),
    [
        pytest.param(FOUR, (8, 2, 6, 20), (S, WHOLE, WHOLE, WHOLE), id="even"),
        pytest.param(FOUR, (3, 2, 6, 20), (S, WHOLE, WHOLE, WHOLE), id="a rank without experts"),
        pytest.param(EXPERT, (6, 2, 6, 20), (E + X, WHOLE, WHOLE, WHOLE), id="two groups, uneven"),
    ],
)
def test_experts_split_over_ranks_send_nothing(grids: Grids, shape: tuple[int, ...], splits: Splits) -> None:
    """Statistics of all experts together, or a collective that experts don't need."""
    for shards in compare_with_whole(grids, {"moe.experts.wi_0": (shape, splits)}):
        assert not shards.elements


# Two grids over the same four ranks, and what a layout of tensor=2, shard=2, expert=2 may give them.
BOTH = Grids(({"shard": 2, "tensor": 2}, {"expert_shard": 2, "expert": 2}))
MODEL: dict[str, tuple[tuple[int, ...], Splits]] = {
    "embedding.weight": ((50, 24), (T + S, WHOLE)),
    "layers.0.attention_norm.scale": ((24,), (S,)),
    "layers.0.attention.q.weight": ((32, 24), (T + S, WHOLE)),
    "layers.0.attention.o.weight": ((24, 32), (S, T)),
    "layers.0.ffn.wi_0": ((2, 18, 24), (S, T, WHOLE)),
    "layers.0.ffn.wo": ((24, 18), (S, T)),
    "layers.1.moe.router.weight": ((4, 24), (S, WHOLE)),
    "layers.1.moe.experts.wi_0": ((4, 2, 18, 24), (E + X, WHOLE, WHOLE, WHOLE)),
    "layers.1.moe.experts.wo": ((4, 24, 18), (E, X, WHOLE)),
    "head.weight": ((50, 24), (WHOLE, WHOLE)),
}


@pytest.mark.parametrize("config", [CONFIG, ADAMW], ids=lambda config: config.name)
def test_a_model_on_two_grids(config: AdafactorConfig | AdamWConfig) -> None:
    """Sums of one parameter taken for another's, a call for each parameter, a missing gradient on one step
    that shifts the list; AdamW's decay decided by anything but the number of dimensions."""
    frozen = (1, "layers.1.moe.router.weight")
    calls = 2 * len(GRADIENT_SCALES) if config is CONFIG else 0
    for shards in compare_with_whole(BOTH, MODEL, config, without_gradient=frozen):
        assert len(shards.elements) == calls


def test_adamw_takes_empty_parts() -> None:
    """A kernel that refuses a tensor without elements."""
    compare_with_whole(FOUR, {"ffn.wi_0": ((2, 3, 4), (S, WHOLE, WHOLE)), "norm.scale": ((5,), (S,))}, ADAMW)


@pytest.mark.parametrize("seed", range(30))
def test_any_split_trains_as_the_whole(seed: int) -> None:
    """A shape, a side or a group that the cases above don't have."""
    draw = random.Random(seed)
    layout: dict[str, tuple[tuple[int, ...], Splits]] = {}
    for name, dims in (
        ("attention.o.weight", 2),
        ("ffn.wi_0", 3),
        ("moe.experts.wi_0", 4),
        ("moe.experts.wo", 3),
        ("final_norm.scale", 1),
    ):
        cuts: list[tuple[str, ...]] = [()] * dims
        for axis in draw.sample(("a", "b"), 2):
            dim = draw.randint(0, dims)  # the last one: held whole
            if dim < dims:
                cuts[dim] = (*cuts[dim], axis)
        layout[name] = tuple(draw.randint(1, 7) for _ in range(dims)), tuple(cuts)
    config = AdafactorConfig(name="adafactor", min_dim_size_to_factor=3)
    compare_with_whole(one_grid(a=2, b=3), layout, config)


@pytest.mark.parametrize(
    ("grids", "name", "shape", "splits", "elements"),
    [
        # p^2, the factors of the part; all g^2 and old v_row where the row side (here D) is split.
        pytest.param(DENSE, "embedding.weight", (40, 32), (S, T), [1 + 20 + 16 + 1 + 1, 1], id="both sides"),
        pytest.param(DENSE, "embedding.weight", (40, 32), (T + S, WHOLE), [1 + 32, 1], id="columns"),
        pytest.param(FOUR, "embedding.weight", (40, 32), (WHOLE, S), [1 + 40 + 1 + 1, 1], id="rows"),
        pytest.param(FOUR, "final_norm.scale", (32,), (S,), [1, 1], id="not factored"),
        pytest.param(
            EXPERT, "moe.experts.wo", (4, 24, 18), (E, X, WHOLE), [2 + 2 * 18 + 2 + 2, 2], id="experts"
        ),
    ],
)
def test_what_travels(
    grids: Grids, name: str, shape: tuple[int, ...], splits: Splits, elements: list[int]
) -> None:
    """A sum that is whole already and sent all the same, or one of the parameter's size."""
    for shards in compare_with_whole(grids, {name: (shape, splits)}):
        assert shards.elements == elements * len(GRADIENT_SCALES)


def test_state_dims_of_both_optimizers() -> None:
    """A checkpoint that takes v_col's second dimension for the parameter's, or AdamW's count for a tensor of
    its shape: the state would be put together from wrong parts."""
    shapes = {
        "layers.1.moe.experts.wi_0": (4, 2, 18, 24),
        "layers.1.moe.experts.wo": (4, 24, 18),
        "head.weight": (50, 24),
        "final_norm.scale": (24,),
    }
    params = {name: torch.ones(shape, requires_grad=True) for name, shape in shapes.items()}
    optimizer = build_optimizer(CONFIG, params.items())
    assert state_dims(optimizer) == {
        "layers.1.moe.experts.wi_0": {"v_row": (0, 3), "v_col": (0, 1, 2)},
        "layers.1.moe.experts.wo": {"v_row": (0, 1), "v_col": (0, 2)},
        "head.weight": {"v_row": (1,), "v_col": (0,)},
        "final_norm.scale": {"v": (0,)},
    }
    optimizer = build_optimizer(ADAMW, params.items())
    found = state_dims(optimizer)
    assert found["head.weight"] == {"step": (), "exp_avg": (0, 1), "exp_avg_sq": (0, 1)}
    assert found.keys() == shapes.keys()
    for name, param in params.items():
        for key, kept in found[name].items():
            assert optimizer.state[param][key].shape == tuple(shapes[name][d] for d in kept), (name, key)


class Alone:
    """Shards of a rank whose groups add nothing."""

    def shape(self, name: str) -> tuple[int, ...]:
        return MODEL[name][0]

    def splits(self, name: str) -> Splits:
        return MODEL[name][1]

    def sum_(self, parts: Sequence[tuple[Tensor, frozenset[str]]]) -> None:
        assert all(tensor.is_contiguous() for tensor, _ in parts)


def test_no_host_sync_on_parts() -> None:
    """A value read back to the host between the phases: every rank would wait for the slowest one twice."""
    params = {
        name: BOTH.part(torch.ones(shape), splits, 3).to("meta").requires_grad_()
        for name, (shape, splits) in MODEL.items()
    }
    optimizer = build_optimizer(CONFIG, params.items(), Alone())
    for param in params.values():
        param.grad = torch.zeros_like(param)
    with NoHostSync():
        optimizer.step()


@pytest.mark.parametrize(
    ("shape", "part", "splits", "message"),
    [
        ((6, 4), (3, 4), (WHOLE, WHOLE), "dimension 0 has 3 of 6 elements here and is shared by no group"),
        ((6, 4), (6, 5), (WHOLE, S), r"dimension 1 has 5 of 4 elements .* allowed at most 4"),
        ((6, 4), (6, 4), (S,), "equally many dimensions"),
        ((6, 4), (24,), (WHOLE,), "equally many dimensions"),
        ((6, 4), (3, 2), (S, S), "allowed each group once"),
    ],
)
def test_a_part_that_contradicts_the_layout_is_refused(
    shape: tuple[int, ...], part: tuple[int, ...], splits: Splits, message: str
) -> None:
    """A parameter and a table out of step: means over wrong counts, silently."""
    shards = ThreadShards(FOUR, {"w": shape}, {"w": splits}, 0, Meeting(4))
    param = torch.ones(part, requires_grad=True)
    with pytest.raises(ValueError, match=f"^w: .*{message}"):
        Adafactor([("w", param)], {"w": FactorRule(shape, 0, 1)}, CONFIG, shards)
