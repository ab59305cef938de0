"""Tokens to the ranks that hold their experts, and back.

The rows that a rank sends lie in the order of the experts, so the part of each receiving rank is contiguous.
Two exchanges with the same result:

* uneven: exactly the kept rows travel. The receiver must know how many come, so counts travel first and are
  read by the host. Works for any routing, also without capacity.
* fixed shape: every group sends its `capacity` slots of each expert, used or not. Nothing is read by the
  host and all shapes are constant; it needs whole groups on each rank, as slots are given out per group.

With `overlap` what needs nothing of the experts is done while rows travel to them, and its backward pass
while their gradients travel back. The ways from the experts overlap with nothing.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from openmoe.model.dispatch import Aside, Choices, TokenDispatcher, sort_choices
from openmoe.model.experts import Experts
from openmoe.model.router import Routing
from openmoe.parallel.collectives import Group, OverlappedAllToAll, all_to_all


def uneven_dispatch(group: Group, overlap: bool = False) -> TokenDispatcher:
    """A dispatcher over the expert group that sends kept rows only."""

    def dispatch(x: Tensor, routing: Routing, experts: Experts, aside: Aside | None = None) -> Tensor:
        choices, ends = sort_choices(routing)
        counts = ends.diff(prepend=ends.new_zeros(1)).view(group.size, -1)  # [ranks, experts of each]
        arriving = group.all_to_all(counts)  # [ranks, own experts]
        send, receive = torch.stack((counts.sum(1), arriving.sum(1))).tolist()  # the one host sync
        choices = choices.first(sum(send))
        rows = _travel(choices.take(x), group, aside if overlap else None, send, receive)
        # By sender, then expert -> by expert, then sender: each expert is one contiguous block.
        expert = torch.arange(arriving.shape[1], device=x.device).repeat(group.size)
        order = expert.repeat_interleave(arriving.flatten(), output_size=len(rows)).argsort(stable=True)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=x.device)
        own_ends = arriving.sum(0).cumsum(0).to(torch.int32)
        out = _Permute.apply(experts(_Permute.apply(rows, order, back), own_ends), back, order)
        return choices.combine(all_to_all(out, group, receive, send), routing.gate)

    return dispatch


def fixed_dispatch(group: Group, overlap: bool = False) -> TokenDispatcher:
    """A dispatcher over the expert group that sends all slots of whole groups."""

    def dispatch(x: Tensor, routing: Routing, experts: Experts, aside: Aside | None = None) -> Tensor:
        choices = _slots_by_expert(routing)
        buffers = choices.take(x).unflatten(0, (group.size, -1, len(x) * routing.capacity))
        rows = _travel(buffers, group, aside if overlap else None)  # [senders, own experts, slots, d_model]
        out = experts(rows.transpose(0, 1).flatten(1, 2))
        out = out.unflatten(1, (group.size, -1)).transpose(0, 1)
        return choices.combine(all_to_all(out, group).flatten(0, 2), routing.gate)

    return dispatch


def _travel(
    x: Tensor,
    group: Group,
    meanwhile: Aside | None,
    send: Sequence[int] | None = None,
    receive: Sequence[int] | None = None,
) -> Tensor:
    if meanwhile is None:
        return all_to_all(x, group, send, receive)
    exchange = OverlappedAllToAll(group, send, receive)
    arriving = exchange.start(x)
    meanwhile.run()
    return exchange.finish(arriving)


def _slots_by_expert(routing: Routing) -> Choices:
    """Places are (expert, group, slot). A free slot gets the first token: what comes of it is never read."""
    num_groups, tokens, k = routing.slot.shape
    num_experts, device = routing.logits.shape[-1], routing.slot.device
    group_index = torch.arange(num_groups, device=device)[:, None, None]
    place = (routing.expert_index * num_groups + group_index) * routing.capacity + routing.slot
    places = num_experts * num_groups * routing.capacity
    token = torch.zeros(places + 1, dtype=torch.int64, device=device)  # the last place takes dropped ones
    index = torch.arange(num_groups * tokens * k, device=device) // k
    token[torch.where(routing.kept, place, places).flatten()] = index
    kept = routing.kept.reshape(-1, k)
    return Choices(token[:places], torch.where(kept, place.reshape(-1, k), 0), kept)


class _Permute(torch.autograd.Function):
    """x[order]; the gradient goes the way back, which has a fixed order on GPUs too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(back)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, ctx.saved_tensors[0]), None, None
