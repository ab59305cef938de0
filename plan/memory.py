"""Bytes that a rank holds at its peak, by kind."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

from openmoe.parallel.placement import ParameterLayout
from openmoe.parallel.traffic import Step, Unit, Update, fsdp_units
from openmoe.plan.trace import Trace


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank."""

    parameters: int
    gradients: int
    optimizer: int
    weights_in_flight: int  # gathered for the passes, and gradients on their way to their shards
    head_and_loss: int  # these three while a micro-batch is at its peak
    all_to_all: int
    activations: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def state_memory(step: Step, layouts: dict[str, ParameterLayout], update: Update) -> Memory:
    """What does not depend on the rows of a micro-batch."""
    parameter_bytes = sum(parameter.nbytes for parameter in update.parameters.values())
    states = update.optimizer.state.values()
    return Memory(
        parameters=parameter_bytes,
        gradients=parameter_bytes,
        optimizer=sum(tensor.nbytes for state in states for tensor in state.values()),
        weights_in_flight=_in_flight(step, layouts),
        head_and_loss=0,
        all_to_all=0,
        activations=0,
    )


def _in_flight(step: Step, layouts: dict[str, ParameterLayout]) -> int:
    """While a unit computes, the next one arrives in a buffer and is copied out of it; in a backward pass its
    gradients stand beside it, in the type of the weights and in that of the sum."""
    units = fsdp_units(step, layouts)
    if step.topology.world_size == 1:  # each use of a weight makes a copy in its type and keeps it
        same = step.compute_bytes == step.parameter_bytes
        return 0 if same else sum(unit.weight_bytes for unit in units if not unit.stays_whole)
    whole = sum(unit.weight_bytes for unit in units if unit.stays_whole)
    passing = [unit for unit in units if not unit.stays_whole]
    return whole + max(_gathered(passing), default=0) + max(_reduced(units))


def _gathered(units: Sequence[Unit]) -> list[int]:
    return [here.weight_bytes + 2 * coming.weight_bytes for here, coming in pairwise(units)]


def _reduced(units: Sequence[Unit]) -> list[int]:
    return [unit.weight_bytes + unit.gradient_bytes for unit in units]


def with_micro_batch(state: Memory, trace: Trace) -> Memory:
    """The peak of a rank that runs micro-batches like the traced one."""
    parts = dict(trace.peak_by_part)
    return Memory(
        state.parameters,
        state.gradients,
        state.optimizer,
        state.weights_in_flight,
        head_and_loss=parts.pop("head and loss", 0),
        all_to_all=parts.pop("dispatch", 0),
        activations=sum(parts.values()),
    )
