"""What training needs of the other processes: which rows are its own, sums, complete gradients, updates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from openmoe.parallel.collectives import Group, sum_flat
from openmoe.parallel.global_tensors import as_whole
from openmoe.parallel.meshes import DENSE_AXES, EXPERT_AXES, Meshes
from openmoe.parallel.parallelize import local_shard
from openmoe.parallel.placement import ParameterLayout
from openmoe.parallel.topology import GroupName, Topology

NORM_PIECE_ELEMENTS = 1024
SHARING_GROUPS: tuple[GroupName, ...] = ("tensor", "shard", "expert", "expert_shard")


@dataclass(frozen=True)
class SentNumbers:
    """What `Ranks.send_numbers` gives and `Ranks.read_numbers` takes; nobody has waited for a device yet."""

    on_device: Tensor  # [length] float64
    own: Sequence[float]  # of this process, on the host


@dataclass(frozen=True)
class RowDevices:
    """The devices over which a process spreads its rows, where it has many."""

    kind: str  # "TPU v3", "CPU"
    count: int
    data_ranks: int  # as many parts have its rows
    put: Callable[[Tensor], Tensor]  # [rows, ...] of the host -> over the devices


class Ranks(Protocol):
    """The processes of a run, seen from one of them."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    @property
    def data_rank(self) -> int:
        """Ranks with the same number read the same rows."""

    @property
    def data_size(self) -> int: ...

    @property
    def rows(self) -> RowDevices | None:
        """Where the rows of this process go, if it has more than one device."""

    @property
    def loss_terms(self) -> int:
        """As many terms has the sum over the ranks of a loss."""

    @property
    def counts_loss(self) -> bool:
        """Ranks that read the same rows all have the losses of these; one of them counts."""

    @property
    def shards(self) -> "ParameterShards | None":
        """How parameters are shared; None where each is whole."""

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What the optimizer updates: this process's part of each parameter, under its logical name."""

    def as_whole(self, name: str, local: Tensor, dims: Sequence[int]) -> Tensor:
        """The whole tensor of which `local` is this process's part, sharing its memory: of the parameter
        `name`, or of a state that keeps its dimensions `dims` (`parallel.global_tensors`)."""

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Before the first step and before a checkpoint is loaded: `optimizer`, made over
        `named_parameters`, is the one that `update` will be called with."""

    def gather_state(self) -> dict[str, dict[str, Tensor]] | None:
        """Where an engine keeps the optimizer's state in other parts than the parameters: a copy by name and
        key, in whole tensors as of `as_whole`. None where it is in `optimizer.state`."""

    def put_back_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Takes over what was filled into the copy of `gather_state`."""

    def begin_micro_batch(self, last: bool) -> None:
        """Before each forward pass; `last` of the step."""

    def backward(self, loss: Tensor) -> None:
        """The backward pass of a micro-batch; `loss` is this rank's term of a sum over the ranks."""

    def finish_gradients(self) -> Tensor:
        """After the last backward pass: makes the gradients complete. Returns their global norm, a scalar on
        the device."""

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """One step of the optimizer over `named_parameters`; their gradients are gone afterwards."""

    def parameter_norm(self) -> Tensor:
        """Global norm of all parameters, a scalar on the device."""

    def sum_(self, x: Tensor) -> None:
        """In place over all processes."""

    def send_numbers(self, terms: Tensor, same: Tensor, own: Sequence[float]) -> SentNumbers:
        """Numbers of a step on their way to the host, without waiting for the device.

        Args:
            terms: float64 `[n]` on the device: this process's terms of sums over the processes. Where a
                device's values are global already (XLA) they are the sums.
            same: float64 `[m]` on the device, the same on all processes.
            own: what this process's host has to say of itself; as many numbers on each.
        """

    def read_numbers(self, sent: Sequence[SentNumbers]) -> list[tuple[Tensor, Tensor]]:
        """For each, on the host in float64: the sums and `same` in one row `[n + m]`, and `own` of each
        process `[world_size, len(own)]`. One transfer from the device, for all of which waits; all processes
        call it together, with as many of equal lengths."""


class OneProcess:
    """A run of one process without process groups."""

    rank, world_size = 0, 1
    data_rank, data_size = 0, 1
    rows = None
    loss_terms = 1
    counts_loss = True
    shards = None

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return list(self.model.named_parameters())

    def as_whole(self, name: str, local: Tensor, dims: Sequence[int]) -> Tensor:
        return local

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def gather_state(self) -> None:
        return None

    def put_back_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        pass

    def begin_micro_batch(self, last: bool) -> None:
        pass

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def finish_gradients(self) -> Tensor:
        return sum_of_squares([p.grad for p in self.model.parameters() if p.grad is not None]).sqrt()

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        self.model.zero_grad(set_to_none=True)

    def parameter_norm(self) -> Tensor:
        return sum_of_squares([p.detach() for p in self.model.parameters()]).sqrt()

    def sum_(self, x: Tensor) -> None:
        pass

    def send_numbers(self, terms: Tensor, same: Tensor, own: Sequence[float]) -> SentNumbers:
        return SentNumbers(torch.cat([terms, same]), own)

    def read_numbers(self, sent: Sequence[SentNumbers]) -> list[tuple[Tensor, Tensor]]:
        rows = torch.stack([numbers.on_device for numbers in sent]).cpu()
        of_hosts = [torch.tensor([numbers.own], dtype=torch.float64) for numbers in sent]
        return list(zip(rows, of_hosts, strict=True))


class ShardedRanks:
    """One of several processes, each with a part of the model by the tables of `placement`."""

    rows = None

    def __init__(
        self,
        topology: Topology,
        groups: dict[GroupName, Group],
        layouts: dict[str, ParameterLayout],
        meshes: Meshes,
    ) -> None:
        world = groups["world"]
        self.rank, self.world_size = world.rank, world.size
        self.data_rank = topology.coordinate("data", self.rank)
        self.data_size = self.loss_terms = topology.size("data")
        self.counts_loss = topology.coordinate("tensor", self.rank) == 0
        self.topology = topology
        self.layouts = layouts
        self.shards = ParameterShards(layouts, groups)
        self.groups = groups
        self.meshes = meshes

    def as_whole(self, name: str, local: Tensor, dims: Sequence[int]) -> Tensor:
        return as_whole(local, self.layouts[name], self.meshes, dims)

    def sum_(self, x: Tensor) -> None:
        self.groups["world"].sum_(x)

    def send_numbers(self, terms: Tensor, same: Tensor, own: Sequence[float]) -> SentNumbers:
        # One collective for all: a process's own numbers have places of their own among the terms.
        of_ranks = terms.new_zeros(self.world_size, len(own))
        for place, number in enumerate(own):
            of_ranks[self.rank, place] = number
        summed = torch.cat([terms, of_ranks.view(-1)])
        self.sum_(summed)
        return SentNumbers(torch.cat([summed[: len(terms)], same, summed[len(terms) :]]), own)

    def read_numbers(self, sent: Sequence[SentNumbers]) -> list[tuple[Tensor, Tensor]]:
        rows = torch.stack([numbers.on_device for numbers in sent]).cpu()
        end = rows.shape[1] - self.world_size * len(sent[0].own)
        return [(row[:end], row[end:].view(self.world_size, -1)) for row in rows]

    def global_norm(self, parts: Sequence[tuple[ParameterLayout, Tensor]]) -> Tensor:
        """Each element counts once, on the first of the ranks that hold it."""
        squares = sum_of_squares(
            [part if self._is_first_copy(layout) else part[:0] for layout, part in parts]
        )
        self.sum_(squares)
        return squares.sqrt()

    def _is_first_copy(self, layout: ParameterLayout) -> bool:
        axes = EXPERT_AXES if layout.is_expert else DENSE_AXES
        shared = {group for groups in layout.splits for group in groups}
        return all(axis in shared or self.topology.coordinate(axis, self.rank) == 0 for axis in axes)


class FsdpRanks(ShardedRanks):
    """A run over a model that `parallelize` has shared out."""

    def __init__(
        self,
        model: nn.Module,
        topology: Topology,
        groups: dict[GroupName, Group],
        layouts: dict[str, ParameterLayout],
        meshes: Meshes,
        beat: Callable[[], None] = lambda: None,
    ) -> None:
        """`beat` is called before each forward pass: some layouts send nothing in it, and are not hanging."""
        super().__init__(topology, groups, layouts, meshes)
        self._model = model
        self._beat = beat
        # FSDP's own parameters are DTensors over the shards alone, whose shapes mean nothing to an optimizer.
        # These share their memory.
        self._local = [
            (name, nn.Parameter(local_shard(parameter), parameter.requires_grad), parameter)
            for name, parameter in model.named_parameters()
        ]

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, local) for name, local, _ in self._local]

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        pass

    def gather_state(self) -> None:
        return None

    def put_back_state(self, state: dict[str, dict[str, Tensor]]) -> None:
        pass

    def begin_micro_batch(self, last: bool) -> None:
        self._beat()
        # Copies of the model need one sum a step; until then each adds up its own.
        cast(FSDPModule, self._model).set_requires_all_reduce(last)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def finish_gradients(self) -> Tensor:
        for _, local, sharded in self._local:
            local.grad = None if sharded.grad is None else local_shard(sharded.grad)
        present = [
            (self.layouts[name], local.grad) for name, local, _ in self._local if local.grad is not None
        ]
        sum_flat(self.groups["tensor"], [grad for layout, grad in present if layout.partial_over_tensor])
        return self.global_norm(present)

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        optimizer.step()
        for _, local, sharded in self._local:
            local.grad = sharded.grad = None

    def parameter_norm(self) -> Tensor:
        return self.global_norm([(self.layouts[name], local.detach()) for name, local, _ in self._local])


class ParameterShards:
    """`optim.shards.Shards`: which part of each parameter is here, and sums over those with the rest."""

    def __init__(self, layouts: dict[str, ParameterLayout], groups: dict[GroupName, Group]) -> None:
        self._layouts = layouts
        self._groups = groups

    def shape(self, name: str) -> tuple[int, ...]:
        return self._layouts[name].shape

    def splits(self, name: str) -> tuple[tuple[str, ...], ...]:
        return self._layouts[name].splits

    def sum_(self, parts: Sequence[tuple[Tensor, frozenset[str]]]) -> None:
        """One collective for each group that is named: a sum over two of them is made one after the other."""
        for name in SHARING_GROUPS:
            sum_flat(self._groups[name], [tensor for tensor, groups in parts if name in groups])


def sum_of_squares(tensors: Sequence[Tensor]) -> Tensor:
    """Over all elements, a float64 scalar.

    A CPU adds up the squares of a float32 tensor one after the other: torch's norm of 50 million elements is
    off by 0.4%. So short pieces are summed in the tensor's own type, and the pieces in float64.
    """
    parts = []
    for tensor in tensors:
        flat = tensor.reshape(-1)
        whole = len(flat) - len(flat) % NORM_PIECE_ELEMENTS
        for piece in (flat[:whole].view(-1, NORM_PIECE_ELEMENTS), flat[None, whole:]):
            parts.append(torch.linalg.vector_norm(piece, dim=1).double().square().sum())
    return torch.stack(parts).sum()
