"""The layout of processes: its tables against other formulas, and what is said where nothing fits."""

import subprocess
import sys
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openmoe.model.config import ModelConfig
from openmoe.parallel.config import ParallelConfig
from openmoe.parallel.topology import GROUP_NAMES, GroupName, Topology, TopologyError, check_fit, resolve

MAX_RANKS = 1024


def layout(replicate: int, shard: int, tensor: int, expert: int) -> Topology:
    return Topology(replicate * shard * tensor, replicate, shard, tensor, expert)


def divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    """Any layout of up to 1024 ranks, powers of two or not."""
    world = draw(st.one_of(st.integers(1, MAX_RANKS), st.sampled_from([2**n for n in range(11)])))
    copy = draw(st.sampled_from(divisors(world)))
    tensor, expert = (draw(st.sampled_from(divisors(copy))) for _ in range(2))
    return Topology(world, world // copy, copy // tensor, tensor, expert)


@given(topologies())
@settings(max_examples=60, deadline=None)
def test_every_kind_of_group_covers_the_world_once(topology: Topology) -> None:
    """Catches a rank that is left out or counted twice by a sum, and a group of the wrong size."""
    for name in GROUP_NAMES:
        groups = topology.groups(name)
        assert sorted(rank for group in groups for rank in group) == list(range(topology.world_size)), name
        assert {len(group) for group in groups} == {topology.size(name)}, name
        for group in groups:
            assert all(topology.group(name, rank) == group for rank in group), name
            assert [topology.coordinate(name, rank) for rank in group] == list(range(len(group))), name


@given(topologies())
@settings(max_examples=60, deadline=None)
def test_both_grids_name_each_rank_once(topology: Topology) -> None:
    """Catches two ranks in one place of a grid: one slice held twice, another by nobody."""
    t = topology
    assert t.shard * t.tensor == t.expert_shard * t.expert
    for rank in range(t.world_size):
        at = {name: t.coordinate(name, rank) for name in GROUP_NAMES}
        assert rank == (at["replicate"] * t.shard + at["shard"]) * t.tensor + at["tensor"] == at["world"]
        assert rank == (at["replicate"] * t.expert_shard + at["expert_shard"]) * t.expert + at["expert"]
        assert at["data"] == at["loss"] == at["replicate"] * t.shard + at["shard"]
        assert at["expert_data"] == at["replicate"] * t.expert_shard + at["expert_shard"]


@given(topologies())
@settings(max_examples=60, deadline=None)
def test_groups_of_the_two_grids_fit_each_other(topology: Topology) -> None:
    """Catches experts spread over two copies of the model, or gradients of experts summed with a factor."""
    t = topology
    assert t.size("tensor") * t.size("data") == t.size("expert") * t.size("expert_data") == t.world_size
    assert t.size("expert_data") * t.size("expert") == t.replicate * t.shard * t.tensor
    complements: list[tuple[GroupName, GroupName]] = [("tensor", "data"), ("expert", "expert_data")]
    for first, second in complements:
        pairs = product(t.groups(first)[:8], t.groups(second)[:8])
        assert {len(set(a) & set(b)) for a, b in pairs} == {1}
    copies = {rank // (t.shard * t.tensor) for rank in t.group("expert", t.world_size - 1)}
    assert copies == {t.replicate - 1}


# By hand, 8 ranks: (replicate, shard, tensor, expert) -> groups as one writes them on paper.
BY_HAND: dict[tuple[int, int, int, int], dict[GroupName, list[list[int]]]] = {
    (1, 8, 1, 1): {
        "data": [[0, 1, 2, 3, 4, 5, 6, 7]],
        "expert": [[0], [1], [2], [3], [4], [5], [6], [7]],
        "expert_data": [[0, 1, 2, 3, 4, 5, 6, 7]],
    },
    (1, 8, 1, 4): {
        "tensor": [[0], [1], [2], [3], [4], [5], [6], [7]],
        "expert": [[0, 1, 2, 3], [4, 5, 6, 7]],
        "expert_shard": [[0, 4], [1, 5], [2, 6], [3, 7]],
        "expert_data": [[0, 4], [1, 5], [2, 6], [3, 7]],
    },
    (2, 2, 2, 4): {
        "tensor": [[0, 1], [2, 3], [4, 5], [6, 7]],
        "shard": [[0, 2], [1, 3], [4, 6], [5, 7]],
        "replicate": [[0, 4], [1, 5], [2, 6], [3, 7]],
        "data": [[0, 2, 4, 6], [1, 3, 5, 7]],
        "loss": [[0, 2, 4, 6], [1, 3, 5, 7]],
        "expert": [[0, 1, 2, 3], [4, 5, 6, 7]],
        "expert_shard": [[0], [1], [2], [3], [4], [5], [6], [7]],
        "expert_data": [[0, 4], [1, 5], [2, 6], [3, 7]],
        "world": [[0, 1, 2, 3, 4, 5, 6, 7]],
    },
    (2, 2, 2, 2): {
        "expert": [[0, 1], [2, 3], [4, 5], [6, 7]],
        "expert_shard": [[0, 2], [1, 3], [4, 6], [5, 7]],
        "expert_data": [[0, 2, 4, 6], [1, 3, 5, 7]],
    },
    (1, 2, 4, 2): {
        "tensor": [[0, 1, 2, 3], [4, 5, 6, 7]],
        "shard": [[0, 4], [1, 5], [2, 6], [3, 7]],
        "expert": [[0, 1], [2, 3], [4, 5], [6, 7]],
        "expert_shard": [[0, 2, 4, 6], [1, 3, 5, 7]],
    },
    (1, 1, 8, 8): {
        "tensor": [[0, 1, 2, 3, 4, 5, 6, 7]],
        "data": [[0], [1], [2], [3], [4], [5], [6], [7]],
        "expert": [[0, 1, 2, 3, 4, 5, 6, 7]],
        "expert_data": [[0], [1], [2], [3], [4], [5], [6], [7]],
    },
    (8, 1, 1, 1): {"shard": [[n] for n in range(8)], "expert_data": [[0, 1, 2, 3, 4, 5, 6, 7]]},
}


@pytest.mark.parametrize("degrees", BY_HAND)
def test_groups_written_by_hand(degrees: tuple[int, int, int, int]) -> None:
    """Catches axes in another order, which every check of sizes and coverage passes."""
    for name, groups in BY_HAND[degrees].items():
        assert [list(group) for group in layout(*degrees).groups(name)] == groups, name


@pytest.mark.parametrize(
    "degrees",
    [
        (1, 64, 8, 32),
        (4, 16, 8, 32),
        (1, 32, 4, 32),
        (2, 48, 1, 16),
        (1, 128, 8, 4),
        (3, 5, 4, 10),
        (16, 4, 8, 8),
    ],
)
def test_groups_by_another_formula(degrees: tuple[int, int, int, int]) -> None:
    """Catches an arithmetic of strides that holds at 8 ranks only: here the grids are arrays."""
    topology = layout(*degrees)
    ranks = np.arange(topology.world_size)
    dense, expert = ranks.reshape(topology.dense_shape), ranks.reshape(topology.expert_shape)
    axes: dict[GroupName, tuple[np.ndarray, tuple[int, ...]]] = {
        "tensor": (dense, (2,)),
        "shard": (dense, (1,)),
        "replicate": (dense, (0,)),
        "data": (dense, (0, 1)),
        "loss": (dense, (0, 1)),
        "world": (dense, (0, 1, 2)),
        "expert": (expert, (2,)),
        "expert_shard": (expert, (1,)),
        "expert_data": (expert, (0, 1)),
    }
    assert set(axes) == set(GROUP_NAMES)
    for name, (grid, varied) in axes.items():
        assert [list(group) for group in topology.groups(name)] == along(grid, varied), name


def along(grid: np.ndarray, axes: tuple[int, ...]) -> list[list[int]]:
    """Groups of ranks that differ along `axes` of a grid only, by their first rank."""
    last = np.moveaxis(grid, axes, range(grid.ndim - len(axes), grid.ndim))
    return sorted(last.reshape(-1, np.prod([grid.shape[axis] for axis in axes], dtype=int)).tolist())


@given(topologies(), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_rows_of_the_data_ranks_are_the_batch(topology: Topology, rows_per_rank: int) -> None:
    """Catches rows read twice or by nobody, and tensor ranks that share a row but read another one."""
    batch = list(range(rows_per_rank * topology.size("data")))
    for group in topology.groups("data"):
        assert [row for rank in group for row in batch[topology.rows_of(rank, len(batch))]] == batch
    for group in topology.groups("tensor"):
        assert len({str(topology.rows_of(rank, len(batch))) for rank in group}) == 1


@given(topologies(), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_each_expert_has_its_ranks(topology: Topology, experts_per_rank: int) -> None:
    """Catches an expert that nobody holds, or one whose gradients are summed over ranks that hold another."""
    experts = list(range(experts_per_rank * topology.expert))
    for group in topology.groups("expert"):
        assert [e for rank in group for e in experts[topology.experts_of(rank, len(experts))]] == experts
    for group in topology.groups("expert_data"):
        held = {str(topology.experts_of(rank, len(experts))) for rank in group}
        assert len(held) == 1
    holders = [
        e for rank in range(topology.world_size) for e in experts[topology.experts_of(rank, len(experts))]
    ]
    assert [holders.count(e) for e in experts[:4]] == [topology.size("expert_data")] * len(experts[:4])


@given(topologies())
@settings(max_examples=60, deadline=None)
def test_one_xla_mesh_holds_rows_matrices_and_experts(topology: Topology) -> None:
    """Catches devices of the XLA mesh that read other rows than the same rank under torch, and experts that
    would be spread over tensor ranks, each of which holds a slice of all of its group's."""
    if topology.shard % topology.expert:
        with pytest.raises(TopologyError, match=rf"a divisor of parallel\.shard={topology.shard} with"):
            topology.xla_shape()
        return
    mesh = np.arange(topology.world_size).reshape(topology.xla_shape())
    names: dict[GroupName, tuple[int, ...]] = {"tensor": (2,), "data": (0, 1)}
    for name, axes in names.items():
        assert [list(group) for group in topology.groups(name)] == along(mesh, axes), name
    assert mesh.shape[1] == topology.expert


DEGREE = st.integers(1, 6)


@given(replicate=DEGREE, shard=DEGREE, tensor=DEGREE, expert=DEGREE)
def test_degrees_multiply_to_the_world(replicate: int, shard: int, tensor: int, expert: int) -> None:
    """Catches a layout that leaves ranks out, or experts that don't divide the ranks they borrow."""
    world = replicate * shard * tensor
    config = ParallelConfig(replicate=replicate, shard=shard, tensor=tensor, expert=expert)
    if shard * tensor % expert:
        with pytest.raises(TopologyError, match=f"parallel.expert={expert}"):
            resolve(config, world)
        return
    topology = resolve(config, world)
    assert topology == resolve(config.model_copy(update={"shard": -1}), world)
    assert topology == layout(replicate, shard, tensor, expert)
    with pytest.raises(TopologyError, match=f"the {world + 1} processes"):
        resolve(config, world + 1)


TINY = {
    "vocab_size": 4480,
    "d_model": 128,
    "n_layers": 4,
    "n_heads": 4,
    "head_dim": 32,
    "d_ff": 256,
    "moe_every": 2,
    "num_experts": 8,
    "top_k": 2,
}


def check_tiny(
    degrees: tuple[int, int, int, int], seq_len: int = 256, rows: int = 16, micro: int = -1, **model: Any
) -> None:
    check_fit(layout(*degrees), ModelConfig(**(TINY | model)), seq_len, rows, micro)


# What is asked for; the line that answers, whole: key, value, allowed.
DOES_NOT_FIT: list[tuple[tuple[int, int, int, int], dict[str, Any], str]] = [
    ((1, 1, 8, 1), {}, "parallel.tensor=8 does not divide model.n_heads=4: allowed 1, 2, 4"),
    ((1, 1, 3, 1), {"n_heads": 6}, "parallel.tensor=3 does not divide model.d_ff=256: allowed 1, 2"),
    (
        (1, 1, 4, 1),
        {"vocab_size": 4482},
        "parallel.tensor=4 does not divide model.vocab_size=4482: allowed 1, 2",
    ),
    ((1, 1, 4, 1), {"seq_len": 250}, "parallel.tensor=4 does not divide train.seq_len=250: allowed 1, 2"),
    (
        (1, 16, 1, 16),
        {},
        "parallel.expert=16: allowed a divisor of model.num_experts=8 and of "
        "parallel.shard x parallel.tensor = 16: 1, 2, 4, 8",
    ),
    (
        (1, 2, 1, 2),
        {"moe_every": 0},
        "parallel.expert=2: allowed 1 for a model without experts (model.moe_every=0)",
    ),
    (
        (3, 2, 1, 1),
        {},
        "train.global_batch_rows=16: allowed a multiple of parallel.replicate x parallel.shard = 6",
    ),
    (
        (1, 16, 1, 1),
        {"group_rows": 2},
        "train.global_batch_rows=16: allowed a multiple of parallel.replicate x parallel.shard x "
        "model.group_rows = 32",
    ),
    (
        (3, 1, 1, 1),
        {"group_rows": 2},
        "train.global_batch_rows=16: allowed a multiple of parallel.replicate x parallel.shard x "
        "model.group_rows = 6",
    ),
    (
        (1, 2, 1, 1),
        {"group_rows": 2, "micro": 1},
        "train.micro_batch_rows=1: allowed -1 or whole routing groups (model.group_rows=2) and a divisor of "
        "the 8 rows of a data rank: 2, 4, 8",
    ),
    (
        (1, 4, 1, 1),
        {"micro": 8},
        "train.micro_batch_rows=8: allowed -1 or a divisor of the 4 rows of a data rank: 1, 2, 4",
    ),
    (
        (1, 2, 1, 1),
        {"group_rule": "flaxformer"},
        "model.group_rule=flaxformer: allowed rows where 2 processes train",
    ),
    (
        (2, 1, 1, 1),
        {"group_rule": "hugging_face", "capacity_includes_k": True},
        "model.group_rule=hugging_face: allowed rows where 2 processes train",
    ),
]


@pytest.mark.parametrize(("degrees", "asked", "line"), DOES_NOT_FIT)
def test_what_does_not_fit_is_named(
    degrees: tuple[int, int, int, int], asked: dict[str, Any], line: str
) -> None:
    """Catches a layout that fails hours later in a reshape, or an error that leaves the user to guess."""
    with pytest.raises(TopologyError) as caught:
        check_tiny(degrees, **asked)
    assert str(caught.value) == line


@pytest.mark.parametrize("degrees", [(1, 1, 1, 1), (1, 1, 4, 4), (2, 2, 2, 4), (1, 8, 1, 8), (4, 1, 2, 1)])
def test_what_fits_passes(degrees: tuple[int, int, int, int]) -> None:
    """Catches a check that refuses layouts which are promised to train."""
    for micro in (-1, 2):
        check_tiny(degrees, micro=micro)
        check_tiny(degrees, micro=micro, group_rows=2)
    check_tiny((degrees[0] * degrees[1], 1, degrees[2], 1), moe_every=0, group_rows=3)
    check_tiny((1, 1, 1, 1), group_rule="flaxformer", micro=1, group_rows=3)


# (world, degrees as configured) -> the line.
NO_LAYOUT: list[tuple[int, dict[str, Any], str]] = [
    (1, {"shard": 0}, "parallel.shard=0: allowed a number of ranks from 1, or -1 to fill"),
    (
        8,
        {"replicate": 2, "shard": 3},
        "parallel.replicate=2 x parallel.shard=3 x parallel.tensor=1 is 6: allowed the 8 processes of this "
        "run, or parallel.shard=-1 to fill",
    ),
    (
        8,
        {"replicate": 3, "tensor": 2},
        "parallel.replicate=3 x parallel.tensor=2 is 6: allowed a divisor of the 8 processes of this run: "
        "1, 2, 4, 8",
    ),
    (
        8,
        {"replicate": 2, "tensor": 2, "expert": 8},
        "parallel.expert=8: allowed a divisor of parallel.shard x parallel.tensor = 4: 1, 2, 4",
    ),
]


@pytest.mark.parametrize(("world", "degrees", "line"), NO_LAYOUT)
def test_degrees_that_make_no_layout(world: int, degrees: dict[str, Any], line: str) -> None:
    """Catches a division by zero, or ranks left over, far from the key that caused it."""
    with pytest.raises(TopologyError) as caught:
        resolve(ParallelConfig(**degrees), world)
    assert str(caught.value) == line


def test_a_rank_outside_the_world() -> None:
    """Catches a wrong RANK that silently reads the rows of another rank."""
    for rank in (-1, 4):
        with pytest.raises(TopologyError, match=f"rank {rank}: allowed 0 to 3"):
            layout(1, 4, 1, 1).rows_of(rank, 8)


def test_tables_need_no_torch() -> None:
    """Catches an import that would load torch where only a layout is computed, as in a job's plan."""
    code = "import sys, openmoe.parallel.topology; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
