"""From the configuration to an optimizer."""

from collections.abc import Iterable

import torch
from torch import Tensor

from openmoe.optim.adafactor import Adafactor
from openmoe.optim.config import AdafactorConfig, AdamWConfig, OptimConfig
from openmoe.optim.factor_rules import rule_for


def build_optimizer(
    config: OptimConfig, named_parameters: Iterable[tuple[str, Tensor]]
) -> torch.optim.Optimizer:
    """Optimizer over all `named_parameters`; `set_learning_rate` is to be called before each step.

    Raises ValueError where a parameter has no factoring rule (Adafactor).
    """
    named = list(named_parameters)
    match config:
        case AdafactorConfig():
            rules = {
                name: rule_for(name, tuple(param.shape), config.min_dim_size_to_factor)
                for name, param in named
            }
            return Adafactor(named, rules, config)
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
                optimizer.state[param] = {
                    "step": torch.zeros((), dtype=torch.float32, device=param.device if fused else "cpu"),
                    "exp_avg": torch.zeros_like(param),
                    "exp_avg_sq": torch.zeros_like(param),
                }
            return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Sets the learning rate of the next step, a Python number, in every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
