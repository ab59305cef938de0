"""How a run is laid out over its processes and devices, and where each of them stands."""

from typing import cast

import torch

from openmoe.launcher.errors import ConfigError
from openmoe.launcher.schema import Config
from openmoe.parallel.build import exchange_of
from openmoe.parallel.deepspeed_pairs import check_supported
from openmoe.parallel.ranks import Ranks
from openmoe.parallel.spmd import check_xla
from openmoe.parallel.topology import GroupName, Topology, check_fit, resolve
from openmoe.parallel.xla import start as start_xla


def count_ranks(config: Config, processes: int) -> int:
    """Ranks of the layout: the processes or, under XLA, the devices of all of them, which it starts.

    Raises TopologyError, ConfigError where there are none.
    """
    if config.parallel.engine != "xla":
        return processes
    if config.run.device != "auto":
        raise ConfigError(f"run.device={config.run.device}: allowed auto with parallel.engine=xla")
    return start_xla(processes)


def lay_out(config: Config, world_size: int, alone: bool) -> Topology:
    """The layout of the run's processes; raises where the model, its batch or the rest does not fit it.

    `alone` is a process that nobody has started as one of a run."""
    topology = resolve(config.parallel, world_size)
    train = config.train
    check_fit(topology, config.model, train.seq_len, train.global_batch_rows, train.micro_batch_rows)
    if config.parallel.engine == "xla":
        check_xla(config.model, config.parallel, topology, config.data.packing)
        return topology
    exchange_of(config.model, config.parallel, topology)
    if config.parallel.engine == "deepspeed":
        frozen = train.freeze_router_at_step is not None
        check_supported(config.parallel, config.optim, train.precision, freezes=frozen, alone=alone)
    return topology


def rows_of_process(config: Config, topology: Topology, rank: int) -> slice:
    """Rows of the global batch that this process reads; under XLA all, of which its devices take theirs."""
    rows = config.train.global_batch_rows
    return slice(0, rows) if config.parallel.engine == "xla" else topology.rows_of(rank, rows)


def describe(topology: Topology, device: torch.device, ranks: Ranks) -> str:
    """What a run is on, for people."""
    if ranks.rows is not None:
        data, expert, model = topology.xla_shape()
        mesh = f"data {data} x expert {expert} x model {model}"
        return f"{topology.world_size} devices ({ranks.rows.kind}, XLA, {mesh})"
    if topology.world_size == 1:
        return str(device)
    return (
        f"{device} in {topology.world_size} processes (replicate {topology.replicate} x shard "
        f"{topology.shard} x tensor {topology.tensor}, expert {topology.expert})"
    )


def place(topology: Topology, rank: int, rows: slice, ranks: Ranks) -> str:
    """Where a process stands, for its log."""
    if ranks.rows is not None:
        return f"host {rank} of {ranks.world_size}, {ranks.rows.count} of {topology.world_size} devices"
    axes: list[GroupName] = ["replicate", "shard", "tensor", "expert_shard", "expert"]
    coordinates = ", ".join(
        f"{axis} {topology.coordinate(axis, rank)}/{topology.size(axis)}" for axis in axes
    )
    return f"{coordinates}, rows {rows.start} to {rows.stop - 1} of a batch"


def members_of(topology: Topology, processes: int, rank: int, group: str) -> str:
    """The processes of a group, for people."""
    if processes != topology.world_size:
        return f"{processes} hosts"  # under XLA, where processes have no other group
    members = topology.group(cast(GroupName, group), rank)
    return f"ranks {' '.join(map(str, members))}" if len(members) <= 16 else f"{len(members)} ranks"
