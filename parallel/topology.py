"""How the ranks of a run are laid out: pure tables, which torch, DeepSpeed and XLA all follow.

The same ranks form two grids, each in row-major order (the last axis is the one of neighbouring ranks):

    dense grid   (replicate, shard, tensor)          everything but experts
    expert grid  (replicate, expert_shard, expert)   experts, with expert_shard * expert = shard * tensor

So experts add no ranks, they borrow those of a copy of the model. `tensor` and `expert` are innermost: a
group of either lies inside a node whenever its degree divides the ranks of a node.
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from openmoe.model.config import ModelConfig
from openmoe.parallel.config import ParallelConfig

GroupName = Literal[
    "tensor",  # share the same rows; each holds a slice of the dense matrices
    "shard",  # hold one copy of the dense weights among them; read different rows
    "replicate",  # hold the same slice of everything, in different copies
    "data",  # replicate x shard: read different rows, together all of them
    "loss",  # hold different terms of the loss. A tensor group holds one and the same, so these are `data`
    "expert",  # hold all experts among them; tokens travel here
    "expert_shard",  # hold slices of the same experts in one copy
    "expert_data",  # replicate x expert_shard: hold the same experts; their gradients are summed here
    "world",
]
GROUP_NAMES: tuple[GroupName, ...] = get_args(GroupName)


class TopologyError(ValueError):
    """A layout that the processes at hand cannot form, or that the model and the batch do not fit."""


@dataclass(frozen=True)
class Topology:
    """Degrees with replicate * shard * tensor = world_size; expert divides shard * tensor.

    Raises TopologyError, with one line, for degrees that don't fit each other.
    """

    world_size: int
    replicate: int
    shard: int
    tensor: int
    expert: int

    def __post_init__(self) -> None:
        for key in ("replicate", "shard", "tensor", "expert"):
            degree = getattr(self, key)
            if degree < 1:
                fill = ", or -1 to fill" if key == "shard" else ""
                raise TopologyError(f"parallel.{key}={degree}: allowed a number of ranks from 1{fill}")
        ranks = self.replicate * self.shard * self.tensor
        if ranks != self.world_size:
            raise TopologyError(
                f"parallel.replicate={self.replicate} x parallel.shard={self.shard} x "
                f"parallel.tensor={self.tensor} is {ranks}: allowed the {self.world_size} processes of this "
                f"run, or parallel.shard=-1 to fill"
            )
        if self.shard * self.tensor % self.expert:
            raise TopologyError(
                f"parallel.expert={self.expert}: allowed a divisor of parallel.shard x parallel.tensor = "
                f"{self.shard * self.tensor}: {_divisors(self.shard * self.tensor)}"
            )

    @property
    def expert_shard(self) -> int:
        """Ranks that hold slices of the same experts in one copy of the model."""
        return self.shard * self.tensor // self.expert

    @property
    def dense_shape(self) -> tuple[int, int, int]:
        """(replicate, shard, tensor); ranks fill it in row-major order."""
        return self.replicate, self.shard, self.tensor

    @property
    def expert_shape(self) -> tuple[int, int, int]:
        """(replicate, expert_shard, expert); ranks fill it in row-major order."""
        return self.replicate, self.expert_shard, self.expert

    def xla_shape(self) -> tuple[int, int, int]:
        """Axes (data, expert, model) of one mesh; devices 0, 1, 2, ... fill it row by row.

        Rows lie along (data, expert) and dense matrices along model. Experts lie along expert and their
        hidden units along model: each belongs to a whole tensor group, while tensor ranks that are processes
        hold different experts.

        Raises TopologyError where experts would be spread over more than the ranks that read different rows.
        """
        if self.shard % self.expert:
            raise TopologyError(
                f"parallel.expert={self.expert}: allowed a divisor of parallel.shard={self.shard} with "
                f"parallel.engine=xla: {_divisors(self.shard)}"
            )
        return self.replicate * self.shard // self.expert, self.expert, self.tensor

    def _size_and_stride(self, name: GroupName) -> tuple[int, int]:
        """Ranks of a group and the distance between neighbours; the axes of a group are adjacent."""
        match name:
            case "tensor":
                return self.tensor, 1
            case "shard":
                return self.shard, self.tensor
            case "replicate":
                return self.replicate, self.shard * self.tensor
            case "data" | "loss":
                return self.replicate * self.shard, self.tensor
            case "expert":
                return self.expert, 1
            case "expert_shard":
                return self.expert_shard, self.expert
            case "expert_data":
                return self.replicate * self.expert_shard, self.expert
            case "world":
                return self.world_size, 1

    def size(self, name: GroupName) -> int:
        """Ranks in each group of this kind."""
        return self._size_and_stride(name)[0]

    def coordinate(self, name: GroupName, rank: int) -> int:
        """Place of `rank` in its group of this kind, from 0."""
        if not 0 <= rank < self.world_size:
            raise TopologyError(f"rank {rank}: allowed 0 to {self.world_size - 1}")
        size, stride = self._size_and_stride(name)
        return rank // stride % size

    def group(self, name: GroupName, rank: int) -> range:
        """The group of this kind that `rank` is in, ascending, which is the order of its coordinates."""
        size, stride = self._size_and_stride(name)
        first = rank - self.coordinate(name, rank) * stride
        return range(first, first + size * stride, stride)

    def groups(self, name: GroupName) -> list[range]:
        """All groups of this kind; every rank is in exactly one."""
        return [self.group(name, rank) for rank in range(self.world_size) if not self.coordinate(name, rank)]

    def rows_of(self, rank: int, global_batch_rows: int) -> slice:
        """Rows of the global batch that `rank` reads; the same ones for all ranks of a tensor group.

        Consecutive rows, so that routing groups are those of one process. Raises TopologyError when the
        rows cannot be shared out evenly.
        """
        data_ranks = self.size("data")
        if global_batch_rows % data_ranks:
            raise TopologyError(
                f"train.global_batch_rows={global_batch_rows}: allowed a multiple of parallel.replicate x "
                f"parallel.shard = {data_ranks}"
            )
        rows = global_batch_rows // data_ranks
        first = self.coordinate("data", rank) * rows
        return slice(first, first + rows)

    def experts_of(self, rank: int, num_experts: int) -> slice:
        """Experts of each MoE layer that `rank` holds, whole or a slice of each.

        Raises TopologyError when they cannot be shared out evenly.
        """
        if num_experts % self.expert:
            borrowed = math.gcd(num_experts, self.shard * self.tensor)
            raise TopologyError(
                f"parallel.expert={self.expert}: allowed a divisor of model.num_experts={num_experts} and of "
                f"parallel.shard x parallel.tensor = {self.shard * self.tensor}: {_divisors(borrowed)}"
            )
        experts = num_experts // self.expert
        first = self.coordinate("expert", rank) * experts
        return slice(first, first + experts)


def resolve(config: ParallelConfig, world_size: int) -> Topology:
    """The layout of `world_size` processes; shard = -1 takes what the other degrees leave.

    Raises TopologyError naming the degrees that do not fit.
    """
    shard = config.shard
    if shard == -1:
        rest = config.replicate * config.tensor
        if world_size % rest:
            raise TopologyError(
                f"parallel.replicate={config.replicate} x parallel.tensor={config.tensor} is {rest}: allowed "
                f"a divisor of the {world_size} processes of this run: {_divisors(world_size)}"
            )
        shard = world_size // rest
    return Topology(world_size, config.replicate, shard, config.tensor, config.expert)


def check_fit(
    topology: Topology,
    model: ModelConfig,
    seq_len: int,
    global_batch_rows: int,
    micro_batch_rows: int,
) -> None:
    """Whether a model and its batch can be cut as the layout asks; micro_batch_rows -1 is all of a data rank.

    Raises TopologyError naming the first key that does not fit and what it may be.
    """
    _check_slices(topology, model, seq_len)
    if model.moe_every:
        topology.experts_of(0, model.num_experts)
    elif topology.expert > 1:
        raise TopologyError(
            f"parallel.expert={topology.expert}: allowed 1 for a model without experts (model.moe_every=0)"
        )
    _check_rows(topology, model, global_batch_rows, micro_batch_rows)


def _check_slices(topology: Topology, model: ModelConfig, seq_len: int) -> None:
    """Tensor ranks hold equal slices of heads, hidden units and vocabulary, and of each row's positions."""
    sliced = {
        "model.n_heads": model.n_heads,
        "model.d_ff": model.d_ff,
        "model.vocab_size": model.vocab_size,
        "train.seq_len": seq_len,
    }
    for key, value in sliced.items():
        if value % topology.tensor:
            raise TopologyError(
                f"parallel.tensor={topology.tensor} does not divide {key}={value}: allowed "
                f"{_divisors(math.gcd(*sliced.values()))}"
            )


def _check_rows(
    topology: Topology, model: ModelConfig, global_batch_rows: int, micro_batch_rows: int
) -> None:
    """Each data rank has as many rows as any other, in whole micro-batches of whole routing groups."""
    group_rows = 1
    if model.moe_every and model.group_rule != "rows":
        # Its groups follow from the rows at hand, so another layout would train another model.
        if topology.world_size > 1:
            raise TopologyError(
                f"model.group_rule={model.group_rule}: allowed rows where {topology.world_size} processes "
                "train"
            )
    elif model.moe_every:
        group_rows = model.group_rows
        if group_rows > 1 and global_batch_rows % (topology.size("data") * group_rows):
            raise TopologyError(
                f"train.global_batch_rows={global_batch_rows}: allowed a multiple of parallel.replicate x "
                f"parallel.shard x model.group_rows = {topology.size('data') * group_rows}"
            )
    rows = topology.rows_of(0, global_batch_rows).stop
    whole = [micro for micro in range(group_rows, rows + 1, group_rows) if rows % micro == 0]
    if micro_batch_rows not in (-1, *whole):
        groups = f"whole routing groups (model.group_rows={group_rows}) and " if group_rows > 1 else ""
        raise TopologyError(
            f"train.micro_batch_rows={micro_batch_rows}: allowed -1 or {groups}a divisor of the {rows} rows "
            f"of a data rank: {', '.join(map(str, whole))}"
        )


def _divisors(number: int) -> str:
    return ", ".join(str(divisor) for divisor in range(1, number + 1) if number % divisor == 0)
