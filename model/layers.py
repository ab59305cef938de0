"""The dense layers: linear, RMSNorm, rotary attention, gated feed-forward.

Parameters are kept in float32 (float64 under `fp64`) and cast to the activations' dtype where they are used,
an explicit policy in place of autocast. Every matrix is stored `[out, in]`.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from openmoe.model.config import ModelConfig
from openmoe.model.segments import SegmentTiles
from openmoe.model.tensor_ranks import TensorRanks

# Takes the keys and values of new tokens, gives those of all tokens so far; [rows, heads, tokens, head_dim].
Remember = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Attend(Protocol):
    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """softmax(q k^T) v for each head, all `[rows, heads, seq_len, head_dim]`; mask bool
        `[rows, 1, queries, keys]`, None = causal."""


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=1.0)


def einsum_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """With rows and heads as dimensions of their own throughout, so that both may be shared out among
    devices: torch's kernel and its decomposition make one of the two. Softmax in float32 or wider."""
    if mask is None:
        mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    scores = torch.einsum("rhqd,rhkd->rhqk", q, k).to(torch.promote_types(q.dtype, torch.float32))
    weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)
    return torch.einsum("rhqk,rhkd->rhqd", weights.to(v.dtype), v)


class Embedding(nn.Module):
    """One row of weight `[vocab_size, d_model]` for each token; tensor ranks hold equal slices of the rows.

    nn.Embedding would fill it on the meta device too, for which torch loads its compiler: a second a start.
    """

    def __init__(self, vocab_size: int, d_model: int, ranks: TensorRanks) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, d_model))
        self.ranks = ranks

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens `[rows, seq_len]` -> `[rows, seq_len / ranks, d_model]`."""
        if self.ranks.size == 1:
            return F.embedding(tokens, self.weight)
        local = tokens - self.ranks.rank * len(self.weight)
        inside = (local >= 0) & (local < len(self.weight))
        x = F.embedding(local.where(inside, 0), self.weight)
        return self.ranks.scatter_sequence(x.masked_fill(~inside[..., None], 0))


class Linear(nn.Module):
    """y = x W^T without bias; weight `[out, in]`, cast to the dtype of x."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class RMSNorm(nn.Module):
    """x / rms(x) * scale with statistics in at least float32 (T5LayerNorm, facts 1.2)."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(d_model))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        # The original rounds before it scales; in bfloat16 the order shows.
        return normed.to(x.dtype) * self.scale.to(x.dtype)


def rotary_table(seq_len: int, head_dim: int, base: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin `[seq_len, head_dim / 2]` of position * base^(-2j/head_dim) in the dtype of `like`."""
    wide = torch.promote_types(like.dtype, torch.float32)
    exponent = torch.arange(0, head_dim, 2, device=like.device, dtype=wide) / head_dim
    angle = torch.outer(torch.arange(seq_len, device=like.device, dtype=wide), base**-exponent)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, half-split layout (facts 1.5); x `[rows, heads, seq_len, head_dim]`."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Attention(nn.Module):
    """Multi-head attention over whole rows; no biases, and 1/sqrt(head_dim) lies in q's initialiser (facts
    1.4). A tensor rank has some of the heads, and its result is a part of the sum over all of them."""

    def __init__(self, config: ModelConfig, attend: Attend = fused_attention) -> None:
        super().__init__()
        d_heads = config.n_heads * config.head_dim
        self.attend = attend
        self.head_dim = config.head_dim
        self.q = Linear(config.d_model, d_heads)
        self.k = Linear(config.d_model, d_heads)
        self.v = Linear(config.d_model, d_heads)
        self.o = Linear(d_heads, config.d_model)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None = None,
        query_mask: Tensor | None = None,
        tiles: SegmentTiles | None = None,
        remember: Remember | None = None,
    ) -> Tensor:
        """x `[rows, seq_len, d_model]`; mask bool `[rows, 1, seq_len, seq_len]`, None = causal; query_mask
        bool `[rows, seq_len]`, False where a query sees no key and averages over all columns instead. With
        tiles segments attend one by one: mask `[segments, 1, longest, longest]`, rotary of `longest`. Where
        earlier tokens are remembered x is the new ones: mask `[rows, 1, new, keys]`, rotary by row."""
        q, k, v = (project(x) for project in (self.q, self.k, self.v))
        if tiles is not None:
            q, k, v = tiles.cut(q), tiles.cut(k), tiles.cut(v)
        q, k, v = (h.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for h in (q, k, v))
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        if remember is not None:
            k, v = remember(k, v)
        out = self.attend(q, k, v, mask)
        if query_mask is not None:
            out = torch.where(query_mask[:, None, :, None], out, uniform_attention(q, k, v))
        out = out.transpose(1, 2).flatten(2)
        return self.o(out if tiles is None else tiles.join(out))


def uniform_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What the original gives a query without keys: mean(v), with the gradients of a softmax at equal scores.

    Its finite mask bias of -1e10 absorbs the scores s = q k^T in float32, so every column weighs 1/n; but the
    bias was added, so gradients pass: d out / d s_j = (v_j - mean(v)) / n. The first-order term of the
    softmax has just these, and is taken away again by value. (Fused attention can't do it: it keeps one
    log-sum-exp a row, where -1e10 absorbs log n and the weights come back as 1 in the backward pass.)
    """
    centred = k - k.mean(-2, keepdim=True)
    products = torch.einsum("rhkd,rhke->rhde", centred, v.detach()) / k.shape[-2]
    slope = torch.einsum("rhqd,rhde->rhqe", q, products)
    return v.mean(-2, keepdim=True) + (slope - slope.detach())


def gate(halves: Sequence[Tensor], wi_1: Tensor) -> Tensor:
    """Gated unit of `[..., d_ff]`: of wi_0 there is one half (swiglu3) or two (swiglu4)."""
    if len(halves) == 1:
        return F.silu(halves[0]) * wi_1
    a, b = halves
    return a * F.silu(b) * wi_1


def wi_0_shape(config: ModelConfig) -> tuple[int, ...]:
    """`[d_ff, d_model]`, or `[2, d_ff, d_model]` for swiglu4: halves apart, so that d_ff can be sharded."""
    halves = (2,) if config.ffn == "swiglu4" else ()
    return (*halves, config.d_ff, config.d_model)


class FeedForward(nn.Module):
    """Gated feed-forward of three matrices (paper) or four (released code, facts 1.3). A tensor rank has some
    of the hidden units, and its result is a part of the sum over all of them."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.wi_0 = nn.Parameter(torch.empty(wi_0_shape(config)))
        self.wi_1 = nn.Parameter(torch.empty(config.d_ff, config.d_model))
        self.wo = nn.Parameter(torch.empty(config.d_model, config.d_ff))

    def forward(self, x: Tensor) -> Tensor:
        d_ff, d_model = self.wi_1.shape
        # Half by half: d_ff may be shared out, and one matrix of both would not be.
        halves = [F.linear(x, half) for half in self.wi_0.to(x.dtype).view(-1, d_ff, d_model)]
        return F.linear(gate(halves, F.linear(x, self.wi_1.to(x.dtype))), self.wo.to(x.dtype))
