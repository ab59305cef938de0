"""Loss and accuracy on held-back text of every source, at the evaluation capacity (paper Figures 1 and 2)."""

from collections.abc import Mapping, Sequence

import torch

from openmoe.model.decoder import Decoder
from openmoe.parallel.ranks import Ranks
from openmoe.train.record import sum_over_ranks
from openmoe.train.step import MicroBatch, loss_sums


@torch.no_grad()
def validate(model: Decoder, held_back: Mapping[str, Sequence[MicroBatch]], ranks: Ranks) -> dict[str, float]:
    """`eval/NAME/loss` (nats per loss token) and `eval/NAME/accuracy` for each named set of batches, of which
    each rank has its share. One sum over the ranks and one transfer from the device."""
    model.eval()
    sums = {}
    for name, batches in held_back.items():
        of_batches = []
        for batch in batches:
            ranks.begin_micro_batch(last=False)
            of_batches.append(loss_sums(model, batch))
        for key in ("lm", "correct", "weight"):
            total = torch.stack([getattr(batch, key) for batch in of_batches]).sum()
            sums[f"{key}/{name}"] = total * ranks.counts_loss
    model.train()
    if not sums:
        return {}
    numbers = sum_over_ranks(sums, ranks)
    metrics = {}
    for name in held_back:
        metrics[f"eval/{name}/loss"] = numbers[f"lm/{name}"] / numbers[f"weight/{name}"]
        metrics[f"eval/{name}/accuracy"] = numbers[f"correct/{name}"] / numbers[f"weight/{name}"]
    return metrics


def validation_share(rows: int, group_rows: int, data_rank: int, data_size: int) -> slice:
    """The rows of one data rank, of `rows` of each source: as many on each, in whole routing groups, so that
    groups are those of one process and every rank runs the same batches. The last ones may lie behind the
    end; they are rows of padding without loss."""
    share = -(-rows // (data_size * group_rows)) * group_rows
    return slice(data_rank * share, (data_rank + 1) * share)
