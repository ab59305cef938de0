"""What Adafactor promises beyond the trajectories of tests/parity: layout, tiles, memory, no host sync."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from openmoe.optim import adafactor
from openmoe.optim.adafactor import second_moment_decay
from openmoe.optim.adafactor_expression import updated
from openmoe.optim.build import build_optimizer, set_learning_rate
from openmoe.optim.config import AdafactorConfig, AdamWConfig

CONFIG = AdafactorConfig(name="adafactor")
SHAPES = {
    "embedding.weight": (200, 128),
    "layers.0.attention.q.weight": (144, 128),
    "layers.0.ffn.wi_0": (2, 96, 128),
    "layers.0.ffn.wo": (128, 96),
    "layers.1.moe.experts.wi_0": (4, 2, 20, 24),
    "layers.1.moe.experts.wo": (4, 24, 20),
    "layers.1.moe.router.weight": (4, 128),
    "layers.1.ffn_norm.scale": (128,),
}


def parameters(dtype: torch.dtype = torch.float32, device: str = "cpu") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {name: torch.randn(shape, generator=generator) * 0.1 for name, shape in SHAPES.items()}
    return {name: value.to(device, dtype).requires_grad_() for name, value in made.items()}


def run(params: dict[str, Tensor], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for param in params.values():
            g = torch.randn(param.shape, generator=generator) * 10.0 ** (-step)
            param.grad = g.to(param.device, param.dtype)
        set_learning_rate(optimizer, 0.01)
        optimizer.step()


def test_expression_equals_tiles() -> None:
    """Bug: the form for compilers reduces over other dimensions, or swaps the factors, of one kind of
    parameter, so that a run on another device is another training."""
    tiled, whole = parameters(torch.float64), parameters(torch.float64)
    optimizer = build_optimizer(CONFIG, tiled.items())
    state = {
        param: {key: value.clone() for key, value in optimizer.state[param].items()}
        for param in tiled.values()
    }
    for step in range(3):
        run(tiled, optimizer, range(step, step + 1))
        for name, param in tiled.items():
            rule = optimizer.layouts[param][0]
            beta2 = second_moment_decay(step, CONFIG.decay_rate)
            numbers = torch.tensor([beta2, 1 - beta2, 0.01], dtype=torch.float64)
            new = updated(whole[name].detach(), param.grad, state[param], rule, CONFIG, *numbers)
            whole[name], state[param] = new
            torch.testing.assert_close(new.param, param.detach(), rtol=1e-12, atol=1e-14)
            for key, value in optimizer.state[param].items():
                torch.testing.assert_close(new.state[key], value, rtol=1e-12, atol=0.0)


def reference(p: Tensor, g: Tensor, state: dict, step: int, lr: float, factored: bool) -> Tensor:
    """Adafactor on one float64 matrix, as the equations are; which side is the row does not matter."""
    beta2 = second_moment_decay(step, 0.8)
    square = g * g + 1e-30
    if factored:
        state["row"] = beta2 * state.get("row", 0) + (1 - beta2) * square.mean(1, keepdim=True)
        state["col"] = beta2 * state.get("col", 0) + (1 - beta2) * square.mean(0, keepdim=True)
        u = g / (state["row"] / state["row"].mean() * state["col"]).sqrt()
    else:
        state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * square
        u = g / state["v"].sqrt()
    u = u / max(1.0, u.square().mean().sqrt().item())
    return p - lr * max(1e-3, p.square().mean().sqrt().item()) * u


def in_original_layout(name: str, tensor: Tensor) -> list[Tensor]:
    """Our tensor as the original's: wi_0 as [D, 2F], the rest transposed; experts one by one."""
    if ".experts." in name:
        return [expert.reshape(-1, expert.shape[-1]).T for expert in tensor]
    if name == "embedding.weight" or tensor.dim() == 1:
        return [tensor]
    return [tensor.reshape(-1, tensor.shape[-1]).T]


@pytest.mark.parametrize("tile_elements", [64, 1000, 2**18])
def test_our_layout_gives_the_updates_of_the_originals_tensors(
    tile_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Halves of wi_0 factored apart, a clip over all experts, a tile border skipped or done twice."""
    monkeypatch.setattr(adafactor, "CPU_TILE_ELEMENTS", tile_elements)
    params = parameters(torch.float64)
    plain = {name: in_original_layout(name, p.detach().clone()) for name, p in params.items()}
    states: dict[str, list[dict]] = {name: [{} for _ in parts] for name, parts in plain.items()}
    optimizer = build_optimizer(CONFIG, params.items())
    for step in range(3):
        run(params, optimizer, range(step, step + 1))
        for name, param in params.items():
            for i, g in enumerate(in_original_layout(name, param.grad)):
                factored = g.dim() == 2 and (min(g.shape) >= 128 or ".experts." in name)
                plain[name][i] = reference(plain[name][i], g, states[name][i], step, 0.01, factored)
            for ours, theirs in zip(in_original_layout(name, param.detach()), plain[name], strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_one_experts_gradient_does_not_touch_another() -> None:
    """Statistics, RMS or clipping over the whole stack of experts."""
    name = "layers.1.moe.experts.wo"
    results = []
    for scale in (1.0, 1e6):
        params = parameters()
        optimizer = build_optimizer(CONFIG, params.items())
        run(params, optimizer, range(2))
        params[name].grad = torch.randn(SHAPES[name], generator=torch.Generator().manual_seed(5))
        params[name].grad[0] *= scale
        params[name].data[0] *= scale
        optimizer.step()
        results.append(params[name].detach().clone())
    assert torch.equal(results[0][1:], results[1][1:])


def test_zero_rows_and_zero_tensors_stay_finite() -> None:
    """An unused vocabulary row or an idle expert: 0 / 0 in the factors."""
    params = parameters()
    before = {name: p.detach().clone() for name, p in params.items()}
    optimizer = build_optimizer(CONFIG, params.items())
    set_learning_rate(optimizer, 0.01)
    for _ in range(3):
        for param in params.values():
            param.grad = torch.zeros_like(param)
        params["embedding.weight"].grad[3] = 1.0
        params["layers.1.moe.experts.wi_0"].grad[2] = 1.0
        optimizer.step()
    for name, param in params.items():
        assert torch.isfinite(param).all(), name
        changed = param.detach() != before[name]
        if name == "embedding.weight":
            assert changed[3].all()
            assert not changed[4:].any()
        elif name == "layers.1.moe.experts.wi_0":
            assert changed[2].all()
            assert not changed[:2].any()
        else:
            assert not changed.any(), name


def test_float64_is_float32_with_exact_sums() -> None:
    """A float64 path with other constants (beta2 rounds as float32 in both), or float32 moments inside it."""
    single, double = parameters(), parameters(torch.float64)
    for params in (single, double):
        optimizer = build_optimizer(CONFIG, params.items())
        optimizer.param_groups[0]["step"] = 25_000  # where float64's own beta2 would be off by 1e-4
        run(params, optimizer, range(3))
        for param in params.values():
            assert {value.dtype for value in optimizer.state[param].values()} == {param.dtype}
    for name in SHAPES:
        torch.testing.assert_close(single[name].double(), double[name], rtol=0, atol=1e-6)


def test_a_parameter_without_gradient_is_left_alone() -> None:
    """A frozen router whose moments decay, or that moves."""
    params = parameters()
    optimizer = build_optimizer(CONFIG, params.items())
    run(params, optimizer, range(1))
    frozen = params["layers.1.moe.router.weight"]
    frozen.grad = None
    before = frozen.detach().clone(), optimizer.state[frozen]["v"].clone()
    optimizer.step()
    assert torch.equal(frozen, before[0])
    assert torch.equal(optimizer.state[frozen]["v"], before[1])


class NoHostSync(TorchDispatchMode):
    """Fails on every operation that makes the host wait for a value."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert not any(
            word in name for word in ("_local_scalar_dense", "nonzero", "_to_copy", "is_nonzero")
        ), name
        return func(*args, **(kwargs or {}))


def test_no_host_sync() -> None:
    """An .item(), a bool(tensor) or a copy to the host somewhere in the step."""
    params = parameters()
    optimizer = build_optimizer(CONFIG, params.items())
    run(params, optimizer, range(1))
    with NoHostSync():
        optimizer.step()
    with pytest.raises(AssertionError), NoHostSync():
        float(torch.ones(()))
    on_meta = parameters(device="meta")  # a tensor without values can't be waited for at all
    optimizer = build_optimizer(CONFIG, on_meta.items())
    for param in on_meta.values():
        param.grad = torch.zeros_like(param)
    optimizer.step()


def test_temporaries_take_a_few_mib() -> None:
    """A temporary of the parameter's size: 750 MiB for the embedding of OpenMoE Base, 192 MiB here."""
    script = """
import resource, torch
from openmoe.optim.build import build_optimizer, set_learning_rate
from openmoe.optim.config import AdafactorConfig

weight = torch.empty(65_536, 768).fill_(0.1).requires_grad_()
weight.grad = torch.empty(65_536, 768).fill_(0.01)
optimizer = build_optimizer(AdafactorConfig(name="adafactor"), [("embedding.weight", weight)])
small = torch.nn.Parameter(torch.ones(256, 768))
small.grad = torch.ones(256, 768)
build_optimizer(AdafactorConfig(name="adafactor"), [("embedding.weight", small)]).step()  # loads the kernels
before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
set_learning_rate(optimizer, 0.01)
optimizer.step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 8 * 1024, "KiB"


@pytest.mark.parametrize("config", [CONFIG, AdamWConfig(name="adamw")], ids=lambda config: config.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_resumed_optimizer_goes_on_to_the_last_bit(
    config: AdafactorConfig | AdamWConfig, dtype: torch.dtype, tmp_path: Path
) -> None:
    """A count of steps or a moment that is not saved, or saved in lower precision."""
    whole = parameters(dtype)
    optimizer = build_optimizer(config, whole.items())
    run(whole, optimizer, range(3))
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    resumed = {name: param.detach().clone().requires_grad_() for name, param in whole.items()}
    again = build_optimizer(config, resumed.items())
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    run(whole, optimizer, range(3, 5))
    run(resumed, again, range(3, 5))
    for name, param in whole.items():
        assert torch.equal(param, resumed[name]), name
        for key, value in optimizer.state[param].items():
            assert torch.equal(value, again.state[resumed[name]][key]), (name, key)


def test_lower_precision_parameters_are_refused() -> None:
    """bfloat16 parameters: steps below 1/256 of the weight would vanish."""
    with pytest.raises(ValueError, match=r"embedding\.weight: .* torch\.bfloat16"):
        build_optimizer(CONFIG, parameters(torch.bfloat16).items())
