"""The tensors of a training run under their logical names: model/<name>, optimizer/<name>/<key>,
rng/torch_cpu.

The tensors are the live ones, so filling them in place restores the run, but for what `restore_counters` puts
back. They have global shapes: where a
layout spreads the run over `ranks`, one that this process holds a part of is a DTensor around the part.
"""

import torch
from torch import Tensor, nn

from openmoe.optim.build import state_dims
from openmoe.parallel.ranks import Ranks


def training_tensors(
    model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks | None = None
) -> dict[str, Tensor]:
    """All tensors that a run's next step depends on, without copying (but for the state of the generator)."""
    return (
        model_tensors(model, ranks)
        | optimizer_tensors(optimizer, ranks)
        | {"rng/torch_cpu": torch.get_rng_state()}
    )


def model_tensors(model: nn.Module, ranks: Ranks | None = None) -> dict[str, Tensor]:
    """model/<fully qualified name> -> parameter or buffer."""
    if ranks is None:
        return {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    return {
        f"model/{name}": ranks.as_whole(name, local.detach(), range(local.dim()))
        for name, local in ranks.named_parameters()
    }


def optimizer_tensors(optimizer: torch.optim.Optimizer, ranks: Ranks | None = None) -> dict[str, Tensor]:
    """optimizer/<fully qualified name of the parameter>/<key> -> state tensor ("v_row", "exp_avg").

    The optimizer must have been made with named parameters and have all its state from the start, as
    `optim.build.build_optimizer` sees to: state made in the first step would be missing from a resumed run.
    """
    state = ranks.gather_state() if ranks is not None else None
    if state is None:
        dims = state_dims(optimizer)
        state = {
            name: {
                key: value if ranks is None else ranks.as_whole(name, value, dims[name][key])
                for key, value in optimizer.state[param].items()
            }
            for group in optimizer.param_groups
            for name, param in zip(group["param_names"], group["params"], strict=True)
        }
    return {f"optimizer/{name}/{key}": value for name, of in state.items() for key, value in of.items()}


def restore_counters(
    optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], step: int, ranks: Ranks | None = None
) -> None:
    """Puts back what is no live tensor: the state of torch's generator, Adafactor's count of updates, and the
    optimizer's state where an engine keeps it in its own way."""
    torch.set_rng_state(tensors["rng/torch_cpu"])
    if ranks is not None:
        state: dict[str, dict[str, Tensor]] = {}
        for full_name, tensor in tensors.items():
            kind, _, rest = full_name.partition("/")
            name, _, key = rest.rpartition("/")
            if kind == "optimizer":
                state.setdefault(name, {})[key] = tensor
        ranks.put_back_state(state)
    for group in optimizer.param_groups:
        if "step" in group:
            group["step"] = step
