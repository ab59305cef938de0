"""Torch's process groups against the tables: all of them without processes, and sums in real ones.

Run as a script this file is the parent of the real ones, which import torch once for all.
"""

import json
import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.testing._internal.distributed.fake_pg import FakeStore

import openmoe.parallel.meshes
from openmoe.parallel.meshes import DENSE_AXES, EXPERT_AXES, build_meshes
from openmoe.parallel.topology import GROUP_NAMES, Topology, TopologyError

# (replicate, shard, tensor, expert)
EIGHT_RANKS = [(1, 8, 1, 1), (1, 8, 1, 8), (2, 2, 2, 4), (2, 2, 2, 1), (1, 2, 4, 2), (4, 1, 2, 2)]


def layout(degrees: tuple[int, int, int, int]) -> Topology:
    replicate, shard, tensor, expert = degrees
    return Topology(replicate * shard * tensor, replicate, shard, tensor, expert)


@pytest.fixture
def fake_world() -> Iterator[Callable[[int, int], None]]:
    """Makes this process one rank of a world of any size, in which nothing is ever sent."""

    def start(world_size: int, rank: int) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()


def compare(topology: Topology, rank: int) -> None:
    """Meshes built as `rank` against the tables: members and order of groups, and the rank's place."""
    meshes = build_meshes(topology, "cpu")
    for name in GROUP_NAMES:
        group = meshes.groups[name]
        assert dist.get_process_group_ranks(group) == list(topology.group(name, rank)), name
        assert dist.get_rank(group) == topology.coordinate(name, rank), name
    for mesh, axes in ((meshes.dense, DENSE_AXES), (meshes.expert, EXPERT_AXES)):
        assert mesh.mesh_dim_names == axes
        # Ranks in the order of the tables, whatever the order of the axes.
        assert mesh.mesh.transpose(1, 2).flatten().tolist() == list(range(topology.world_size))
        for axis in axes:
            assert dist.get_process_group_ranks(mesh.get_group(axis)) == list(topology.group(axis, rank)), (
                axis
            )
            assert mesh.get_local_rank(axis) == topology.coordinate(axis, rank), axis


@pytest.mark.parametrize("degrees", EIGHT_RANKS)
def test_meshes_of_eight_ranks(fake_world: Callable[[int, int], None], degrees: tuple) -> None:
    """Catches a mesh whose axes are in another order than the tables, on any rank."""
    for rank in range(8):
        fake_world(8, rank)
        compare(layout(degrees), rank)


@pytest.mark.parametrize("degrees", [(4, 16, 8, 32), (1, 128, 4, 32)])
def test_meshes_of_512_ranks(fake_world: Callable[[int, int], None], degrees: tuple) -> None:
    """Catches groups that are right while they lie in one node only."""
    fake_world(512, 333)
    compare(layout(degrees), 333)


def test_a_layout_of_another_size(fake_world: Callable[[int, int], None]) -> None:
    """Catches a mesh over the first ranks only, which torch makes without a word."""
    fake_world(8, 0)
    with pytest.raises(TopologyError, match="a layout of 4 ranks in a process group of 8"):
        build_meshes(layout((1, 2, 2, 2)), "cpu")


def test_torch_that_orders_ranks_otherwise(
    fake_world: Callable[[int, int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches meshes that are taken as they come: a wrong group sums other gradients without an error."""

    def columns_first(device_type: str, ranks: torch.Tensor, mesh_dim_names: tuple[str, ...]) -> object:
        ranks = torch.arange(8).reshape(ranks.shape).transpose(1, 2).reshape(ranks.shape)
        return DeviceMesh(device_type, ranks, mesh_dim_names=mesh_dim_names)

    monkeypatch.setattr(openmoe.parallel.meshes, "DeviceMesh", columns_first)
    fake_world(8, 0)
    with pytest.raises(RuntimeError, match=r"group tensor of rank 0 has ranks \[0, 2\], its table \[0, 1\]"):
        build_meshes(layout((1, 4, 2, 4)), "cpu")


def test_sums_tell_which_ranks_were_summed(tmp_path: Path) -> None:
    """Catches a group that looks right but communicates with others: 2^rank shows who took part."""
    subprocess.run([sys.executable, __file__, str(tmp_path)], timeout=120, check=True)
    for rank in range(8):
        sums = json.loads((tmp_path / f"sums_{rank}.json").read_text())
        for degrees, by_name in zip(EIGHT_RANKS, sums, strict=True):
            for name in GROUP_NAMES:
                expected = sum(2**other for other in layout(degrees).group(name, rank))
                assert by_name[name] == expected, (degrees, name, rank)


def sum_powers_of_two(folder: Path, rank: int) -> None:
    """One rank: for each layout and kind of group, the sum of 2^rank over the group."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=(folder / "store").as_uri(),
        rank=rank,
        world_size=8,
        timeout=timedelta(seconds=60),
    )
    sums: list[dict[str, float]] = []
    for degrees in EIGHT_RANKS:
        meshes = build_meshes(layout(degrees), "cpu")
        sums.append({})
        for name in GROUP_NAMES:
            value = torch.tensor(2**rank)
            dist.all_reduce(value, group=meshes.groups[name])
            sums[-1][name] = value.item()
    (folder / f"sums_{rank}.json").write_text(json.dumps(sums))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    ranks = [
        context.Process(target=sum_powers_of_two, args=(Path(sys.argv[1]), rank), daemon=True)
        for rank in range(8)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(100)
    sys.exit(any(process.exitcode != 0 for process in ranks))  # what still runs ends with its parent
