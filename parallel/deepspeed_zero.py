"""What ZeRO 1 and 2 keep in flat runs, and where in them each parameter is.

DeepSpeed lays the parameters of an optimizer's group end to end and cuts them into as many equal runs as
there are ranks that hold copies; each updates its own run in float32 and sends it to the others. Checkpoints
know parameters: on the way there and back each state travels once through the group and becomes the shards
that FSDP would have, whatever wrote or will read them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openmoe.optim.build import empty_state, state_dims
from openmoe.parallel.collectives import Group, sum_flat
from openmoe.parallel.global_tensors import as_whole
from openmoe.parallel.meshes import Meshes
from openmoe.parallel.parallelize import local_shard
from openmoe.parallel.placement import ParameterLayout
from openmoe.parallel.ranks import sum_of_squares
from openmoe.parallel.topology import GroupName, Topology

State = dict[str, dict[str, Tensor]]  # parameter -> key -> tensor


@dataclass(frozen=True)
class Member:
    """A parameter and the part of it that is in this rank's run."""

    name: str
    shape: torch.Size  # of what the modules of this rank compute with
    part: slice  # of its elements, in order; may be empty
    begin: int  # of the part in the run

    @property
    def in_run(self) -> slice:
        return slice(self.begin, self.begin + self.part.stop - self.part.start)


class ZeroState:
    """The flat runs of this rank, by parameter. To be made before the engine, as it prepares the optimizer.

    `layouts` are those with the shards of FSDP.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        layouts: Mapping[str, ParameterLayout],
        topology: Topology,
        groups: Mapping[GroupName, Group],
        meshes: Meshes,
        expert_group: str,
    ) -> None:
        self._optimizer = optimizer
        self._layouts = layouts
        self._topology = topology
        self._groups = groups
        self._meshes = meshes
        self._rank = groups["world"].rank
        self._dims = state_dims(optimizer)
        # Parameters of a group share the ranks of its runs, and what is to be done to its gradients.
        split: list[dict[str, Any]] = []
        for group in optimizer.param_groups:
            kinds: dict[tuple[bool, bool], list[tuple[str, Tensor]]] = {}
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                layout = layouts[name]
                kinds.setdefault((layout.is_expert, layout.partial_over_tensor), []).append((name, parameter))
            for (is_expert, _), members in kinds.items():
                names, parameters = zip(*members, strict=True)
                own = group | {"params": list(parameters), "param_names": list(names)}
                split.append(own | ({"moe": True, "name": expert_group} if is_expert else {}))
        optimizer.param_groups[:] = split
        optimizer.state.clear()  # of whole parameters; the runs get theirs in `begin`
        self._shapes = [[parameter.shape for parameter in group["params"]] for group in split]
        self._names = [group["param_names"] for group in split]
        self._zero: Any = None

    def begin(self, zero_optimizer: Any) -> None:
        """After the engine has been made: `zero_optimizer` is its own."""
        self._zero = zero_optimizer
        for run in zero_optimizer.single_partition_of_fp32_groups:
            self._optimizer.state[run] = empty_state(run)

    def read_parameters(self) -> None:
        """Takes over the parameters, which have been filled from elsewhere."""
        self._zero.refresh_fp32_params()

    def finish_gradients(self) -> Tensor:
        """Completes the gradients of the runs and returns their norm; each element is in one run, but for
        those that tensor ranks hold all of."""
        first_of_tensor = self._groups["tensor"].rank == 0
        parts = []
        partial = []
        for number, names in enumerate(self._names):
            gradients = self._zero.averaged_gradients[number]
            if self._layouts[names[0]].partial_over_tensor:
                partial += gradients
            if first_of_tensor or not self._layouts[names[0]].partial_over_tensor:
                parts += gradients
        sum_flat(self._groups["tensor"], partial)
        squares = sum_of_squares(parts)
        self._groups["world"].sum_(squares)
        return squares.sqrt()

    def gather(self) -> State:
        """The state by parameter, in whole tensors around this rank's shards of them."""
        state: State = {}
        for number, run, member in self._members():
            state[member.name] = {}
            for key, value in self._optimizer.state[run].items():
                dims = self._dims[member.name][key]
                if dims:
                    whole = value.new_zeros(member.shape.numel())
                    whole[member.part] = value[member.in_run]
                    self._groups[self._over(number)].sum_(whole)  # exact: the others have zeros there
                    value = whole.view(member.shape)[self._shard(member.name)].clone()
                else:
                    value = value.clone()
                layout = self._layouts[member.name]
                state[member.name][key] = as_whole(value, layout, self._meshes, dims)
        return state

    def put_back(self, state: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Fills the runs from what `gather` returned, which may have been filled from elsewhere."""
        for _, run, member in self._members():
            for key, value in self._optimizer.state[run].items():
                loaded = local_shard(state[member.name][key])
                if not self._dims[member.name][key]:
                    value.copy_(loaded)
                    continue
                whole = value.new_zeros(member.shape)
                whole[self._shard(member.name)] = loaded
                is_expert = self._layouts[member.name].is_expert
                self._groups["expert_shard" if is_expert else "shard"].sum_(whole)
                value[member.in_run] = whole.view(-1)[member.part]

    def _over(self, number: int) -> GroupName:
        return "expert_data" if self._layouts[self._names[number][0]].is_expert else "data"

    def _members(self) -> Iterator[tuple[int, Tensor, Member]]:
        """Number of the group, its run, and each of its parameters."""
        for number, run in enumerate(self._zero.single_partition_of_fp32_groups):
            first = self._groups[self._over(number)].rank * run.numel()
            begin = 0  # of the parameter in the group
            for name, shape in zip(self._names[number], self._shapes[number], strict=True):
                end = begin + shape.numel()
                start = min(max(begin, first), end)
                stop = max(min(end, first + run.numel()), start)
                yield number, run, Member(name, shape, slice(start - begin, stop - begin), start - first)
                begin = end

    def _shard(self, name: str) -> tuple[slice, ...]:
        """FSDP's shard within what the modules of this rank compute with."""
        layout = self._layouts[name]
        outer = layout.slices(self._topology, self._rank, with_shards=False)
        inner = layout.slices(self._topology, self._rank)
        return tuple(
            slice(part.start - held.start, part.stop - held.start)
            for held, part in zip(outer, inner, strict=True)
        )
