"""Learning rates and the settings around them."""

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from openmoe.optim.build import build_optimizer
from openmoe.optim.config import AdamWConfig, OptimConfig, ScheduleConfig
from openmoe.optim.schedules import learning_rate


def rates(values: dict, steps: list[int]) -> list[float]:
    schedule = TypeAdapter(ScheduleConfig).validate_python(values)
    return [learning_rate(schedule, step) for step in steps]


def test_inverse_sqrt_is_flat_then_falls() -> None:
    """A linear warm-up that the original does not have."""
    values = {"name": "inverse_sqrt", "base": 2.0, "warmup_steps": 100}
    assert rates(values, [0, 1, 99, 100, 400]) == pytest.approx([0.2, 0.2, 0.2, 0.2, 0.1], rel=1e-7)


def test_linear_warmup_meets_the_curve() -> None:
    """A jump where the rise ends."""
    values = {"name": "linear_warmup", "base": 2.0, "warmup_steps": 100}
    assert rates(values, [0, 50, 100, 400]) == pytest.approx([0.0, 0.1, 0.2, 0.1], rel=1e-7)


def test_constant() -> None:
    """A constant that a warm-up changes."""
    assert rates({"name": "constant", "value": 1e-3}, [0, 5, 10**9]) == [1e-3] * 3


def test_cosine() -> None:
    """A first update with learning rate 0, a minimum that rises again, a division by zero without warm-up."""
    values = {"name": "cosine", "peak": 1.0, "warmup_steps": 10, "total_steps": 110, "final_fraction": 0.1}
    assert rates(values, [0, 9, 10, 60, 110, 10**6]) == pytest.approx([0.1, 1.0, 1.0, 0.55, 0.1, 0.1])
    assert rates(values | {"warmup_steps": 0}, [0]) == [1.0]


@pytest.mark.parametrize(
    "values",
    [
        {"name": "inverse_sqrt", "warmup_steps": 0},
        {"name": "inverse_sqrt", "base": float("inf")},
        {"name": "constant", "value": 0.0},
        {"name": "cosine", "warmup_steps": 10, "total_steps": 10},
        {"name": "linear", "base": 1.0},
        {"name": "constant", "peak": 1.0},
    ],
)
def test_bad_values_are_refused(values: dict) -> None:
    """A schedule that divides by zero, or ignores what was asked for."""
    with pytest.raises(ValidationError):
        TypeAdapter(OptimConfig).validate_python({"name": "adafactor", "schedule": values})


def test_weight_decay_spares_the_norms() -> None:
    """Norm scales that decay to zero."""
    scale, weight = torch.ones(8, requires_grad=True), torch.ones(8, 8, requires_grad=True)
    named = [("final_norm.scale", scale), ("head.weight", weight)]
    optimizer = build_optimizer(AdamWConfig(name="adamw", weight_decay=0.5), named)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    for _, param in named:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.equal(scale, torch.ones(8))
    torch.testing.assert_close(weight, torch.full((8, 8), 0.95))
