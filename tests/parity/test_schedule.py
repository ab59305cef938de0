"""The learning rate against the original's own values."""

import json

import pytest

from openmoe.optim.config import InverseSqrtSchedule
from openmoe.optim.schedules import learning_rate
from tests.parity.golden import golden_root


def test_inverse_sqrt_equals_the_original_to_the_last_bit() -> None:
    """A linear warm-up, a step counted from 1, or float64 arithmetic."""
    path = golden_root() / "lr_schedule.json"
    if not path.exists():
        pytest.skip(f"no {path}")
    schedule = InverseSqrtSchedule(name="inverse_sqrt")
    expected = json.loads(path.read_text())["lr"]
    assert expected
    assert {step: learning_rate(schedule, int(step)) for step in expected} == expected
