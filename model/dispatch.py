"""Token dispatchers: bring tokens to their experts and the weighted results back.

Two ways to the same sum over kept choices of gate * expert(x). `sort` computes no padding: capacity is a
mask, kept rows are sorted by expert, each expert is one contiguous GEMM. `einsum` is the GShard form with
one-hot masks and static shapes, what XLA partitions best, and the oracle of the tests.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from openmoe.model.experts import Experts
from openmoe.model.router import Routing, one_hot

Result = TypeVar("Result")


class Aside(Generic[Result]):
    """Work that needs nothing of the experts. A dispatcher may run it while tokens are on their way to them;
    if none does, it is done when its result is asked for."""

    def __init__(self, work: Callable[[], Result]) -> None:
        self._work = work

    @cached_property
    def result(self) -> Result:
        return self._work()

    def run(self) -> None:
        _ = self.result


class Constrain(Protocol):
    def __call__(self, x: Tensor, axes: tuple[str, ...]) -> Tensor:
        """x, whose dimensions have these logical axes (`parallel.axis_rules`), laid out as a table says."""


def unconstrained(x: Tensor, axes: tuple[str, ...]) -> Tensor:
    return x


# Buffers [E, G, C, d_model] before and after the way to the experts.
TOKENS_OF_GROUPS = ("experts_of_group", "groups", "slots", "embed")
TOKENS_OF_EXPERTS = ("expert", "groups_of_expert", "slots", "embed")


class TokenDispatcher(Protocol):
    def __call__(self, x: Tensor, routing: Routing, experts: Experts, aside: Aside | None = None) -> Tensor:
        """x `[G, T, d_model]` -> `[G, T, d_model]`, zero for tokens without a slot."""


@dataclass(frozen=True)
class Choices:
    """Which token each place of a buffer takes, and where the choices of each token came to lie."""

    token: Tensor  # [places] int64, index into the flattened tokens
    place: Tensor  # [G * T, k] int64, any place for a choice that is not kept
    kept: Tensor  # [G * T, k] bool

    def first(self, places: int) -> "Choices":
        """The first places only; all kept choices must lie in them."""
        return Choices(self.token[:places], self.place.clamp(max=max(0, places - 1)), self.kept)

    def take(self, x: Tensor) -> Tensor:
        """x `[G, T, d_model]` -> `[places, d_model]`."""
        return _Gather.apply(x.flatten(0, 1), self.token, self.place, self.kept)

    def combine(self, out: Tensor, gate: Tensor) -> Tensor:
        """`[places, d_model]`, gate `[G, T, k]` -> the weighted sums over kept choices `[G, T, d_model]`."""
        if not len(out):  # nothing was kept: a row to point at, and still a part of the graph
            out = F.pad(out, (0, 0, 0, 1))
        by_choice = out.index_select(0, self.place.flatten()).unflatten(0, self.place.shape)
        # Weighted in the router's precision. Unused rows are undefined: select, never multiply by zero.
        y = torch.where(self.kept[..., None], by_choice.to(gate.dtype), 0) * gate.view(-1, gate.shape[-1], 1)
        return y.sum(1).to(out.dtype).unflatten(0, gate.shape[:2])


def sort_choices(routing: Routing) -> tuple[Choices, Tensor]:
    """Places by expert, then token, dropped choices behind the last expert; and int32 `[E]`, where each
    expert's places end. On a CPU dropped choices get no place."""
    num_experts, k = routing.logits.shape[-1], routing.expert_index.shape[-1]
    kept = routing.kept.reshape(-1, k)
    expert = torch.where(kept, routing.expert_index.reshape(-1, k), num_experts).flatten()
    order = expert.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device)
    edges = torch.arange(num_experts, device=order.device)
    ends = torch.searchsorted(expert[order], edges, right=True).to(torch.int32)
    choices = Choices(order // k, place.view(-1, k), kept)
    # Reading `ends` costs nothing on a CPU; on a GPU the tail stays: no host sync.
    return (choices.first(int(ends[-1])) if order.device.type == "cpu" else choices), ends


def sort_dispatch(x: Tensor, routing: Routing, experts: Experts, aside: Aside | None = None) -> Tensor:
    choices, ends = sort_choices(routing)
    return choices.combine(experts(choices.take(x), ends), routing.gate)


class _Gather(torch.autograd.Function):
    """rows = x[token]. Its gradient is a gather too: autograd's scatter-add has no fixed order on GPUs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, place: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(place, kept)
        return x.index_select(0, token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        place, kept = ctx.saved_tensors
        if not len(grad):
            return grad.new_zeros(len(place), grad.shape[1]), None, None, None
        by_choice = grad.index_select(0, place.flatten()).view(*place.shape, -1)
        return torch.where(kept[..., None], by_choice, 0).sum(1), None, None, None


def einsum_dispatcher(constrain: Constrain = unconstrained) -> TokenDispatcher:
    """The GShard form. Where devices share groups and experts, `constrain` says what lies where: groups over
    all data devices become groups of an expert over fewer, each of which has some experts. Between the two
    lies an all-to-all, and the same on the way back."""

    def dispatch(x: Tensor, routing: Routing, experts: Experts, aside: Aside | None = None) -> Tensor:
        num_groups = x.shape[0]
        by_expert = one_hot(routing.expert_index, routing.logits.shape[-1]).to(x.dtype)  # [G, T, k, E]
        slots = torch.arange(routing.capacity, device=x.device)
        by_slot = (routing.slot[..., None] == slots).to(x.dtype)  # [G, T, k, C]; all zero where dropped
        dispatch = torch.einsum("gtke,gtkc->gtec", by_expert, by_slot)
        buffers = constrain(torch.einsum("gtec,gtd->egcd", dispatch, x), TOKENS_OF_GROUPS)
        buffers = constrain(buffers, TOKENS_OF_EXPERTS)
        out = experts(buffers.flatten(1, 2)).unflatten(1, (num_groups, routing.capacity))
        out = constrain(constrain(out, TOKENS_OF_EXPERTS), TOKENS_OF_GROUPS)
        combine = torch.einsum("gtke,gtkc,gtk->gtec", by_expert, by_slot, routing.gate.to(x.dtype))
        return torch.einsum("gtec,egcd->gtd", combine, out)

    return dispatch


DISPATCHERS: dict[str, TokenDispatcher] = {"sort": sort_dispatch, "einsum": einsum_dispatcher()}
