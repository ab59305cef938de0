"""From the device tensors of one step to the numbers of its line in metrics.jsonl."""

import torch
from torch import Tensor

from openmoe.model.router import RouterStatistics
from openmoe.train.step import StepResult


def step_metrics(result: StepResult, moe_layers: list[int]) -> dict[str, float]:
    """Losses, accuracy, gradient norm and, per MoE layer, load, entropy and drops. One transfer from the
    device.

    Per layer: `load_max_over_mean`, `load_cv` (coefficient of variation) and `dead_experts` count choices
    before dropping; `entropy` is the mean of the router's distribution in nats; `dropped_first` and so on the
    share of first, second, ... choices without a slot; `left_behind` that of tokens without any.
    """
    tensors: dict[str, Tensor] = {
        "loss": result.loss,
        "lm_loss": result.lm_loss,
        "z_loss": result.z_loss,
        "load_balancing_loss": result.load_balancing_loss,
        "router_z_loss": result.router_z_loss,
        "accuracy": result.correct / result.loss_tokens.clamp(min=1),
        "grad_norm": result.grad_norm,
    }
    layers = [_sum(list(blocks)) for blocks in zip(*result.router, strict=True)]
    assigned = sum((layer["assigned"].sum() for layer in layers), torch.zeros(()))
    kept = sum((layer["kept"].sum() for layer in layers), torch.zeros(()))
    tensors["dropped_fraction"] = 1 - kept / _positive(assigned) if layers else torch.zeros(())
    for index, layer in zip(moe_layers, layers, strict=True):
        tensors |= {f"router/layer{index:02d}/{name}": value for name, value in _layer(layer).items()}
    values = torch.stack([value.detach().to(torch.float64) for value in tensors.values()]).tolist()
    return dict(zip(tensors, values, strict=True))


def expert_load(result: StepResult, moe_layers: list[int]) -> dict[str, list[float]]:
    """`router/layerNN/load`: share of all choices that fell on each expert."""
    loads = {}
    for index, blocks in zip(moe_layers, zip(*result.router, strict=True), strict=True):
        assigned = _sum(list(blocks))["assigned"].sum(0)
        loads[f"router/layer{index:02d}/load"] = (assigned / _positive(assigned.sum())).tolist()
    return loads


def _sum(blocks: list[RouterStatistics]) -> dict[str, Tensor]:
    names = ("assigned", "kept", "routed_tokens", "tokens_left_behind", "entropy_sum")
    return {name: torch.stack([getattr(block, name) for block in blocks]).sum(0) for name in names}


def _layer(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    load = sums["assigned"].sum(0)
    mean = _positive(load.mean())
    dropped = 1 - sums["kept"].sum(1) / _positive(sums["assigned"].sum(1))
    choices = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")
    return {
        "load_max_over_mean": load.max() / mean,
        "load_cv": load.std(correction=0) / mean,
        "dead_experts": (load == 0).sum(),
        "entropy": sums["entropy_sum"] / _positive(sums["routed_tokens"]),
        "left_behind": sums["tokens_left_behind"] / _positive(sums["routed_tokens"]),
        **{f"dropped_{choices[i] if i < 8 else i + 1}": dropped[i] for i in range(len(dropped))},
    }


def _positive(x: Tensor) -> Tensor:
    """A divisor that turns 0/0 into 0."""
    return torch.where(x > 0, x, torch.ones_like(x))
