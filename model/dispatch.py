"""Token dispatchers: bring tokens to their experts and the weighted results back.

Two ways to the same sum over kept choices of gate * expert(x). `sort` computes no padding: capacity is a
mask, kept rows are sorted by expert, each expert is one contiguous GEMM. `einsum` is the GShard form with
one-hot masks and static shapes, what XLA partitions best, and the oracle of the tests.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from openmoe.model.experts import Experts
from openmoe.model.router import Routing


class TokenDispatcher(Protocol):
    def __call__(self, x: Tensor, routing: Routing, experts: Experts) -> Tensor:
        """x `[G, T, d_model]` -> `[G, T, d_model]`, zero for tokens without a slot."""


def sort_dispatch(x: Tensor, routing: Routing, experts: Experts) -> Tensor:
    num_groups, tokens, d_model = x.shape
    k = routing.expert_index.shape[-1]
    kept = routing.kept.reshape(-1, k)
    # Dropped choices go to a tail behind the last expert; on a GPU it stays: no host sync.
    expert = torch.where(kept, routing.expert_index.reshape(-1, k), experts.num_experts).flatten()
    order = expert.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    edges = torch.arange(experts.num_experts, device=order.device)
    ends = torch.searchsorted(expert[order], edges, right=True).to(torch.int32)

    if x.device.type == "cpu":  # reading `ends` costs nothing: leave the tail out but for one row
        order = order[: max(1, int(ends[-1]))]
        place = place.clamp(max=len(order) - 1)

    rows = _Gather.apply(x.reshape(-1, d_model), order // k, place.view(-1, k), kept)
    out = experts.grouped(rows, ends).index_select(0, place).view(-1, k, d_model)
    # Weighted in the router's precision. Tail rows are undefined: select, never multiply by zero.
    gate = routing.gate.reshape(-1, k, 1)
    y = torch.where(kept[..., None], out.to(gate.dtype), 0) * gate
    return y.sum(1).to(x.dtype).view(num_groups, tokens, d_model)


class _Gather(torch.autograd.Function):
    """rows = x[token]. Its gradient is a gather too: autograd's scatter-add has no fixed order on GPUs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, place: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(place, kept)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        place, kept = ctx.saved_tensors
        by_choice = grad.index_select(0, place.flatten()).view(*place.shape, -1)
        return torch.where(kept[..., None], by_choice, 0).sum(1), None, None, None


def einsum_dispatch(x: Tensor, routing: Routing, experts: Experts) -> Tensor:
    num_groups = x.shape[0]
    by_expert = F.one_hot(routing.expert_index, experts.num_experts).to(x.dtype)  # [G, T, k, E]
    slots = torch.arange(routing.capacity, device=x.device)
    by_slot = (routing.slot[..., None] == slots).to(x.dtype)  # [G, T, k, C]; all zero where dropped
    dispatch = torch.einsum("gtke,gtkc->gtec", by_expert, by_slot)
    buffers = torch.einsum("gtec,gtd->egcd", dispatch, x)
    out = experts.batched(buffers.flatten(1, 2)).unflatten(1, (num_groups, routing.capacity))
    combine = torch.einsum("gtke,gtkc,gtk->gtec", by_expert, by_slot, routing.gate.to(x.dtype))
    return torch.einsum("gtec,egcd->gtd", combine, out)


DISPATCHERS: dict[str, TokenDispatcher] = {"sort": sort_dispatch, "einsum": einsum_dispatch}
