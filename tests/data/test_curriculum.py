"""Phases: where they switch, and what is no curriculum."""

import pytest
from pydantic import ValidationError

from openmoe.data.config import PhaseConfig
from openmoe.data.curriculum import Curriculum
from openmoe.data.errors import DataError


def phase(**marks: int) -> PhaseConfig:
    return PhaseConfig(mix={"a": 1.0}, objective="causal_lm", **marks)


def test_a_phase_ends_at_the_first_boundary_at_or_after_its_mark() -> None:
    """Catches switching one step early or late, also where the mark is a whole number of steps."""
    for until_tokens, steps in ((1, 1), (63, 1), (64, 1), (65, 2), (128, 2), (129, 3)):
        curriculum = Curriculum([phase(until_tokens=until_tokens), phase()], seq_len=16, global_batch_rows=4)
        assert [curriculum.phase_at(s) for s in range(steps + 2)] == [0] * steps + [1, 1]
        assert curriculum.last_step() is None


def test_marks_may_mix_tokens_and_steps() -> None:
    """Catches marks compared in different units."""
    curriculum = Curriculum([phase(until_steps=3), phase(until_tokens=300), phase(until_steps=9)], 16, 4)
    assert [curriculum.phase_at(s) for s in range(10)] == [0, 0, 0, 1, 1, 2, 2, 2, 2, 2]
    assert curriculum.last_step() == 9


def test_the_papers_mark() -> None:
    """Catches another count than row positions: 780B tokens at 2048 rows of 2048 are step 185,967."""
    phases = [phase(until_tokens=780_000_000_000), phase(until_tokens=1_100_000_000_000)]
    curriculum = Curriculum(phases, 2048, 2048)
    assert (curriculum.phase_at(185_966), curriculum.phase_at(185_967)) == (0, 1)
    assert Curriculum(phases, 2048, 1024).phase_at(371_932) == 0
    assert Curriculum(phases, 2048, 1024).phase_at(371_933) == 1


@pytest.mark.parametrize(
    ("phases", "message"),
    [
        ([], "empty"),
        ([phase(), phase()], r"curriculum\[0\] has no mark"),
        ([phase(until_steps=5), phase(until_steps=5)], r"curriculum\[1\] ends at step 5"),
        ([phase(until_steps=5), phase(until_tokens=100)], r"until_tokens=100.*until_steps=5.*must grow"),
    ],
)
def test_phases_out_of_order_are_refused(phases: list[PhaseConfig], message: str) -> None:
    """Catches a phase that would silently never be trained."""
    with pytest.raises(DataError, match=message):
        Curriculum(phases, 16, 4)


@pytest.mark.parametrize(
    "values",
    [
        {"mix": {}, "objective": "ul2"},
        {"mix": {"a": -1.0, "b": 2.0}, "objective": "ul2"},
        {"mix": {"a": 0.0}, "objective": "ul2"},
        {"mix": {"a": float("nan")}, "objective": "ul2"},
        {"mix": {"a": float("inf")}, "objective": "ul2"},
        {"mix": {"../a": 1.0}, "objective": "ul2"},
        {"mix": {"a": 1.0}, "objective": "mlm"},
        {"mix": {"a": 1.0}, "objective": "ul2", "until_steps": 0},
        {"mix": {"a": 1.0}, "objective": "ul2", "until_steps": 1, "until_tokens": 1},
    ],
)
def test_bad_phases_are_refused(values: dict) -> None:
    """Catches a mix or mark without meaning reaching the run."""
    with pytest.raises(ValidationError):
        PhaseConfig(**values)
