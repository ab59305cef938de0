"""The experts of one MoE layer: E feed-forwards as stacked tensors."""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openmoe.model.config import ModelConfig
from openmoe.model.layers import gate, wi_0_shape


class Experts(nn.Module):
    """wi_0 `[E, (2,) d_ff, d_model]`, wi_1 `[E, d_ff, d_model]`, wo `[E, d_model, d_ff]`, with E the experts
    of the layer or, under expert parallelism, of this rank."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.wi_0 = nn.Parameter(torch.empty(config.num_experts, *wi_0_shape(config)))
        self.wi_1 = nn.Parameter(torch.empty(config.num_experts, config.d_ff, config.d_model))
        self.wo = nn.Parameter(torch.empty(config.num_experts, config.d_model, config.d_ff))

    def _weights(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """wi_0 here always with its halves, one or two."""
        num_experts, d_ff, d_model = self.wi_1.shape
        wi_0 = self.wi_0.view(num_experts, -1, d_ff, d_model)
        return wi_0.to(dtype), self.wi_1.to(dtype), self.wo.to(dtype)

    def forward(self, x: Tensor, ends: Tensor | None = None) -> Tensor:
        """Fixed buffers x `[E, slots, d_model]`; or with `ends` rows sorted by expert, see `grouped`."""
        return self.batched(x) if ends is None else self.grouped(x, ends)

    def grouped(self, x: Tensor, ends: Tensor) -> Tensor:
        """Rows sorted by expert: x `[rows, d_model]`, expert e has rows ends[e-1] to ends[e] (int32 `[E]`).

        Rows after the last end belong to no expert; what comes out there is undefined.
        """
        wi_0, wi_1, wo = self._weights(x.dtype)
        wi_0 = wi_0.flatten(1, 2)
        bounds = None if len(x) and _has_grouped_gemm(x, wi_1) else [0, *ends.tolist()]
        halves = grouped_mm(x, wi_0, ends, bounds).split(wi_1.shape[1], -1)
        return grouped_mm(gate(halves, grouped_mm(x, wi_1, ends, bounds)), wo, ends, bounds)

    def batched(self, x: Tensor) -> Tensor:
        """Fixed buffers: x `[E, slots, d_model]`."""
        wi_0, wi_1, wo = self._weights(x.dtype)
        # Half by half: d_ff may be shared out, and one matrix of both would not be.
        halves = [x.bmm(half.transpose(1, 2)) for half in wi_0.unbind(1)]
        return gate(halves, x.bmm(wi_1.transpose(1, 2))).bmm(wo.transpose(1, 2))


def _has_grouped_gemm(x: Tensor, weight: Tensor) -> bool:
    """torch's grouped GEMM: on CUDA, in bfloat16, both sides in whole steps of 16 bytes."""
    aligned = weight.shape[1] % 8 == 0 and weight.shape[2] % 8 == 0
    return x.is_cuda and x.dtype == torch.bfloat16 and aligned and hasattr(F, "grouped_mm")


def grouped_mm(x: Tensor, weight: Tensor, ends: Tensor, bounds: list[int] | None) -> Tensor:
    """x[rows of e] @ weight[e]^T for every e; x `[rows, in]`, weight `[E, out, in]`, ends int32 `[E]`.

    Without `bounds` torch's grouped GEMM reads `ends` on the device. With them (0 and the ends, on the host)
    one GEMM an expert writes into its slice, which on a CPU is as fast and covers float32 and float64.
    """
    if bounds is None:
        return F.grouped_mm(x, weight.transpose(-2, -1), offs=ends)
    return _GroupedMM.apply(x, weight, bounds)


class _GroupedMM(torch.autograd.Function):
    """One node for all experts: weight[e] under autograd would write a full [E, ...] gradient each time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bounds: list[int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bounds = bounds
        out = x.new_empty(x.shape[0], weight.shape[1])
        for e, (start, end) in enumerate(pairwise(bounds)):
            torch.mm(x[start:end], weight[e].t(), out=out[start:end])
        out[bounds[-1] :].zero_()
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
        for e, (start, end) in enumerate(pairwise(ctx.bounds)):
            torch.mm(grad[start:end], weight[e], out=grad_x[start:end])
            torch.mm(grad[start:end].t(), x[start:end], out=grad_weight[e])
        grad_x[ctx.bounds[-1] :].zero_()
        return grad_x, grad_weight, None
