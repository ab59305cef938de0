"""From the configuration to an optimizer."""

from collections.abc import Iterable

import torch
from torch import Tensor

from openmoe.optim.adafactor import Adafactor
from openmoe.optim.config import AdafactorConfig, AdamWConfig, OptimConfig
from openmoe.optim.factor_rules import rule_for
from openmoe.optim.shards import Shards


def build_optimizer(
    config: OptimConfig, named_parameters: Iterable[tuple[str, Tensor]], shards: Shards | None = None
) -> torch.optim.Optimizer:
    """Optimizer over all `named_parameters`; `set_learning_rate` is to be called before each step.

    With `shards` the parameters are parts of whole ones. AdamW works on each element by itself and needs
    nothing of the others; Adafactor's factoring and sums are those of the whole parameters.

    Raises ValueError where a parameter has no factoring rule or is no part of the whole one (Adafactor).
    """
    named = list(named_parameters)
    match config:
        case AdafactorConfig():
            rules = {
                name: rule_for(
                    name,
                    shards.shape(name) if shards is not None else tuple(param.shape),
                    config.min_dim_size_to_factor,
                )
                for name, param in named
            }
            return Adafactor(named, rules, config, shards)
        case AdamWConfig():
            decayed = [(name, param) for name, param in named if param.dim() > 1]
            norms = [(name, param) for name, param in named if param.dim() <= 1]
            groups = [
                {"params": group, "weight_decay": decay}
                for group, decay in ((decayed, config.weight_decay), (norms, 0.0))
                if group
            ]
            # The fused kernel exists for these devices; elsewhere (XLA) torch's default is the right one.
            fused = all(param.device.type in ("cpu", "cuda") for _, param in named)
            optimizer = torch.optim.AdamW(
                groups, lr=0.0, betas=(config.beta1, config.beta2), eps=config.epsilon, fused=fused or None
            )
            # torch makes this state in the first step; from the start, a checkpoint can be loaded into it.
            for _, param in named:
                optimizer.state[param] = empty_state(param, fused)
            return optimizer


def empty_state(param: Tensor, fused: bool = True) -> dict[str, Tensor]:
    """AdamW's state before the first step."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=param.device if fused else "cpu"),
        "exp_avg": torch.zeros_like(param, requires_grad=False),
        "exp_avg_sq": torch.zeros_like(param, requires_grad=False),
    }


def state_dims(optimizer: torch.optim.Optimizer) -> dict[str, dict[str, tuple[int, ...]]]:
    """Name of each parameter -> key of its state -> the dimensions of the parameter that this tensor keeps.

    So an expert's v_col over [expert, mlp, embed] may keep (0, 1), exp_avg keeps all dimensions and AdamW's
    own count of steps none. Of the part of a parameter with shape `part` a process holds the state
    `[part[d] for d in dims]`, split over the same groups, and the whole state follows from the whole shape.
    """
    found = {}
    for group in optimizer.param_groups:
        for name, param in zip(group["param_names"], group["params"], strict=True):
            if isinstance(optimizer, Adafactor):
                found[name] = optimizer.state_dims(param)
            else:
                whole = tuple(range(param.dim()))
                found[name] = {key: () if key == "step" else whole for key in optimizer.state[param]}
    return found


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the learning rate of the next step, a Python number, in every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
