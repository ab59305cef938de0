"""Head, cross-entropy and log-partition in one function that never holds the logits.

The head of a 256K vocabulary is over half of Base's FLOPs, and its logits would take 1 MiB a token in
float32. Both passes walk the vocabulary in tiles: the forward pass keeps a running maximum and sum, the
backward pass computes each tile of logits again and turns it into gradients in place. One GEMM more than the
plain way, and on a CPU still faster, because a tile stays in cache.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from openmoe.model.tensor_ranks import ONE_RANK, TensorRanks

# (hidden, weight, targets, ranks) -> cross-entropy, log-partition, correctness; see `linear_cross_entropy`.
HeadLoss = Callable[[Tensor, Tensor, Tensor, TensorRanks], tuple[Tensor, Tensor, Tensor]]

TILE_BYTES = 32 * 2**20  # of float32 logits; the passes hold about three such tiles


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, ranks: TensorRanks = ONE_RANK
) -> tuple[Tensor, Tensor, Tensor]:
    """Per-token loss of a linear head, the same on all tensor ranks.

    Args:
        hidden: `[tokens, d_model]`. Its gradient is that of this rank's part of the vocabulary, one term of a
            sum over the ranks.
        weight: `[vocab_size / ranks, d_model]`, cast to the dtype of hidden tile by tile.
        targets: `[tokens]` int64.
        ranks: among which the vocabulary is shared out.

    Returns:
        Cross-entropy `[tokens]` in nats and log-partition `[tokens]` (its square is the output z-loss), both
        differentiable and float32 or wider; and whether the best logit, the first of equals, is the target's,
        bool `[tokens]`.
    """
    return _LinearCrossEntropy.apply(hidden, weight, targets, ranks)


def _tiles(weight: Tensor, tokens: int) -> list[slice]:
    rows = max(1, TILE_BYTES // (4 * max(1, tokens)))
    return [slice(start, min(start + rows, len(weight))) for start in range(0, len(weight), rows)]


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, ranks: TensorRanks
    ) -> tuple[Tensor, Tensor, Tensor]:
        first = ranks.rank * len(weight)
        targets = targets - first  # outside of this rank's slice: below 0 or too large
        wide = torch.promote_types(hidden.dtype, torch.float32)
        tokens = len(hidden)
        best = hidden.new_full((tokens,), float("-inf"), dtype=wide)
        best_index = torch.zeros_like(targets)
        total = hidden.new_zeros(tokens, dtype=wide)  # sum of exp(logit - best)
        target_logit = hidden.new_zeros(tokens, dtype=wide)
        for tile in _tiles(weight, tokens):
            logits = (hidden @ weight[tile].to(hidden.dtype).t()).to(wide)
            tile_best, tile_index = logits.max(1)
            new_best = torch.maximum(best, tile_best)
            best_index = torch.where(tile_best > best, tile_index + tile.start, best_index)
            local = (targets - tile.start).clamp(0, logits.shape[1] - 1)
            inside = (targets >= tile.start) & (targets < tile.stop)
            target_logit = torch.where(inside, logits.gather(1, local[:, None])[:, 0], target_logit)
            total = total * (best - new_best).exp() + logits.sub_(new_best[:, None]).exp_().sum(1)
            best = new_best
        correct = best_index == targets
        if ranks.size > 1:
            best, total, target_logit, correct = _over_ranks(ranks, best, total, target_logit, correct)
        log_z = best + total.log()
        ctx.save_for_backward(hidden, weight, targets, log_z)
        ctx.mark_non_differentiable(correct)
        return log_z - target_logit, log_z, correct

    @staticmethod
    def backward(
        ctx: Any, grad_loss: Tensor, grad_log_z: Tensor, _: Tensor
    ) -> tuple[Tensor, Tensor, None, None]:
        hidden, weight, targets, log_z = ctx.saved_tensors
        wide = log_z.dtype
        # d loss / d logit = p - onehot(target); d log_z / d logit = p.
        factor = (grad_loss + grad_log_z)[:, None]
        grad_hidden = torch.zeros_like(hidden, dtype=wide)
        grad_weight = torch.empty_like(weight)
        for tile in _tiles(weight, len(hidden)):
            tile_weight = weight[tile].to(hidden.dtype)
            grad = (hidden @ tile_weight.t()).to(wide)
            grad.sub_(log_z[:, None]).exp_().mul_(factor)
            inside = (targets >= tile.start) & (targets < tile.stop)
            local = (targets - tile.start).clamp(0, grad.shape[1] - 1)
            grad.scatter_add_(1, local[:, None], torch.where(inside, -grad_loss, 0)[:, None])
            grad = grad.to(hidden.dtype)
            grad_hidden += grad @ tile_weight
            grad_weight[tile] = grad.t() @ hidden
        return grad_hidden.to(hidden.dtype), grad_weight, None, None


def _over_ranks(
    ranks: TensorRanks, best: Tensor, total: Tensor, target_logit: Tensor, correct: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four results over the whole vocabulary from those over each rank's slice, in one exchange."""
    parts = ranks.stack(torch.stack((best, total, target_logit, correct.to(best.dtype))))
    bests, totals, target_logits, corrects = parts.unbind(1)  # each [ranks, tokens]
    best, winner = bests.max(0)  # the first of equals, as in one slice
    total = (totals * (bests - best).exp()).sum(0)
    return best, total, target_logits.sum(0), corrects.gather(0, winner[None])[0] > 0
