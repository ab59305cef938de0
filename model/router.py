"""Token-choice top-k routing with capacity (facts 2; flaxformer TokensChooseMaskedRouter)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openmoe.model.config import ModelConfig
from openmoe.model.tensor_ranks import TensorRanks


class Routing(NamedTuple):
    """Where each token of each group goes. G groups of T tokens, E experts, k choices.

    Where tensor ranks share the rows, T counts this rank's tokens of a group; slots are those of the group.
    A tuple, as what a block returns must show its tensors to hooks.
    """

    logits: Tensor  # [G, T, E], at least float32
    probs: Tensor  # [G, T, E], softmax of the logits
    expert_index: Tensor  # [G, T, k] int64, best first; ties go to the lower index
    gate: Tensor  # [G, T, k], the raw probabilities of the chosen experts, not renormalised
    slot: Tensor  # [G, T, k] int64, place in the expert's buffer of this group; -1 = dropped or not routed
    capacity: int

    @property
    def kept(self) -> Tensor:
        """[G, T, k] bool."""
        return self.slot >= 0


class RouterStatistics(NamedTuple):
    """Sums of one MoE layer over its groups; losses divide by their number once the batch is complete.

    Where tensor ranks share the rows, all but `num_groups` are this rank's terms of a sum over them.
    """

    num_groups: int
    # Sum over groups of E * sum_e f_e P_e; k a group at perfect balance.
    load_balancing_sum: Tensor
    router_z_sum: Tensor  # sum over groups of the mean of logsumexp(logits)^2
    assigned: Tensor  # [k, E] choices before dropping; detached, as all that follows
    kept: Tensor  # [k, E] choices that got a slot
    routed_tokens: Tensor  # tokens that were routed
    tokens_left_behind: Tensor  # routed tokens with no slot at all
    entropy_sum: Tensor  # nats, sum over routed tokens


class TopKRouter(nn.Module):
    """softmax(x W^T) in float32 or wider, the k best experts of each token, first choices served first."""

    def __init__(self, config: ModelConfig, ranks: TensorRanks) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.d_model))
        self.top_k = config.top_k
        self.ranks = ranks
        self.frozen = False

    def forward(
        self,
        x: Tensor,
        capacity: int,
        rows: int,
        routed: Tensor | None = None,
        limit: Tensor | None = None,
    ) -> tuple[Routing, RouterStatistics]:
        """Routes the tokens of each group.

        Args:
            x: `[G, T, d_model]`, this rank's tokens.
            capacity: slots per expert and group.
            rows: rows of the batch, of which x holds a slice of positions.
            routed: bool `[G, T * ranks]`, the whole groups; None = all tokens.
            limit: int64 `[G]`, slots per expert of each group where they differ, at most `capacity`.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = self.weight.detach() if self.frozen else self.weight
        logits = F.linear(x.to(wide), weight.to(wide))
        probs = logits.softmax(-1)
        expert_index = _top_k(probs.detach(), self.top_k)
        # Slots are given out over the whole group: its choices, a few integers a token, go to all its ranks.
        group_index = self._whole_groups(expert_index, rows)
        room = capacity if limit is None else limit[:, None]
        slot = self._own_tokens(_slots(group_index, len(weight), room, routed), rows)
        # The probabilities of the choices; a gather's gradient would be a scatter.
        chosen = one_hot(expert_index, len(weight))
        gate = torch.where(chosen, probs[..., None, :], 0).sum(-1)
        routing = Routing(logits, probs, expert_index, gate, slot, capacity)
        own = None if routed is None else self._own_tokens(routed, rows)
        return routing, _statistics(routing, group_index, routed, own)

    def _whole_groups(self, x: Tensor, rows: int) -> Tensor:
        """`[G, T, ...]` -> `[G, T * ranks, ...]`: groups are whole rows wherever rows are shared out."""
        if self.ranks.size == 1:
            return x
        by_row = x.reshape(rows, -1, *x.shape[2:])
        return self.ranks.gather_sequence(by_row).reshape(len(x), -1, *x.shape[2:])

    def _own_tokens(self, x: Tensor, rows: int) -> Tensor:
        """The way back."""
        if self.ranks.size == 1:
            return x
        by_row = x.reshape(rows, -1, *x.shape[2:])
        return self.ranks.own_slice(by_row).reshape(len(x), -1, *x.shape[2:])


def one_hot(index: Tensor, size: int) -> Tensor:
    """`[...]` -> bool `[..., size]`. A comparison: F.one_hot is a scatter under XLA, which can't be cut."""
    return index[..., None] == torch.arange(size, device=index.device)


def _top_k(probs: Tensor, k: int) -> Tensor:
    """Indices `[..., k]` of the k largest, of equals the lowest first, which torch.topk does not promise."""
    chosen = []
    for _ in range(k):
        best = probs.argmax(-1)
        chosen.append(best)
        probs = torch.where(one_hot(best, probs.shape[-1]), -1.0, probs)
    return torch.stack(chosen, -1)


def _slots(expert_index: Tensor, num_experts: int, capacity: int | Tensor, routed: Tensor | None) -> Tensor:
    """Place `[G, T, k]` of each choice in its expert's buffer, -1 from `capacity` (a Tensor: `[G, 1]`) on.

    Buffers fill with all first choices of the group in token order, then all second choices; a dropped choice
    still advances the counter (facts 2.1).
    """
    num_groups, tokens, k = expert_index.shape
    choice_major = expert_index.transpose(1, 2).reshape(num_groups, k * tokens)
    taken = one_hot(choice_major, num_experts)  # [G, kT, E]
    if routed is not None:
        taken = taken & routed.repeat(1, k)[..., None]
    count = torch.where(taken, taken.cumsum(1, dtype=torch.int32), 0).sum(-1)  # 0 where not routed
    slot = torch.where((count > 0) & (count <= capacity), count - 1, -1)
    return slot.view(num_groups, k, tokens).transpose(1, 2).long()


def _statistics(
    routing: Routing, group_index: Tensor, group_routed: Tensor | None, routed: Tensor | None
) -> RouterStatistics:
    """`group_index` and `group_routed` of whole groups, `routed` and `routing` of this rank's tokens."""
    num_experts, dtype = routing.probs.shape[-1], routing.probs.dtype
    log_z = routing.logits.logsumexp(-1)
    entropy = log_z - (routing.probs * routing.logits).sum(-1)
    weight = torch.ones_like(log_z) if routed is None else routed.to(dtype)
    chosen = one_hot(routing.expert_index, num_experts).to(dtype) * weight[..., None, None]  # [G, T, k, E]
    group_chosen, group_weight = chosen, weight
    if group_index is not routing.expert_index:
        group_weight = group_index.new_ones(group_index.shape[:2], dtype=dtype)
        group_weight = group_weight if group_routed is None else group_routed.to(dtype)
        group_chosen = one_hot(group_index, num_experts).to(dtype) * group_weight[..., None, None]
    group_tokens = group_weight.sum(1).clamp(min=1)  # [G]
    # f_e: share of the group's tokens that have e among their k choices, before dropping; P_e: mean
    # probability, of which the own tokens give one term.
    f = group_chosen.sum((1, 2)) / group_tokens[:, None]
    p = (routing.probs * weight[..., None]).sum(1) / group_tokens[:, None]
    kept = routing.kept.to(weight.dtype)
    return RouterStatistics(
        num_groups=len(routing.probs),
        load_balancing_sum=num_experts * (f * p).sum(),
        router_z_sum=((log_z.square() * weight).sum(1) / group_tokens).sum(),
        assigned=chosen.sum((0, 1)),
        kept=(chosen * kept[..., None]).sum((0, 1)),
        routed_tokens=weight.sum(),
        tokens_left_behind=(weight * (1 - kept.amax(-1))).sum(),
        entropy_sum=(entropy.detach() * weight).sum(),
    )
