"""This rank's part of a tensor as a DTensor, which knows the whole one: what checkpoints are written from."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from openmoe.parallel.meshes import DENSE_AXES, EXPERT_AXES, Meshes
from openmoe.parallel.placement import ParameterLayout
from openmoe.parallel.topology import GroupName


def as_whole(local: Tensor, layout: ParameterLayout, meshes: Meshes, dims: Sequence[int]) -> Tensor:
    """The tensor of which `local` is this rank's part; they share memory.

    `local` belongs to a parameter with this layout and keeps its dimensions `dims`, in this order: the
    parameter itself keeps all of them, a state of the optimizer some or none. The result has their global
    sizes. It is `local` itself where every rank holds all of it.
    """
    mesh, axes = (meshes.expert, EXPERT_AXES) if layout.is_expert else (meshes.dense, DENSE_AXES)
    kept = [layout.splits[dim] for dim in dims]
    # Axes cut in the order of the mesh, which is that of `splits`: plain shards, one within the other.
    placements = [_placement(axis, kept) for axis in axes]
    if all(placement.is_replicate() for placement in placements):
        return local
    shape = torch.Size(layout.shape[dim] for dim in dims)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)


def _placement(axis: GroupName, splits: Sequence[Sequence[GroupName]]) -> Placement:
    return next((Shard(dim) for dim, groups in enumerate(splits) if axis in groups), Replicate())
