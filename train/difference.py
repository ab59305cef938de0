"""How far two models are apart on the same rows: in loss, in logits, in distribution, and layer by layer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from openmoe.model.decoder import Decoder
from openmoe.train.step import MicroBatch

LOGITS_AT_ONCE = 2**24  # elements of each model's logits in memory


@dataclass
class Difference:
    """Means over the loss tokens of some rows, and the blocks' differences by layer."""

    tokens: float = 0.0
    loss_before: float = 0.0  # nats per token
    loss_after: float = 0.0
    logit_difference: float = 0.0  # mean |difference| over tokens and vocabulary
    kl: float = 0.0  # nats per token, of the second from the first
    # Root mean square of the change of a block's output over that of what the block adds, both blocks given
    # the first model's input.
    layers: list[float] = field(default_factory=list)


@torch.no_grad()
def difference(first: Decoder, second: Decoder, batches: Sequence[MicroBatch]) -> Difference:
    """Both models in evaluation, at the evaluation capacity. They have the same layers but for experts."""
    found = Difference()
    squares = torch.zeros(len(first.layers), 2, dtype=torch.float64)
    handles = [
        block.register_forward_hook(_compare_block(second, layer, squares))
        for layer, block in enumerate(first.layers)
    ]
    first.eval()
    second.eval()
    try:
        for micro in batches:
            before = first(micro.batch).hidden.flatten(0, 1)
            after = second(micro.batch).hidden.flatten(0, 1)
            _add_tokens(found, first, second, before, after, micro)
    finally:
        for handle in handles:
            handle.remove()
    if found.tokens:
        for name in ("loss_before", "loss_after", "logit_difference", "kl"):
            setattr(found, name, getattr(found, name) / found.tokens)
    found.layers = (squares[:, 0] / squares[:, 1].clamp(min=1e-300)).sqrt().tolist()
    return found


def _compare_block(second: Decoder, layer: int, squares: Tensor) -> Callable[..., None]:
    def compare(_module: nn.Module, arguments: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x = arguments[0]
        theirs = second.layers[layer](*arguments)[0]
        squares[layer, 0] += (theirs - output[0]).double().square().sum()
        squares[layer, 1] += (output[0] - x).double().square().sum()

    return compare


def _add_tokens(
    found: Difference, first: Decoder, second: Decoder, before: Tensor, after: Tensor, micro: MicroBatch
) -> None:
    targets = micro.batch.target_tokens.flatten()
    weights = micro.batch.loss_weights.flatten().double()
    step = max(1, LOGITS_AT_ONCE // first.config.vocab_size)
    for positions in weights.nonzero()[:, 0].split(step):
        logits = [
            model.logits(hidden[positions]).double() for model, hidden in ((first, before), (second, after))
        ]
        p, q = (x.log_softmax(-1) for x in logits)
        weight, target = weights[positions], targets[positions, None]
        found.tokens += float(weight.sum())
        found.loss_before -= float((p.gather(-1, target)[:, 0] * weight).sum())
        found.loss_after -= float((q.gather(-1, target)[:, 0] * weight).sum())
        found.logit_difference += float(((logits[0] - logits[1]).abs().mean(-1) * weight).sum())
        found.kl += float(((p.exp() * (p - q)).sum(-1) * weight).sum())
