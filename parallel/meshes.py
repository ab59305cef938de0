"""The process groups of a run in torch, as the tables of `topology` have them."""

import math
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from openmoe.parallel.topology import GROUP_NAMES, GroupName, Topology, TopologyError

# The axes of a mesh in the order in which they cut a parameter: first the slice that modules compute with,
# then its shards. Ranks are counted the other way round (topology: tensor and expert are the innermost).
DENSE_AXES: tuple[GroupName, ...] = ("replicate", "tensor", "shard")
EXPERT_AXES: tuple[GroupName, ...] = ("replicate", "expert", "expert_shard")


@dataclass(frozen=True)
class Meshes:
    """Both grids as DeviceMeshes, named by their axes, and a process group of this rank for each name."""

    dense: DeviceMesh  # DENSE_AXES
    expert: DeviceMesh  # EXPERT_AXES
    groups: dict[GroupName, dist.ProcessGroup]


def build_meshes(topology: Topology, device_type: str, limit: timedelta | None = None) -> Meshes:
    """Meshes and groups over all ranks of the default process group, which every rank must call together.

    On GPUs pass `device_id` to init_process_group: the groups of an axis are then split off in one call, and
    otherwise made one by one.

    `limit` is how long a collective of theirs may wait; None: as torch has it, half an hour.

    Raises TopologyError if the default group has another size, RuntimeError if a group is not the table's.
    """
    if dist.get_world_size() != topology.world_size:
        raise TopologyError(
            f"a layout of {topology.world_size} ranks in a process group of {dist.get_world_size()}: "
            f"allowed the same number"
        )
    dense = _mesh(device_type, topology.dense_shape, DENSE_AXES)
    expert = _mesh(device_type, topology.expert_shape, EXPERT_AXES)
    world = dist.group.WORLD
    assert world is not None, "get_world_size has found it"
    groups: dict[GroupName, dist.ProcessGroup] = {"world": world}
    groups |= {axis: expert.get_group(axis) for axis in EXPERT_AXES}
    groups |= {axis: dense.get_group(axis) for axis in DENSE_AXES}  # its replicate stands for both
    for product in ("data", "expert_data"):
        groups[product] = _group_of_axes(topology, product, groups)
    groups["loss"] = groups["data"]
    _compare_with_tables(topology, groups)
    if limit is not None:  # torch gives a mesh's groups its own default, not the default group's
        for group in groups.values():
            _set_pg_timeout(limit, group)
    return Meshes(dense, expert, groups)


def _mesh(device_type: str, shape: tuple[int, int, int], axes: tuple[GroupName, ...]) -> DeviceMesh:
    ranks = torch.arange(math.prod(shape)).view(shape).transpose(1, 2)
    return DeviceMesh(device_type, ranks, mesh_dim_names=axes)


def _group_of_axes(
    topology: Topology, product: GroupName, made: dict[GroupName, dist.ProcessGroup]
) -> dist.ProcessGroup:
    """The group over two axes: one that is made already where an axis is trivial, else a new one."""
    for name, group in made.items():
        if topology.groups(name) == topology.groups(product):
            return group
    ranks = [list(group) for group in topology.groups(product)]
    group, _ = dist.new_subgroups_by_enumeration(ranks, group_desc=f"mesh_{product}")
    return group


def _compare_with_tables(topology: Topology, groups: dict[GroupName, dist.ProcessGroup]) -> None:
    rank = dist.get_rank()
    for name in GROUP_NAMES:
        made, table = dist.get_process_group_ranks(groups[name]), list(topology.group(name, rank))
        if made != table:
            raise RuntimeError(f"group {name} of rank {rank} has ranks {made}, its table {table}")
