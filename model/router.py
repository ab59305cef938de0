"""Token-choice top-k routing with capacity (facts 2; flaxformer TokensChooseMaskedRouter)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openmoe.model.config import ModelConfig


@dataclass(frozen=True)
class Routing:
    """Where each token of each group goes. G groups of T tokens, E experts, k choices."""

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


@dataclass(frozen=True)
class RouterStatistics:
    """Sums of one MoE layer over its groups; losses divide by their number once the batch is complete."""

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

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.d_model))
        self.top_k = config.top_k

    def forward(
        self, x: Tensor, capacity: int, routed: Tensor | None = None
    ) -> tuple[Routing, RouterStatistics]:
        """x `[G, T, d_model]`; routed bool `[G, T]`, None = all; capacity in slots per expert and group."""
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(wide), self.weight.to(wide))
        probs = logits.softmax(-1)
        expert_index = _top_k(probs.detach(), self.top_k)
        slot = _slots(expert_index, self.weight.shape[0], capacity, routed)
        routing = Routing(logits, probs, expert_index, probs.gather(-1, expert_index), slot, capacity)
        return routing, _statistics(routing, routed)


def _top_k(probs: Tensor, k: int) -> Tensor:
    """Indices `[..., k]` of the k largest, of equals the lowest first, which torch.topk does not promise."""
    chosen = []
    for _ in range(k):
        best = probs.argmax(-1, keepdim=True)
        chosen.append(best)
        probs = probs.scatter(-1, best, -1.0)
    return torch.cat(chosen, -1)


def _slots(expert_index: Tensor, num_experts: int, capacity: int, routed: Tensor | None) -> Tensor:
    """Place `[G, T, k]` of each choice in its expert's buffer, -1 from `capacity` on.

    Buffers fill with all first choices of the group in token order, then all second choices; a dropped choice
    still advances the counter (facts 2.1).
    """
    num_groups, tokens, k = expert_index.shape
    choice_major = expert_index.transpose(1, 2).reshape(num_groups, k * tokens)
    taken = F.one_hot(choice_major, num_experts).to(torch.int32)  # [G, kT, E]
    if routed is not None:
        taken = taken * routed.repeat(1, k)[..., None].to(torch.int32)
    count = taken.cumsum(1, dtype=torch.int32).gather(-1, choice_major[..., None])[..., 0]
    here = taken.gather(-1, choice_major[..., None])[..., 0]
    slot = torch.where((here > 0) & (count <= capacity), count - 1, -1)
    return slot.view(num_groups, k, tokens).transpose(1, 2).long()


def _statistics(routing: Routing, routed: Tensor | None) -> RouterStatistics:
    num_experts = routing.probs.shape[-1]
    chosen = F.one_hot(routing.expert_index, num_experts).to(routing.probs.dtype)  # [G, T, k, E]
    log_z = routing.logits.logsumexp(-1)
    entropy = log_z - (routing.probs * routing.logits).sum(-1)
    weight = torch.ones_like(log_z) if routed is None else routed.to(log_z.dtype)
    group_tokens = weight.sum(1).clamp(min=1)  # [G]
    chosen = chosen * weight[..., None, None]
    # f_e: share of the group's tokens that have e among their k choices, before dropping; P_e: mean
    # probability.
    f = chosen.sum((1, 2)) / group_tokens[:, None]
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
