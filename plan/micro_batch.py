"""One micro-batch of a layout, ready to be traced: this rank's slice of the model on the meta device."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from openmoe.model.batch import Batch
from openmoe.model.config import ModelConfig
from openmoe.model.decoder import Decoder
from openmoe.model.dispatch import Choices, TokenDispatcher
from openmoe.model.experts import Experts
from openmoe.model.groups import expert_capacity, routing_groups
from openmoe.model.router import Routing
from openmoe.model.tensor_ranks import ONE_RANK
from openmoe.parallel.build import DTYPES, exchange_of
from openmoe.parallel.collectives import TensorGroup, all_to_all
from openmoe.parallel.expert_dispatch import fixed_dispatch
from openmoe.parallel.parallelize import prepare_blocks
from openmoe.parallel.placement import parameter_layouts
from openmoe.parallel.recompute import Recompute
from openmoe.parallel.topology import Topology
from openmoe.parallel.traffic import Step
from openmoe.plan.trace import META, Trace, trace
from openmoe.train.config import TrainConfig
from openmoe.train.step import MicroBatch, loss_sums, weighted


class ShapeGroup:
    """`parallel.collectives.Group` of ranks that are not there: what arrives has its shape."""

    rank = 0

    def __init__(self, size: int) -> None:
        self.size = size

    def all_gather(self, x: Tensor) -> Tensor:
        return x.new_empty(self.size, *x.shape)

    def reduce_scatter(self, x: Tensor) -> Tensor:
        return x.new_empty(x.shape[1:])

    def all_to_all(self, x: Tensor, send: object = None, receive: object = None) -> Tensor:
        return x.new_empty(x.shape)


@dataclass(frozen=True)
class MicroBatchShape:
    """What the cost of a micro-batch depends on; equal for many layouts."""

    tensor: int
    expert: int
    exchange: str
    recompute: Recompute
    rows: int
    seq_len: int
    loss_share: float  # of the positions that reach the head


def shape_of(step: Step, loss_share: float) -> MicroBatchShape:
    return MicroBatchShape(
        step.topology.tensor, step.topology.expert, exchange_of(step.model, step.parallel, step.topology),
        step.parallel.recompute, step.micro_batch_rows, step.seq_len, loss_share,
    )  # fmt: skip


def trace_micro_batch(config: ModelConfig, train: TrainConfig, shape: MicroBatchShape) -> Trace:
    """Forward and backward pass of `shape.rows` rows on one rank."""
    model = _rank_of(config, train.precision, shape)
    prepare_blocks(model, shape.recompute, compile_modules=False)
    positions = int(shape.rows * shape.seq_len * shape.loss_share)
    with META:
        tokens = torch.ones(shape.rows, shape.seq_len, dtype=torch.int64)
        micro = MicroBatch(
            Batch(tokens, tokens, torch.ones(tokens.shape)), torch.zeros(positions, dtype=torch.int64)
        )
    model.train()

    def loss() -> Tensor:
        sums = loss_sums(model, micro)
        parts = {
            "lm_loss": sums.lm / positions,
            "z_loss": sums.z / positions,
            "load_balancing_loss": sum((s.load_balancing_sum for s in sums.router), sums.lm.new_zeros(())),
            "router_z_loss": sum((s.router_z_sum for s in sums.router), sums.lm.new_zeros(())),
        }
        return weighted(parts, train)

    return trace(model, loss)


def _rank_of(config: ModelConfig, precision: str, shape: MicroBatchShape) -> Decoder:
    """The weights that a rank computes with, as FSDP hands them to the modules."""
    parameter_dtype, compute_dtype = DTYPES[precision]
    # The smallest world that holds such a rank.
    ranks = math.lcm(shape.tensor, shape.expert)
    topology = Topology(ranks, 1, ranks // shape.tensor, shape.tensor, shape.expert)
    with META:
        model = Decoder(
            config,
            dispatcher=_dispatcher(config, shape),
            compute_dtype=compute_dtype,
            ranks=TensorGroup(ShapeGroup(shape.tensor)) if shape.tensor > 1 else ONE_RANK,  # type: ignore[arg-type]
        )
    for name, layout in parameter_layouts(model, topology).items():
        path, _, attribute = name.rpartition(".")
        held = [piece.stop - piece.start for piece in layout.slices(topology, 0, with_shards=False)]
        wide = "router" in name or (path == "embedding")
        dtype = parameter_dtype if wide else compute_dtype
        setattr(
            model.get_submodule(path), attribute, nn.Parameter(torch.empty(held, dtype=dtype, device=META))
        )
    return model


def _dispatcher(config: ModelConfig, shape: MicroBatchShape) -> TokenDispatcher:
    group = ShapeGroup(shape.expert)
    if shape.exchange == "fixed":
        return fixed_dispatch(group)  # type: ignore[arg-type]
    return balanced_dispatch(config, shape, group)


def balanced_dispatch(config: ModelConfig, shape: MicroBatchShape, group: ShapeGroup) -> TokenDispatcher:
    """The sorting dispatchers where each expert gets equally many rows, which their own code would have to
    read from the routing."""
    groups = routing_groups(config, shape.rows, shape.seq_len, training=True)
    slots = (
        config.num_experts
        * groups.num_groups
        * expert_capacity(config, groups.tokens_per_group, training=True)
    )

    own = config.num_experts // shape.expert

    def dispatch(x: Tensor, routing: Routing, experts: Experts, aside: object = None) -> Tensor:
        kept = routing.kept.flatten(0, 1)
        order = kept.flatten().to(torch.int64).argsort()  # the sort of the choices by expert
        places = min(kept.numel(), slots // shape.tensor)
        choices = Choices(order[:places], order.view(kept.shape), kept)
        ends = torch.arange(1, own + 1, dtype=torch.int32) * places // own
        rows = choices.take(x)
        if group.size > 1:
            rows = all_to_all(rows, group, [], []).index_select(0, order[:places])  # type: ignore[arg-type]
        out = experts(rows, ends)
        if group.size > 1:
            out = all_to_all(out.index_select(0, order[: len(out)]), group, [], [])  # type: ignore[arg-type]
        return choices.combine(out, routing.gate)

    return dispatch
