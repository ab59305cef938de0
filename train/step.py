"""One update: micro-batches -> loss -> gradients -> optimizer. Nothing here waits for the device."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from openmoe.data.batch_memory import AllocateBytes, ordinary_memory
from openmoe.model.batch import Batch
from openmoe.model.decoder import Decoder
from openmoe.model.router import RouterStatistics
from openmoe.model.segments import SegmentTiles, tile_index
from openmoe.optim.build import set_learning_rate
from openmoe.parallel.ranks import Ranks, RowDevices
from openmoe.train.config import TrainConfig


@dataclass(frozen=True)
class MicroBatch:
    """Rows on the device; only the `loss_positions` (index into the flattened rows) reach the head, all
    positions where there are none."""

    batch: Batch
    loss_positions: Tensor | None


def host_memory(device: torch.device) -> AllocateBytes:
    """How to allocate host batches for `device`: a GPU copies from pinned memory while the host goes on.

    So a batch must be held until its copy is done; the loop holds it until it has read the step's metrics.
    """
    if device.type != "cuda":
        return ordinary_memory
    return lambda size_bytes: torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True).numpy()


def micro_batches(
    arrays: dict[str, np.ndarray],
    micro_batch_rows: int,
    device: torch.device,
    longest_segment: int | None = None,
    packed: bool | None = None,
    spread: RowDevices | None = None,
) -> list[MicroBatch]:
    """Contiguous blocks of rows of a host batch (keys of `model.batch.Batch`, `[rows, seq_len]`).

    Where no row of the whole batch holds two examples, a causal mask is enough, and attention without a mask
    tensor is faster; never decided block by block, or padding would see other columns in other splits.

    Args:
        packed: whether a row of the whole batch holds two examples; None where these are all its rows.
        longest_segment: the most positions an example may take; attention then runs over tiles of this width,
            one example each, whatever the length of the rows. None: over whole rows.
        spread: the devices of this process where rows are spread over many; each takes `micro_batch_rows` at
            a time. Their program is compiled, so nothing in a batch may depend on what its rows hold.
    """
    rows = len(arrays["input_tokens"])
    size = rows if micro_batch_rows == -1 else micro_batch_rows * (spread.data_ranks if spread else 1)
    if packed is None:
        packed = bool(arrays["segment_ids"].max() > 1)
    return [
        _micro_batch(
            {name: array[start : start + size] for name, array in arrays.items()},
            packed,
            longest_segment,
            device,
            spread,
        )
        for start in range(0, rows, size)
    ]


def _micro_batch(
    arrays: dict[str, np.ndarray],
    packed: bool,
    longest_segment: int | None,
    device: torch.device,
    spread: RowDevices | None,
) -> MicroBatch:
    def on_device(array: np.ndarray) -> Tensor:
        rows = torch.from_numpy(np.ascontiguousarray(array))
        return spread.put(rows) if spread else rows.to(device, non_blocking=True)

    tiles = None
    if longest_segment is not None:
        tiles = SegmentTiles(*map(on_device, tile_index(arrays["segment_ids"], longest_segment)))
    batch = Batch(
        on_device(arrays["input_tokens"]).long(),
        on_device(arrays["target_tokens"]).long(),
        on_device(arrays["loss_weights"]).float(),
        segment_ids=on_device(arrays["segment_ids"]) if packed else None,
        prefix_mask=on_device(arrays["prefix_mask"]) if spread or arrays["prefix_mask"].any() else None,
        source_ids=on_device(arrays["source_ids"]),
        tiles=tiles,
    )
    return MicroBatch(batch, None if spread else on_device(np.flatnonzero(arrays["loss_weights"])))


@dataclass(frozen=True)
class LossSums:
    """Sums over one micro-batch; the first three are float32 or wider and differentiable."""

    lm: Tensor  # weighted cross-entropy, nats
    z: Tensor  # weighted squared log-partition of the head
    correct: Tensor  # weighted count of right first guesses
    weight: Tensor  # sum of the loss weights
    router: list[RouterStatistics]


def loss_sums(model: Decoder, micro: MicroBatch) -> LossSums:
    """Forward pass and loss of one micro-batch, nothing normalised yet."""
    out = model(micro.batch)
    targets, weights = micro.batch.target_tokens, micro.batch.loss_weights
    if micro.loss_positions is not None:
        targets, weights = (x.flatten().index_select(0, micro.loss_positions) for x in (targets, weights))
    nll, log_z, correct = model.token_losses(out.hidden, micro.loss_positions, targets)
    weights = weights.to(nll.dtype)
    return LossSums(
        lm=(nll * weights).sum(),
        z=(log_z.square() * weights).sum(),
        correct=(correct * weights).sum().detach(),
        weight=weights.sum(),
        router=out.router,
    )


@dataclass
class StepResult:
    """Device tensors of one update; `train.record` turns them into numbers.

    All but `grad_norm` are this rank's terms of sums over the ranks.
    """

    loss: Tensor  # weighted total before the update
    lm_loss: Tensor
    z_loss: Tensor  # this and the router losses unweighted
    load_balancing_loss: Tensor
    router_z_loss: Tensor
    correct: Tensor
    loss_tokens: Tensor
    grad_norm: Tensor
    router: list[list[RouterStatistics]]  # per micro-batch, per MoE layer


def train_step(
    model: Decoder,
    optimizer: torch.optim.Optimizer,
    micro: Sequence[MicroBatch],
    global_loss_tokens: float,
    learning_rate: float,
    config: TrainConfig,
    ranks: Ranks,
) -> StepResult:
    """Accumulate gradients over the micro-batches and update once.

    Args:
        micro: this rank's blocks of equal shape, as many on every rank, so each has the same number of
            routing groups.
        global_loss_tokens: loss weights of the batch of all ranks, the divisor under `global_tokens`.
    """
    model.train()
    total: dict[str, Tensor] = {}
    router = []
    for i, block in enumerate(micro):
        ranks.begin_micro_batch(last=i == len(micro) - 1)
        sums = loss_sums(model, block)
        weight: Tensor | float = max(1.0, global_loss_tokens)
        blocks = len(micro)
        if config.loss_normalization == "per_microbatch":
            # Each block stands for itself and the sum is taken, not the mean (facts 2.5).
            weight, blocks = _over_ranks(sums.weight, ranks).clamp(min=1), 1
        groups = max(1, sum(s.num_groups for s in sums.router)) * blocks * ranks.loss_terms
        parts = {
            "lm_loss": sums.lm / weight,
            "z_loss": sums.z / weight,
            "load_balancing_loss": sum((s.load_balancing_sum for s in sums.router), sums.lm.new_zeros(()))
            / groups,
            "router_z_loss": sum((s.router_z_sum for s in sums.router), sums.lm.new_zeros(())) / groups,
        }
        ranks.backward(weighted(parts, config))
        parts = {name: part.detach() for name, part in parts.items()}
        parts |= {"correct": sums.correct, "loss_tokens": sums.weight}
        if not ranks.counts_loss:  # these rows' tokens are another rank's to count; routed tokens are its own
            for name in ("lm_loss", "z_loss", "correct", "loss_tokens"):
                parts[name] = torch.zeros_like(parts[name])
        parts["loss"] = weighted(parts, config)
        for name, value in parts.items():
            total[name] = total.get(name, 0) + value
        router.append(sums.router)
    grad_norm = ranks.finish_gradients()
    set_learning_rate(optimizer, learning_rate)
    ranks.update(optimizer)
    return StepResult(grad_norm=grad_norm, router=router, **total)


def _over_ranks(weight: Tensor, ranks: Ranks) -> Tensor:
    total = weight * ranks.counts_loss
    ranks.sum_(total)
    return total


def weighted(parts: dict[str, Tensor], config: TrainConfig) -> Tensor:
    """The training loss: LM + z-loss + load balancing + router z-loss (paper section 3.2 with Table 12's
    weights)."""
    return (
        parts["lm_loss"]
        + config.z_loss_weight * parts["z_loss"]
        + config.load_balancing_weight * parts["load_balancing_loss"]
        + config.router_z_loss_weight * parts["router_z_loss"]
    )
