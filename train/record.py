"""From the device tensors of a step to the numbers of its line in metrics.jsonl."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from openmoe.model.router import RouterStatistics
from openmoe.parallel.ranks import Ranks, SentNumbers
from openmoe.train.step import StepResult

_LOSSES = ("loss", "lm_loss", "z_loss", "load_balancing_loss", "router_z_loss")
_SUMMED = ("assigned", "kept", "routed_tokens", "tokens_left_behind", "entropy_sum")  # over micro-batches


@dataclass(frozen=True)
class SentStep:
    """The metrics of a step on their way from the device."""

    numbers: SentNumbers
    shapes: dict[str, torch.Size]  # of what `numbers` holds, in order
    own: tuple[str, ...]  # names of what each rank says of itself


def send_metrics(
    result: StepResult, moe_layers: list[int], ranks: Ranks, own: Mapping[str, float]
) -> SentStep:
    """Starts a step's metrics on their way, with what this rank has to say of itself (`own`). One sum over
    the ranks; waits for nothing."""
    sums = {name: getattr(result, name) for name in (*_LOSSES, "correct", "loss_tokens")}
    for index, blocks in zip(moe_layers, zip(*result.router, strict=True), strict=True):
        sums |= {f"{index}/{name}": value for name, value in _sum(list(blocks)).items()}
    same = {"grad_norm": result.grad_norm}
    numbers = ranks.send_numbers(_flat(sums), _flat(same), tuple(own.values()))
    return SentStep(numbers, {name: value.shape for name, value in (sums | same).items()}, tuple(own))


def read_metrics(
    steps: Sequence[SentStep], moe_layers: list[int], ranks: Ranks
) -> list[tuple[dict[str, Any], dict[str, list[float]]]]:
    """For each step its losses, accuracy, gradient norm and, per MoE layer, load, entropy and drops, over all
    ranks; and what each rank has said of itself, by rank. One transfer from the device for all steps.

    Per layer: `load` is the share of all choices that fell on each expert, before dropping, and
    `load_max_over_mean`, `load_cv` (coefficient of variation) and `dead_experts` sum it up; `entropy` is the
    mean of the router's distribution in nats; `dropped_first`, `dropped_second` the share of these choices
    that got no slot; `left_behind` that of tokens without any.
    """
    read = ranks.read_numbers([step.numbers for step in steps])
    return [
        (_metrics(_each(row, step.shapes), moe_layers), dict(zip(step.own, of_ranks.T.tolist(), strict=True)))
        for step, (row, of_ranks) in zip(steps, read, strict=True)
    ]


def sum_over_ranks(terms: Mapping[str, Tensor], ranks: Ranks) -> dict[str, float]:
    """The sums of scalars in float64, in which counts of tokens stay exact; waits for the device."""
    flat = _flat(terms)
    [(sums, _)] = ranks.read_numbers([ranks.send_numbers(flat, flat[:0], ())])
    return dict(zip(terms, sums.tolist(), strict=True))


def _metrics(sums: dict[str, Tensor], moe_layers: list[int]) -> dict[str, Any]:
    tensors = {name: sums[name] for name in _LOSSES}
    tensors["accuracy"] = sums["correct"] / sums["loss_tokens"].clamp(min=1)
    tensors["grad_norm"] = sums["grad_norm"]
    layers = [{name: sums[f"{index}/{name}"] for name in _SUMMED} for index in moe_layers]
    zero = sums["loss"].new_zeros(())
    assigned = sum((layer["assigned"].sum() for layer in layers), zero)
    kept = sum((layer["kept"].sum() for layer in layers), zero)
    tensors["dropped_fraction"] = (assigned - kept) / _positive(assigned)
    for index, layer in zip(moe_layers, layers, strict=True):
        tensors |= {f"router/layer{index:02d}/{name}": value for name, value in _layer(layer).items()}
    return {name: value.double().tolist() for name, value in tensors.items()}


def _flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([value.detach().to(torch.float64).flatten() for value in tensors.values()])


def _each(flat: Tensor, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    parts = flat.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shapes[name]) for name, part in zip(shapes, parts, strict=True)}


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
