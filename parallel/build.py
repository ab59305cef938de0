"""From a config to a model on its device, whole or this rank's part of it."""

from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist

from openmoe.model.config import ModelConfig
from openmoe.model.decoder import Decoder
from openmoe.model.dispatch import DISPATCHERS, TokenDispatcher
from openmoe.model.init import initialise
from openmoe.model.tensor_ranks import ONE_RANK
from openmoe.parallel.collectives import Group, Observer, TensorGroup
from openmoe.parallel.config import ParallelConfig
from openmoe.parallel.deepspeed_engine import DeepSpeedRanks
from openmoe.parallel.expert_dispatch import fixed_dispatch, uneven_dispatch
from openmoe.parallel.meshes import build_meshes
from openmoe.parallel.parallelize import Sharding, cut, initialise_shards, parallelize, prepare_blocks
from openmoe.parallel.placement import parameter_layouts, whole_on_data_ranks
from openmoe.parallel.ranks import FsdpRanks, OneProcess, Ranks
from openmoe.parallel.spmd import build_spmd
from openmoe.parallel.topology import Topology, TopologyError
from openmoe.parallel.watchdog import GRACE_SECONDS, NO_WATCHDOG, NoWatchdog

# precision -> (dtype of parameters and optimizer state, dtype of activations)
DTYPES: dict[str, tuple[torch.dtype, torch.dtype]] = {
    "fp64": (torch.float64, torch.float64),
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.float32, torch.bfloat16),
}


def build(
    config: ModelConfig,
    parallel: ParallelConfig,
    topology: Topology,
    precision: str,
    device: torch.device,
    seed: int,
    observe: Observer = lambda group, kind, size_bytes: None,
    watchdog: NoWatchdog = NO_WATCHDOG,
) -> tuple[Decoder, Ranks]:
    """The model with its initial values, and what training needs of the other processes.

    With a process group each rank builds its own part, also where there is but one rank; without one the
    model is whole. Under XLA a process has the devices of its host. Nothing is materialised before its final
    place is known, but for one parameter at a time under XLA. `observe` is told of each collective,
    `watchdog` of each forward pass, and of what may take long.
    """
    if parallel.engine == "xla":
        return build_spmd(config, parallel, topology, DTYPES[precision], seed, observe, watchdog)
    if not dist.is_initialized():
        model = build_decoder(config, precision, device, seed)
        prepare_blocks(model, parallel.recompute, parallel.compile)
        return model, OneProcess(model)
    parameter_dtype, compute_dtype = DTYPES[precision]
    # The watchdog, which knows more, comes first.
    limit = timedelta(seconds=parallel.timeout_seconds + GRACE_SECONDS)
    meshes = build_meshes(topology, device.type, limit)
    groups = {name: Group(name, group, observe) for name, group in meshes.groups.items()}
    with torch.device("meta"):
        model = Decoder(
            config,
            dispatcher=choose_dispatcher(config, parallel, topology, groups["expert"], device.type),
            compute_dtype=compute_dtype,
            ranks=TensorGroup(groups["tensor"]) if topology.tensor > 1 else ONE_RANK,
        )
    model = model.to(parameter_dtype)
    layouts = parameter_layouts(model, topology)
    if parallel.engine == "deepspeed":
        whole, rank = whole_on_data_ranks(layouts), dist.get_rank()
        cut(model, whole, topology, rank)
        prepare_blocks(model, parallel.recompute, parallel.compile)
        model.to_empty(device=device)
        initialise_shards(model, config, whole, topology, rank, seed)
        return model, DeepSpeedRanks(
            model, topology, groups, layouts, meshes, parallel.zero_stage, watchdog.beat
        )
    parallelize(
        model,
        Sharding(topology, meshes, layouts, compute_dtype, parameter_dtype, observe),
        rank=dist.get_rank(),
        seed=seed,
        device=device,
        recompute=parallel.recompute,
        compile_modules=parallel.compile,
    )
    return model, FsdpRanks(model, topology, groups, layouts, meshes, watchdog.beat)


def build_decoder(config: ModelConfig, precision: str, device: torch.device, seed: int) -> Decoder:
    """A whole Decoder with its initial values."""
    parameter_dtype, compute_dtype = DTYPES[precision]
    with torch.device("meta"):
        model = Decoder(config, compute_dtype=compute_dtype)
    model = model.to(parameter_dtype).to_empty(device=device)
    initialise(model, config, seed)
    return model


def choose_dispatcher(
    config: ModelConfig, parallel: ParallelConfig, topology: Topology, expert: Group, device_type: str
) -> TokenDispatcher:
    """How tokens reach their experts under a layout."""
    overlap = parallel.overlap == "on" or (parallel.overlap == "auto" and device_type == "cuda")
    match exchange_of(config, parallel, topology):
        case "fixed":
            return fixed_dispatch(expert, overlap)
        case "uneven":
            return uneven_dispatch(expert, overlap)
    return DISPATCHERS[config.dispatch]


def exchange_of(
    config: ModelConfig, parallel: ParallelConfig, topology: Topology
) -> Literal["none", "fixed", "uneven"]:
    """What travels between the ranks of an expert group; fixed shapes wherever they are possible.

    Raises TopologyError where the asked exchange or dispatch is not.
    """
    if topology.expert == 1:
        return "none"
    if config.dispatch != "sort":
        raise TopologyError(
            f"model.dispatch={config.dispatch}: allowed sort with parallel.expert={topology.expert}"
        )
    whole_groups_with_capacity = topology.tensor == 1 and not config.dropless
    if parallel.exchange == "fixed" and not whole_groups_with_capacity:
        raise TopologyError(
            f"parallel.exchange=fixed: allowed with parallel.tensor=1 (is {topology.tensor}) and "
            f"model.dropless=false (is {str(config.dropless).lower()})"
        )
    return "fixed" if whole_groups_with_capacity and parallel.exchange != "uneven" else "uneven"
