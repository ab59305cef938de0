"""The tensors of a training run under their logical names: model/<name>, optimizer/<name>/<key>,
rng/torch_cpu.

The tensors are the live ones, so filling them in place restores the run.
"""

import torch
from torch import Tensor, nn


def training_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All tensors that a run's next step depends on, without copying (but for the state of the generator)."""
    return model_tensors(model) | optimizer_tensors(optimizer) | {"rng/torch_cpu": torch.get_rng_state()}


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """model/<fully qualified name> -> parameter or buffer."""
    return {f"model/{name}": tensor for name, tensor in model.state_dict().items()}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """optimizer/<fully qualified name of the parameter>/<key> -> state tensor ("v_row", "exp_avg").

    The optimizer must have been made with named parameters and have all its state from the start, as
    `optim.build.build_optimizer` sees to: state made in the first step would be missing from a resumed run.
    """
    return {
        f"optimizer/{name}/{key}": value
        for group in optimizer.param_groups
        for name, param in zip(group["param_names"], group["params"], strict=True)
        for key, value in optimizer.state[param].items()
    }


def restore_counters(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], step: int) -> None:
    """Puts back what is no live tensor: the state of torch's generator, and Adafactor's count of updates."""
    torch.set_rng_state(tensors["rng/torch_cpu"])
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = step
