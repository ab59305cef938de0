"""The shared path under torch 2.9 and torch_xla, traced and executed on the CPU (`make test-xla`)."""

import importlib
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from openmoe.model.batch import Batch
from openmoe.model.config import ModelConfig
from openmoe.model.decoder import Decoder
from openmoe.model.init import initialise
from openmoe.model.losses import linear_cross_entropy

torch_xla = pytest.importorskip("torch_xla", reason="torch_xla is missing here; run `make test-xla`")
metrics = pytest.importorskip("torch_xla.debug.metrics")

ROOT = Path(__file__).resolve().parents[2]
ROWS, SEQ_LEN = 4, 32
VARIANTS = {
    "paper": {"residual": "parallel_shared_norm", "ffn": "swiglu3"},
    "released": {"residual": "sequential", "ffn": "swiglu4", "mask_padding": True, "route_padding": True},
}


def config(variant: str) -> ModelConfig:
    return ModelConfig(
        vocab_size=96, d_model=32, n_layers=4, n_heads=4, head_dim=8, d_ff=48, init_scale=1.0,
        router_init_std=0.2, moe_every=2, num_experts=8, top_k=2, group_rows=2, dispatch="einsum",
        **VARIANTS[variant],
    )  # fmt: skip


def batch(seed: int) -> Batch:
    """Two packed examples a row, then padding."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(3, 96, (ROWS, SEQ_LEN), generator=generator)
    segments = torch.ones_like(targets)
    segments[:, 14:] = 2
    for row in range(ROWS):
        targets[row, SEQ_LEN - 3 * row :] = 0
        segments[row, SEQ_LEN - 3 * row :] = 0
    inputs = targets.roll(1, 1)
    inputs[:, [0, 14]] = 0
    return Batch(inputs, targets, (targets > 0).float(), segments)


def loss_of(model: Decoder, rows: Batch) -> torch.Tensor:
    output = model(rows)
    loss, log_z, _ = linear_cross_entropy(
        output.hidden.flatten(0, 1), model.head_weight, rows.target_tokens.flatten()
    )
    weights = rows.loss_weights.flatten()
    total = ((loss + 1e-3 * log_z.square()) * weights).sum() / weights.sum()
    for layer in output.router:
        total = total + (1e-2 * layer.load_balancing_sum + 1e-4 * layer.router_z_sum) / layer.num_groups
    return total


def on_device(rows: Batch) -> Batch:
    return Batch(
        **{f.name: v.to(torch_xla.device()) for f in fields(rows) if (v := getattr(rows, f.name)) is not None}
    )


def compilations() -> int:
    data = metrics.metric_data("CompileTime")
    return data[0] if data else 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_einsum_path_equals_eager(variant: str) -> None:
    """Bugs: an operation that XLA lacks and that runs on the host unnoticed (`aten::` counters); a shape that
    depends on the data, so that each step compiles anew; a result other than the same code gives eagerly."""
    eager = Decoder(config(variant)).train()
    initialise(eager, eager.config, seed=0)
    traced = Decoder(config(variant)).train()
    traced.load_state_dict(eager.state_dict())
    traced.to(torch_xla.device())

    metrics.clear_all()
    compiled = []
    for seed in (0, 1, 2):
        eager.zero_grad(set_to_none=True)
        traced.zero_grad(set_to_none=True)
        expected = loss_of(eager, batch(seed))
        expected.backward()
        loss = loss_of(traced, on_device(batch(seed)))
        loss.backward()
        torch_xla.sync()
        compiled.append(compilations())
        torch.testing.assert_close(loss.cpu(), expected, rtol=2e-6, atol=0)
        for (name, parameter), reference in zip(traced.named_parameters(), eager.parameters(), strict=True):
            assert parameter.grad is not None, name
            error = (parameter.grad.cpu() - reference.grad).abs().max() / reference.grad.abs().max()
            assert error <= 2e-5, f"{name}: {error:.1e}"
    assert compiled[1:] == compiled[:1] * 2, f"compilations after each step: {compiled}"
    fallbacks = [name for name in metrics.counter_names() if name.startswith("aten::")]
    assert not fallbacks


@pytest.mark.parametrize("room", ["model", "optim", "data"])
def test_shared_path_imports_under_torch_2_9(room: str) -> None:
    """Bug: a module of the shared path needs a torch API newer than 2.9 to be imported."""
    assert torch.__version__.startswith("2.9.")
    for path in sorted((ROOT / room).rglob("*.py")):
        name = ".".join(("openmoe", *path.relative_to(ROOT).with_suffix("").parts))
        importlib.import_module(name.removesuffix(".__init__"))
