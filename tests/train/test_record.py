"""From device tensors to a line: sums over micro-batches, shares, and dense models."""

from typing import Any

import pytest
import torch

from openmoe.model.router import RouterStatistics
from openmoe.parallel.ranks import OneProcess
from openmoe.train.record import read_metrics, send_metrics
from openmoe.train.step import StepResult

ONE = OneProcess(torch.nn.Module())


def result(router: list[list[RouterStatistics]], device: str = "cpu") -> StepResult:
    one = torch.ones((), device=device)
    return StepResult(one, one, one, one, one, 3 * one, 4 * one, one, router)


def statistics(assigned: list[list[float]], kept: list[list[float]]) -> RouterStatistics:
    one = torch.ones(())
    return RouterStatistics(1, one, one, torch.tensor(assigned), torch.tensor(kept), 4 * one, one, 2 * one)


def line_of(step: StepResult, moe_layers: list[int]) -> dict[str, Any]:
    return read_metrics([send_metrics(step, moe_layers, ONE, {})], moe_layers, ONE)[0][0]


def test_sums_over_micro_batches() -> None:
    """Catches a mean of ratios in place of a ratio of sums, and first and second choices mixed up."""
    blocks = [
        [statistics([[3.0, 1.0, 0.0], [0.0, 4.0, 0.0]], [[3.0, 1.0, 0.0], [0.0, 1.0, 0.0]])],
        [statistics([[4.0, 0.0, 0.0], [2.0, 2.0, 0.0]], [[2.0, 0.0, 0.0], [1.0, 1.0, 0.0]])],
    ]
    line = line_of(result(blocks), [5])
    assert line["accuracy"] == 0.75
    assert line["dropped_fraction"] == pytest.approx(7 / 16)
    layer = {name.removeprefix("router/layer05/"): value for name, value in line.items() if "/" in name}
    assert layer["load"] == pytest.approx([9 / 16, 7 / 16, 0])
    assert layer["load_max_over_mean"] == pytest.approx(9 / (16 / 3))
    assert layer["load_cv"] == pytest.approx(
        torch.tensor([9.0, 7.0, 0.0]).std(correction=0).item() / (16 / 3)
    )
    assert layer["dead_experts"] == 1
    assert layer["dropped_first"] == pytest.approx(2 / 8)
    assert layer["dropped_second"] == pytest.approx(5 / 8)
    assert layer["left_behind"] == pytest.approx(2 / 8)
    assert layer["entropy"] == pytest.approx(4 / 8)


def test_dense_model_away_from_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a CPU tensor among those of a device, which only a model without experts had."""
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: torch.zeros(self.shape, dtype=self.dtype))
    assert line_of(result([[]], "meta"), [])["dropped_fraction"] == 0
