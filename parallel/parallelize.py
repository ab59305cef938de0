"""From a model on the meta device to this rank's part of it. The order matters, so it stands here in one
place: cut, recompute, compile, shard, fill."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from openmoe.model.config import ModelConfig
from openmoe.model.decoder import Block, Decoder
from openmoe.model.init import fill
from openmoe.model.layers import Attention, FeedForward, RMSNorm
from openmoe.parallel.collectives import ObservedAllGather, ObservedReduceScatter, Observer
from openmoe.parallel.meshes import Meshes
from openmoe.parallel.placement import ParameterLayout
from openmoe.parallel.recompute import Recompute, recompute_block
from openmoe.parallel.topology import GroupName, Topology


@dataclass(frozen=True)
class Sharding:
    """How FSDP shares out the weights of one process's model."""

    topology: Topology
    meshes: Meshes
    layouts: dict[str, ParameterLayout]
    compute_dtype: torch.dtype  # weights travel and are used in it; the shards keep their own
    reduce_dtype: torch.dtype  # gradients are summed in it
    observe: Observer

    def apply(self, model: Decoder) -> None:
        """Inner modules first: what they hold is no longer the outer one's."""
        layout_of = {parameter: self.layouts[name] for name, parameter in model.named_parameters()}
        for block in cast(list[Block], list(model.layers)):
            if block.moe is not None:
                self._shard(block.moe.experts, layout_of, self.compute_dtype, "expert_shard")
                # Routes in float32 or wider; a few numbers, not worth a second gather.
                self._shard(block.moe.router, layout_of, None, "shard", keep_whole=True)
            self._shard(block, layout_of, self.compute_dtype, "shard")
        # Gradients of a frequent token are thousands of terms, added up in the type of the weights: so the
        # embedding travels in its own. Once rows are looked up it is not needed any more.
        tied = model.head is None
        if not tied:
            self._shard(model.embedding, layout_of, None, "shard")
            cast(FSDPModule, model.embedding).set_unshard_in_backward(False)
        # Last norm and head, which may be the embedding. They stay whole from the forward to the backward
        # pass, as the loss reads the head outside of `forward`.
        self._shard(model, layout_of, None if tied else self.compute_dtype, "shard", keep_whole=True)

    def _shard(
        self,
        module: nn.Module,
        layout_of: dict[nn.Parameter, ParameterLayout],
        compute_dtype: torch.dtype | None,
        group: GroupName,
        keep_whole: bool = False,
    ) -> None:
        policy = MixedPrecisionPolicy(compute_dtype, self.reduce_dtype, cast_forward_inputs=False)
        fully_shard(
            module,
            mesh=self._mesh(group),
            reshard_after_forward=not keep_whole,
            shard_placement_fn=lambda parameter: Shard(layout_of[parameter].shard_dim),
            mp_policy=policy,
        )
        sharded = cast(FSDPModule, module)
        # Every rank's gradient is a plain term of one sum, for experts as for the rest. FSDP's average would
        # divide a dense gradient by replicate * shard and an expert's by replicate * expert_shard.
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # else a factor of 1 over one rank becomes an average
        sharded.set_custom_all_gather(cast(Any, ObservedAllGather(group, self.observe)))
        copies: GroupName | None = "replicate" if self.topology.replicate > 1 else None
        scatter = ObservedReduceScatter(group, self.observe, copies)
        sharded.set_custom_reduce_scatter(cast(Any, scatter))
        if copies is not None:  # its size is told after the fact: FSDP takes no all-reduce of one's own
            sharded.set_all_reduce_hook(lambda x: self.observe("replicate", "all_reduce", x.nbytes))

    def _mesh(self, group: GroupName) -> DeviceMesh:
        """The shards' ranks, and above them the copies of the model, where there are several."""
        grid = self.meshes.dense if group == "shard" else self.meshes.expert
        return grid["replicate", group] if self.topology.replicate > 1 else grid[group]


def parallelize(
    model: Decoder,
    sharding: Sharding,
    *,
    rank: int,
    seed: int,
    device: torch.device,
    recompute: Recompute = "none",
    compile_modules: bool = False,
) -> None:
    """Turns a model with global shapes on the meta device into this rank's part, filled with its initial
    values."""
    topology, layouts = sharding.topology, sharding.layouts
    cut(model, layouts, topology, rank)
    prepare_blocks(model, recompute, compile_modules)
    sharding.apply(model)
    model.to_empty(device=device)
    initialise_shards(model, model.config, layouts, topology, rank, seed)


def cut(model: nn.Module, layouts: dict[str, ParameterLayout], topology: Topology, rank: int) -> None:
    """Leaves of each parameter the slice that the modules of `rank` compute with."""
    for name, parameter in list(model.named_parameters()):
        part = layouts[name].slices(topology, rank, with_shards=False)
        _replace(model, name, parameter[part])


def prepare_blocks(model: Decoder, recompute: Recompute, compile_modules: bool) -> None:
    """Compilation and recomputation, block by block, for one process and for many."""
    for block in cast(list[Block], list(model.layers)):
        if compile_modules:
            # One by one: between them lie collectives and the dispatch, whose shapes follow from the routing.
            for module in block.modules():
                if isinstance(module, Attention | FeedForward | RMSNorm):
                    module.compile()
        recompute_block(block, recompute)


@torch.no_grad()
def initialise_shards(
    model: nn.Module,
    config: ModelConfig,
    layouts: dict[str, ParameterLayout],
    topology: Topology,
    rank: int,
    seed: int,
) -> None:
    """Each element by its place in the whole parameter, so a shard equals the slice of one process."""
    for name, parameter in model.named_parameters():
        layout = layouts[name]
        fill(local_shard(parameter), config, seed, name, layout.shape, layout.slices(topology, rank))


def local_shard(parameter: torch.Tensor) -> torch.Tensor:
    """The memory of what this rank holds of a parameter or a gradient: its shard where FSDP has it."""
    detached = parameter.detach()
    return detached.to_local() if isinstance(detached, DTensor) else detached


def _replace(model: nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    old = getattr(model.get_submodule(path), attribute)
    setattr(model.get_submodule(path), attribute, nn.Parameter(torch.empty_like(value), old.requires_grad))
