"""What the ranks of a layout send each other in one update, by purpose, counted from shapes.

A test holds it against what training really sends.

Bytes are those of the larger side of a collective on one rank: of the whole that is gathered, of all parts
that are reduced; of an all-to-all what is sent. Over n ranks a ring moves (n - 1) / n of it through each
link, an all-reduce twice that.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn

from openmoe.model.config import ModelConfig
from openmoe.model.decoder import Decoder
from openmoe.model.groups import expert_capacity, routing_groups
from openmoe.optim.build import build_optimizer
from openmoe.optim.config import OptimConfig
from openmoe.parallel.build import DTYPES, exchange_of
from openmoe.parallel.config import ParallelConfig
from openmoe.parallel.placement import ParameterLayout, parameter_layouts
from openmoe.parallel.ranks import SHARING_GROUPS
from openmoe.parallel.topology import GroupName, Topology

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]


@dataclass(frozen=True)
class Traffic:
    purpose: str
    group: GroupName
    kind: Kind
    times: int  # in one update
    size_bytes: int  # of each
    at_most: bool = False  # on the mean over ranks; the tokens and their routing decide

    @property
    def total_bytes(self) -> int:
        return self.times * self.size_bytes


@dataclass(frozen=True)
class Step:
    """The numbers of one update that traffic depends on."""

    model: ModelConfig
    parallel: ParallelConfig
    topology: Topology
    precision: str
    seq_len: int
    micro_batches: int  # of a data rank
    micro_batch_rows: int

    @property
    def compute_bytes(self) -> int:
        return DTYPES[self.precision][1].itemsize

    @property
    def parameter_bytes(self) -> int:
        return DTYPES[self.precision][0].itemsize


def step_traffic(step: Step, optim: OptimConfig) -> list[Traffic]:
    """All that one update sends, but for a few numbers for the log; groups of one rank send nothing."""
    layouts = layouts_of(step)
    return [*pass_traffic(step, layouts), *Update(step, layouts, optim).run()]


def layouts_of(step: Step) -> dict[str, ParameterLayout]:
    with torch.device("meta"):
        return parameter_layouts(Decoder(step.model), step.topology)


def pass_traffic(step: Step, layouts: dict[str, ParameterLayout]) -> list[Traffic]:
    """What the forward and backward passes of an update send, and the sums of its gradients."""
    parts = [
        *_weights(step, layouts),
        *_sequences(step),
        *_tokens(step),
        *_gradients_over_tensor(step, layouts),
    ]
    return _sent(parts, step.topology)


def _sent(parts: Iterable[Traffic], topology: Topology) -> list[Traffic]:
    return [part for part in parts if part.times and part.size_bytes and topology.size(part.group) > 1]


@dataclass(frozen=True)
class Unit:
    """Weights that FSDP gathers together, in the order of the forward pass."""

    shard: GroupName  # the group that shares them
    weight_bytes: int  # gathered, in the type that they are used in
    gradient_bytes: int  # before they are reduced
    stays_whole: bool  # from the forward to the backward pass

    @property
    def what(self) -> str:
        return "weights of experts" if self.shard == "expert_shard" else "other weights"


def fsdp_units(step: Step, layouts: dict[str, ParameterLayout]) -> list[Unit]:
    """As `parallelize` makes them."""
    units: dict[str, list[ParameterLayout]] = {}
    for name, layout in layouts.items():
        block = ".".join(name.split(".")[:2]) if name.startswith("layers.") else name.split(".")[0]
        if block == "final_norm":
            block = "embedding" if step.model.tied_head else "head"
        inner = "experts" if layout.is_expert else "router" if ".router." in name else ""
        units.setdefault(f"{block} {inner}".strip(), []).append(layout)
    return [_unit(step, unit, members) for unit, members in units.items()]


def _unit(step: Step, name: str, members: list[ParameterLayout]) -> Unit:
    shard: GroupName = "expert_shard" if members[0].is_expert else "shard"
    ranks = step.topology.size(shard)
    elements = sum(_padded_elements(layout, step.topology, ranks) for layout in members)
    wide = name.endswith(("router", "embedding"))
    return Unit(
        shard,
        elements * (step.parameter_bytes if wide else step.compute_bytes),
        elements * step.parameter_bytes,
        stays_whole=wide or name == "head",
    )


def _weights(step: Step, layouts: dict[str, ParameterLayout]) -> Iterator[Traffic]:
    """FSDP: weights are gathered for each forward and backward pass and gradients reduced after it, unit by
    unit. Copies of the model add up their gradients once."""
    for unit in fsdp_units(step, layouts):
        gathers = step.micro_batches * (1 if unit.stays_whole else 2)
        grads, what = unit.gradient_bytes, f"gradients of {unit.what}"
        yield Traffic(unit.what, unit.shard, "all_gather", gathers, unit.weight_bytes)
        yield Traffic(what, unit.shard, "reduce_scatter", step.micro_batches, grads)
        yield Traffic(what, "replicate", "all_reduce", 1, grads // step.topology.size(unit.shard))


def _padded_elements(layout: ParameterLayout, topology: Topology, ranks: int) -> int:
    """Elements of this rank's slice of a parameter, rounded up to equal shards."""
    held = [piece.stop - piece.start for piece in layout.slices(topology, 0, with_shards=False)]
    held[layout.shard_dim] = -(-held[layout.shard_dim] // ranks) * ranks
    return prod(held)


def _sequences(step: Step) -> Iterator[Traffic]:
    """Between slices of rows and whole rows: a backward pass sends the mirror image of its forward pass."""
    model, rows = step.model, step.micro_batches
    size = step.micro_batch_rows * step.seq_len * model.d_model * step.compute_bytes
    in_blocks = 2 * model.n_layers * rows  # attention and FFN
    again = in_blocks if step.parallel.recompute == "full" else 0
    # Recomputation of a block ends before its last sum, of which the backward pass needs nothing (but where
    # the FFN of a MoE block runs before the experts, with parallel.overlap).
    summed_again = again // 2
    # Forward: a gather and a scatter in each, a scatter after the embedding, a gather before the head.
    yield Traffic("activations", "tensor", "all_gather", 2 * in_blocks + again + 2 * rows, size)
    yield Traffic("activations", "tensor", "reduce_scatter", 2 * in_blocks + summed_again + 2 * rows, size)
    wide = max(4, step.compute_bytes)
    tokens = step.micro_batch_rows * step.seq_len
    yield Traffic(
        "loss over the vocabulary",
        "tensor",
        "all_gather",
        rows,
        step.topology.tensor * 4 * tokens * wide,
        True,
    )


def _tokens(step: Step) -> Iterator[Traffic]:
    """Tokens to their experts and back, and the choices that slots are given out by."""
    model, topology = step.model, step.topology
    layers = len(model.moe_layers) * step.micro_batches
    again = layers if step.parallel.recompute == "full" else 0
    tokens = step.micro_batch_rows * step.seq_len
    yield Traffic("choices", "tensor", "all_gather", layers + again, tokens * model.top_k * 8)
    if not layers or topology.expert == 1:
        return
    groups = routing_groups(model, step.micro_batch_rows, step.seq_len, training=True)
    capacity = expert_capacity(model, groups.tokens_per_group, training=True)
    slots = model.num_experts * groups.num_groups * capacity
    row = model.d_model * step.compute_bytes
    exchange = exchange_of(model, step.parallel, topology)
    if exchange == "fixed":
        yield Traffic("tokens", "expert", "all_to_all", 4 * layers + 2 * again, slots * row)
    else:
        most = min(tokens // topology.tensor * model.top_k, slots)
        yield Traffic("tokens", "expert", "all_to_all", 4 * layers + 2 * again, most * row, True)
        yield Traffic("numbers of tokens", "expert", "all_to_all", layers + again, model.num_experts * 4)


def _gradients_over_tensor(step: Step, layouts: dict[str, ParameterLayout]) -> Iterator[Traffic]:
    """Weights that tensor ranks hold whole saw a part of the tokens; one sum for all of them."""
    mine = [layout.slices(step.topology, 0) for layout in layouts.values() if layout.partial_over_tensor]
    elements = sum(prod(piece.stop - piece.start for piece in slices) for slices in mine)
    size = elements * step.parameter_bytes
    yield Traffic("gradients of norms and routers", "tensor", "all_reduce", 1, size)


class Update:
    """The optimizer of a layout's first rank, on tensors without memory."""

    def __init__(self, step: Step, layouts: dict[str, ParameterLayout], optim: OptimConfig) -> None:
        dtype = DTYPES[step.precision][0]
        shapes = {
            name: [piece.stop - piece.start for piece in layout.slices(step.topology, 0)]
            for name, layout in layouts.items()
        }
        self.parameters = {
            name: nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"))
            for name, shape in shapes.items()
        }
        self._shards = _CountedShards(layouts)
        self._topology = step.topology
        self.optimizer = build_optimizer(optim, self.parameters.items(), self._shards)

    def run(self) -> list[Traffic]:
        """One update; what it asks to be summed."""
        for parameter in self.parameters.values():
            parameter.grad = torch.empty_like(parameter)
        self.optimizer.step()
        itemsize = next(iter(self.parameters.values())).itemsize
        sums = (
            Traffic("statistics of the optimizer", group, "all_reduce", 1, elements * itemsize)
            for group, elements in self._shards.sums
        )
        return _sent(sums, self._topology)


class _CountedShards:
    """`optim.shards.Shards` that notes how many elements each group would sum."""

    def __init__(self, layouts: dict[str, ParameterLayout]) -> None:
        self.layouts = layouts
        self.sums: list[tuple[GroupName, int]] = []

    def shape(self, name: str) -> tuple[int, ...]:
        return self.layouts[name].shape

    def splits(self, name: str) -> tuple[tuple[str, ...], ...]:
        return self.layouts[name].splits

    def sum_(self, parts: Sequence[tuple[Tensor, frozenset[str]]]) -> None:
        for group in SHARING_GROUPS:
            self.sums.append((group, sum(part.numel() for part, groups in parts if group in groups)))
