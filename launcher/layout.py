"""How a run is laid out over its processes and devices, and where each of them stands."""

from typing import cast

import torch

from openmoe.launcher.errors import ConfigError
from openmoe.launcher.processes import Processes
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
    return start_xla()


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


def rows_of_process(config: Config, topology: Topology, processes: Processes) -> slice:
    """Rows of the global batch that this process reads."""
    rows = config.train.global_batch_rows
    if config.parallel.engine != "xla":
        return topology.rows_of(processes.rank, rows)
    share = rows // processes.world_size  # the devices of a host are whole tensor groups
    return slice(processes.rank * share, (processes.rank + 1) * share)


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


def place(topology: Topology, rank: int, rows: slice) -> str:
    """Where a rank stands, for its log."""
    axes: list[GroupName] = ["replicate", "shard", "tensor", "expert_shard", "expert"]
    coordinates = ", ".join(
        f"{axis} {topology.coordinate(axis, rank)}/{topology.size(axis)}" for axis in axes
    )
    return f"{coordinates}, rows {rows.start} to {rows.stop - 1} of a batch"


def ranks_of(topology: Topology, rank: int, group: str) -> str:
    members = topology.group(cast(GroupName, group), rank)
    return f"ranks {' '.join(map(str, members))}" if len(members) <= 16 else f"{len(members)} ranks"
