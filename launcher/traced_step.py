"""The program of one update as it is run, recorded without memory for a single tensor of the model."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from openmoe.data.packing import empty_batch
from openmoe.model.config import ModelConfig
from openmoe.optim.build import build_optimizer, state_dims
from openmoe.optim.config import OptimConfig
from openmoe.parallel.axis_rules import parameter_spec
from openmoe.parallel.config import ParallelConfig
from openmoe.parallel.hlo import for_compiler
from openmoe.parallel.spmd import XlaRanks, meta_model, put_parameter
from openmoe.parallel.topology import Topology
from openmoe.parallel.xla import TracedSpmd
from openmoe.train.config import TrainConfig
from openmoe.train.step import micro_batches, train_step


@dataclass(frozen=True)
class StepProgram:
    """The last program of a step, which ends with the update; earlier ones are its first part."""

    text: str  # HLO over global shapes, marked with the places of its parameters
    rows: int  # of the micro-batch, on all devices
    micro_batches: int  # of a step; from 2 on the gradients of the earlier ones come in


def trace_step(
    config: ModelConfig,
    parallel: ParallelConfig,
    optim: OptimConfig,
    train: TrainConfig,
    topology: Topology,
    dtypes: tuple[torch.dtype, torch.dtype],
) -> StepProgram:
    """`train_step` on an XLA mesh whose devices this process has; `dtypes` of parameters and activations.

    Its tensors have no data: as long as one of them is left this process can't run a program.
    """
    spmd = TracedSpmd(topology)
    model = meta_model(config, parallel, spmd, dtypes[1])
    for name, parameter in list(model.named_parameters()):
        put_parameter(model, name, spmd.put(parameter.to(dtypes[0]), parameter_spec(name, parameter.dim())))
    ranks = XlaRanks(model, spmd)
    optimizer = build_optimizer(optim, ranks.named_parameters(), ranks.shards)
    rows = train.global_batch_rows
    if train.micro_batch_rows != -1:
        rows = train.micro_batch_rows * topology.size("data")
    blocks = train.global_batch_rows // rows
    updated = _placed_state(ranks, optimizer, spmd, accumulate=blocks > 1)
    sources = [spmd.source(tensor) for tensor in updated]
    micro = micro_batches(empty_batch(rows, train.seq_len), -1, spmd.device, packed=False, spread=ranks.rows)
    positions = float(train.global_batch_rows * train.seq_len)
    result = train_step(model, optimizer, micro, positions, 0.01, train, ranks)
    traced = spmd.program([*updated, *_tensors([getattr(result, f.name) for f in fields(result)])])
    parameters = {source: number for number, source in enumerate(traced.sources)}
    aliases = [(output, parameters[source]) for output, source in enumerate(sources)]
    return StepProgram(for_compiler(traced.text, aliases), rows, blocks)


def _placed_state(
    ranks: XlaRanks, optimizer: torch.optim.Optimizer, spmd: TracedSpmd, accumulate: bool
) -> list[Tensor]:
    """Gives the optimizer a state without memory and, to `accumulate`, gradients. What a step updates in
    place: the parameters and that state."""
    updated: list[Tensor] = []
    dims_of = state_dims(optimizer)
    for name, parameter in ranks.named_parameters():
        spec = parameter_spec(name, parameter.dim())
        state = optimizer.state[parameter]
        for key, value in state.items():
            if value.device.type == "xla":
                state[key] = spmd.put(value, tuple(spec[dim] for dim in dims_of[name][key]))
        updated += [parameter, *(value for value in state.values() if value.device.type == "xla")]
        if accumulate:
            parameter.grad = spmd.put(parameter, spec)
    ranks.attach(optimizer)
    return updated


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Those among values that lie in lists and tuples."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
