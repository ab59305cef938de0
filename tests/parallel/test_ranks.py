"""What training is told by its ranks."""

import pytest
import torch

from openmoe.parallel.ranks import sum_of_squares


def test_norm_of_a_large_tensor() -> None:
    """Catches squares added up one after the other in float32: at this size 1 in 5,000 is lost."""
    x = torch.full((10_000_003,), 0.1)
    exact = x[0].double().square().item() * len(x)
    assert sum_of_squares([x[:17], x[17:], x[:0]]).item() == pytest.approx(exact, rel=1e-6)
