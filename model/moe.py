"""The MoE layer: cut rows into routing groups, route, dispatch, bring the rows back."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openmoe.model.batch import Batch
from openmoe.model.config import ModelConfig
from openmoe.model.dispatch import Aside, TokenDispatcher
from openmoe.model.experts import Experts
from openmoe.model.groups import Groups, expert_capacity, routing_groups
from openmoe.model.router import RouterStatistics, Routing, TopKRouter
from openmoe.model.tensor_ranks import TensorRanks


@dataclass(frozen=True)
class RoutingTrace:
    """What one MoE layer did with each token of a batch, or of the slice of its rows that a tensor rank has;
    read by the routing analysis."""

    layer: int
    token_ids: Tensor  # [rows, seq_len], the tokens that went in
    positions: Tensor  # [rows, seq_len], column in the row
    source_ids: Tensor | None  # [rows, seq_len], -1 = padding; None where the batch does not say
    expert_index: Tensor  # [rows, seq_len, k] int64, best first
    probs: Tensor  # [rows, seq_len, k], the gates
    kept: Tensor  # [rows, seq_len, k] bool
    logits: Tensor  # [rows, seq_len, E]


@dataclass(frozen=True)
class RowGroups:
    """Each row is a group of its own and its padding is not routed, whatever the model does in training."""

    capacity: Tensor | None  # [rows] int64, slots of an expert in each row; None = nothing is dropped


class MoELayer(nn.Module):
    """Router, dispatcher and experts. The dispatcher is handed in: parallel layouts bring their own."""

    def __init__(self, config: ModelConfig, dispatcher: TokenDispatcher, ranks: TensorRanks) -> None:
        super().__init__()
        self.config = config
        self.dispatcher = dispatcher
        self.ranks = ranks
        self.router = TopKRouter(config, ranks)
        self.experts = Experts(config)

    def forward(
        self,
        x: Tensor,
        real: Tensor,
        row_groups: RowGroups | None = None,
        aside: Aside | None = None,
    ) -> tuple[Tensor, RouterStatistics, Routing]:
        """x `[rows, seq_len / ranks, d_model]`; real bool `[rows, seq_len]`, False = padding. `aside` may
        be done on the way."""
        rows, seq_len = real.shape
        if row_groups is None:
            groups = routing_groups(self.config, rows, seq_len, self.training)
            capacity = expert_capacity(self.config, groups.tokens_per_group, self.training)
        else:
            groups, capacity = Groups(rows, seq_len, seq_len), seq_len
        padding = groups.padded_seq_len - seq_len
        grouped = F.pad(x, (0, 0, 0, padding)) if padding else x  # pad copies even where it adds nothing
        grouped = grouped.reshape(groups.num_groups, -1, x.shape[-1])
        routed = None
        if row_groups is not None or not self.config.route_padding:
            routed = F.pad(real, (0, padding)).reshape(groups.num_groups, -1)
        limit = None if row_groups is None else row_groups.capacity
        routing, statistics = self.router(grouped, capacity, rows, routed, limit)
        y = self.dispatcher(grouped, routing, self.experts, aside)
        y = y.reshape(rows, -1, x.shape[-1])[:, : x.shape[1]]
        return y, statistics, routing


def routing_trace(layer: int, routing: Routing, batch: Batch, ranks: TensorRanks) -> RoutingTrace:
    """The routing of MoE layer `layer` in the shape of the batch, without the padding of groups."""
    tokens = batch.input_tokens
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    own_tokens = ranks.own_slice(tokens)
    rows, seq_len = own_tokens.shape

    def by_row(x: Tensor) -> Tensor:
        return x.detach().reshape(rows, -1, x.shape[-1])[:, :seq_len]

    return RoutingTrace(
        layer=layer,
        token_ids=own_tokens,
        positions=ranks.own_slice(positions),
        source_ids=None if batch.source_ids is None else ranks.own_slice(batch.source_ids),
        expert_index=by_row(routing.expert_index),
        probs=by_row(routing.gate),
        kept=by_row(routing.kept),
        logits=by_row(routing.logits),
    )
