"""From the device tensors of one step to the numbers of its line in metrics.jsonl."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from openmoe.model.router import RouterStatistics
from openmoe.parallel.ranks import Ranks
from openmoe.train.step import StepResult

_SUMMED = ("assigned", "kept", "routed_tokens", "tokens_left_behind", "entropy_sum")  # over micro-batches


def step_metrics(
    result: StepResult, moe_layers: list[int], ranks: Ranks, own: Mapping[str, float]
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    """Losses, accuracy, gradient norm and, per MoE layer, load, entropy and drops, over all ranks; and what
    each rank has to say of itself (`own`), by rank. One sum over the ranks and one transfer from the device.

    Per layer: `load` is the share of all choices that fell on each expert, before dropping, and
    `load_max_over_mean`, `load_cv` (coefficient of variation) and `dead_experts` sum it up; `entropy` is the
    mean of the router's distribution in nats; `dropped_first`, `dropped_second` the share of these choices
    that got no slot; `left_behind` that of tokens without any.
    """
    losses = ("loss", "lm_loss", "z_loss", "load_balancing_loss", "router_z_loss")
    sums = {name: getattr(result, name) for name in (*losses, "correct", "loss_tokens")}
    for index, blocks in zip(moe_layers, zip(*result.router, strict=True), strict=True):
        sums |= {f"{index}/{name}": value for name, value in _sum(list(blocks)).items()}
    for name, value in own.items():
        sums[f"own/{name}"] = result.loss.new_zeros(ranks.world_size, dtype=torch.float64)
        sums[f"own/{name}"][ranks.rank] = value
    sums = sum_over_ranks(sums, ranks)

    tensors = {name: sums[name] for name in losses}
    tensors["accuracy"] = sums["correct"] / sums["loss_tokens"].clamp(min=1)
    tensors["grad_norm"] = result.grad_norm
    layers = [{name: sums[f"{index}/{name}"] for name in _SUMMED} for index in moe_layers]
    zero = sums["loss"].new_zeros(())
    assigned = sum((layer["assigned"].sum() for layer in layers), zero)
    kept = sum((layer["kept"].sum() for layer in layers), zero)
    tensors["dropped_fraction"] = (assigned - kept) / _positive(assigned)
    for index, layer in zip(moe_layers, layers, strict=True):
        tensors |= {f"router/layer{index:02d}/{name}": value for name, value in _layer(layer).items()}
    tensors |= {f"own/{name}": sums[f"own/{name}"] for name in own}
    numbers = {name: part.tolist() for name, part in _each(_flat(tensors).cpu(), tensors).items()}
    return numbers, {name: numbers.pop(f"own/{name}") for name in own}


def sum_over_ranks(terms: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
    """The sums in float64, in which counts of tokens stay exact; all in one exchange."""
    flat = _flat(terms)
    ranks.sum_(flat)
    return _each(flat, terms)


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([value.detach().to(torch.float64).flatten() for value in tensors.values()])


def _each(flat: Tensor, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    parts = flat.split([value.numel() for value in like.values()])
    return {name: part.view(like[name].shape) for name, part in zip(like, parts, strict=True)}


def _sum(blocks: list[RouterStatistics]) -> dict[str, Tensor]:
    return {name: torch.stack([getattr(block, name) for block in blocks]).sum(0) for name in _SUMMED}


def _layer(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    load = sums["assigned"].sum(0)
    mean = _positive(load.mean())
    dropped = 1 - sums["kept"].sum(1) / _positive(sums["assigned"].sum(1))
    choices = [("first", "second")[i] if i < 2 else f"choice_{i + 1}" for i in range(len(dropped))]
    return {
        "load_max_over_mean": load.max() / mean,
        "load_cv": load.std(correction=0) / mean,
        "dead_experts": (load == 0).sum(),
        "entropy": sums["entropy_sum"] / _positive(sums["routed_tokens"]),
        "left_behind": sums["tokens_left_behind"] / _positive(sums["routed_tokens"]),
        **{f"dropped_{choice}": dropped[i] for i, choice in enumerate(choices)},
        "load": load / _positive(load.sum()),
    }


def _positive(x: Tensor) -> Tensor:
    """A divisor that turns 0/0 into 0."""
    return torch.where(x > 0, x, torch.ones_like(x))
