"""Head, cross-entropy and log-partition in tiles of positions: static shapes, and any part of the vocabulary.

What `model.losses` does for one device, in the form that a partitioning compiler needs: a tile has some
positions of every row and the whole vocabulary, so that devices may share rows and vocabulary as they like,
and no index but a comparison picks the target's logit.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from openmoe.model.dispatch import Constrain, unconstrained
from openmoe.model.losses import HeadLoss
from openmoe.model.tensor_ranks import TensorRanks

LOGITS = ("rows", "positions", "vocab")
WEIGHTS_OF_ROWS = ("rows", "vocab", "embed")


# (a, b) -> the same, but what is made of b is begun when a is there.
InOrder = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def as_it_comes(first: Tensor, then: Tensor) -> tuple[Tensor, Tensor]:
    return first, then


def positions_head_loss(
    tile_bytes: int,
    constrain: Constrain = unconstrained,
    row_shares: int = 1,
    in_order: InOrder = as_it_comes,
) -> HeadLoss:
    """`linear_cross_entropy` for whole rows: hidden `[rows, seq_len, d_model]`, targets and results `[rows,
    seq_len]`. A tile's float32 logits take `tile_bytes` at most, on all devices together; the passes hold
    about three such tiles. `row_shares`: among so many devices rows are shared out. `in_order` keeps a
    compiler from making the weight's gradients of all tiles before it adds them up."""
    return partial(_loss, tile_bytes, constrain, row_shares, in_order)


def _loss(
    tile_bytes: int,
    constrain: Constrain,
    row_shares: int,
    in_order: InOrder,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    _: TensorRanks,
) -> tuple[Tensor, Tensor, Tensor]:
    positions = max(1, tile_bytes // (4 * len(hidden) * len(weight)))
    shares = math.gcd(row_shares, len(hidden))
    return _LossByPosition.apply(hidden, weight, targets, positions, constrain, shares, in_order)


class _LossByPosition(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        tile_positions: int,
        constrain: Constrain,
        row_shares: int,
        in_order: InOrder,
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        matrix = weight.to(hidden.dtype).t()
        vocabulary = torch.arange(len(weight), device=weight.device)
        nll, log_z, correct = [], [], []
        for x, target in zip(hidden.split(tile_positions, 1), targets.split(tile_positions, 1), strict=True):
            logits = constrain((x @ matrix).to(wide), LOGITS)
            best = logits.amax(-1)
            tile_log_z = best + (logits - best[..., None]).exp().sum(-1).log()
            is_target = vocabulary == target[..., None]
            target_logit = torch.where(is_target, logits, 0).sum(-1)
            # Of equal ones the first counts as the guess.
            earlier = (logits == best[..., None]) & (vocabulary < target[..., None])
            correct.append((target_logit == best) & ~earlier.any(-1))
            nll.append(tile_log_z - target_logit)
            log_z.append(tile_log_z)
        ctx.tile_positions, ctx.row_shares = tile_positions, row_shares
        ctx.constrain, ctx.in_order = constrain, in_order
        log_z_of_rows = torch.cat(log_z, 1)
        ctx.save_for_backward(hidden, weight, targets, log_z_of_rows)
        of_rows = torch.cat(correct, 1)
        ctx.mark_non_differentiable(of_rows)
        return torch.cat(nll, 1), log_z_of_rows, of_rows

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, grad_log_z: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, log_z = ctx.saved_tensors
        matrix = weight.to(hidden.dtype)
        vocabulary = torch.arange(len(weight), device=weight.device)
        # d loss / d logit = p - onehot(target); d log_z / d logit = p.
        factor = (grad_loss + grad_log_z)[..., None]
        parts = (hidden, targets, log_z, factor, grad_loss)
        tiles = zip(*(x.split(ctx.tile_positions, 1) for x in parts), strict=True)
        grad_hidden = []
        # One for each share of the rows until the end: a partitioner would add up over devices tile by tile.
        grad_weights = weight.new_zeros(ctx.row_shares, *weight.shape)
        for x, target, tile_log_z, tile_factor, tile_grad_loss in tiles:
            grad_weights, x = ctx.in_order(grad_weights, x)
            logits = ctx.constrain((x @ matrix.t()).to(log_z.dtype), LOGITS)
            grad = (logits - tile_log_z[..., None]).exp() * tile_factor
            grad = torch.where(vocabulary == target[..., None], grad - tile_grad_loss[..., None], grad)
            grad = ctx.constrain(grad, LOGITS).to(hidden.dtype)
            grad_hidden.append(grad @ matrix)
            grad, x = (part.unflatten(0, (ctx.row_shares, -1)) for part in (grad, x))
            of_tile = torch.einsum("srpv,srpd->svd", grad, x)
            grad_weights = ctx.constrain(grad_weights + of_tile, WEIGHTS_OF_ROWS)
        return torch.cat(grad_hidden, 1), grad_weights.sum(0), None, None, None, None, None
