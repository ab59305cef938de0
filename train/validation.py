"""Loss and accuracy on held-back text of every source, at the evaluation capacity (paper Figures 1 and 2)."""

from collections.abc import Mapping, Sequence

import torch

from openmoe.model.decoder import Decoder
from openmoe.train.step import MicroBatch, loss_sums


@torch.no_grad()
def validate(model: Decoder, held_back: Mapping[str, Sequence[MicroBatch]]) -> dict[str, float]:
    """`eval/NAME/loss` (nats per loss token) and `eval/NAME/accuracy` for each named set of batches."""
    model.eval()
    metrics = {}
    for name, batches in held_back.items():
        sums = [loss_sums(model, batch) for batch in batches]
        weight = torch.stack([s.weight for s in sums]).sum()
        metrics[f"eval/{name}/loss"] = (torch.stack([s.lm for s in sums]).sum() / weight).item()
        metrics[f"eval/{name}/accuracy"] = (torch.stack([s.correct for s in sums]).sum() / weight).item()
    model.train()
    return metrics
