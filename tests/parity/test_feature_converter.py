"""Rows against seqio's DecoderFeatureConverter, packed and not, with and without inputs."""

import json
from pathlib import Path

import numpy as np
import pytest

from openmoe.data.config import DataConfig, PhaseConfig
from openmoe.data.curriculum import Curriculum
from openmoe.data.objectives import ExampleSize
from openmoe.data.packing import Example, empty_batch, fill_row
from openmoe.data.plan import Planner
from openmoe.data.rng import RandomKey, random_key
from openmoe.data.sources import Position

from .golden import golden_files

NAMES = {
    "decoder_target_tokens": "target_tokens",
    "decoder_input_tokens": "input_tokens",
    "decoder_loss_weights": "loss_weights",
    "decoder_segment_ids": "segment_ids",
    "decoder_causal_attention": "prefix_mask",
}


def positions_in_segments(segment_ids: np.ndarray) -> np.ndarray:
    """`decoder_positions`, which our rows leave out: the model uses the place in the row (facts 1.5)."""
    return np.array(
        [0 if s == 0 else i - int(np.flatnonzero(segment_ids == s)[0]) for i, s in enumerate(segment_ids)]
    )


class GivenExamples:
    """Source and objective in one: the examples of a golden case, then one that fits into no row."""

    name, documents, joins_with_eos = "given", 1, False

    def __init__(self, examples: list[Example]) -> None:
        self._examples = examples
        self._number = {random_key("example", 0, self.name, i): i for i in range(len(examples))}

    def measure(self, key: RandomKey, available_tokens: int | None = None) -> ExampleSize:
        number = self._number.get(key)
        if number is None:
            return ExampleSize(1, 10**6, 1)
        given, learned = self._examples[number]
        return ExampleSize(1, len(given), len(learned))

    def build(self, tokens: np.ndarray, key: RandomKey) -> Example:
        return self._examples[self._number[key]]

    def skip(self, position: Position, count: int, join_eos: bool) -> Position:
        return position


def packed_rows(examples: list[Example], rows: int, row_length: int) -> list[list[int]]:
    """Which examples our planner puts into each row of a step."""
    given = GivenExamples(examples)
    phase = PhaseConfig(mix={"given": 1.0}, objective="ul2")
    curriculum = Curriculum([phase], row_length, rows)
    planner = Planner(curriculum, [given], [given], DataConfig(), row_length, rows, seed=0)  # type: ignore[list-item]
    return [[given._number[example.key] for example in row] for row in planner.plan_step().rows]


@pytest.mark.parametrize("path", golden_files("feature_converter*.json"), ids=lambda path: path.stem)
def test_rows(path: Path) -> None:
    """Catches loss on inputs, a wrong shift or BOS, other packing, and a prefix that is one too short."""
    cases = json.loads(path.read_text())["cases"]
    assert cases
    for case in cases:
        features = ["inputs", "targets"] if case["with_inputs"] else ["targets"]
        row_length = sum(case["task_feature_lengths"][name] for name in features)
        examples = [
            (np.array(e["inputs"] if case["with_inputs"] else [], np.int32), np.array(e["targets"], np.int32))
            for e in case["examples"]
        ]
        rows = [[i] for i in range(len(examples))]
        if case["pack"]:
            rows = packed_rows(examples, len(case["converted"]), row_length)
        assert sorted(i for row in rows for i in row) == list(range(len(examples)))
        assert len(rows) == len(case["converted"])
        batch = empty_batch(len(rows), row_length)
        for index, row in enumerate(rows):
            fill_row(batch, index, [examples[i] for i in row], row)
        for index, expected in enumerate(case["converted"]):
            for name, values in expected.items():
                if name == "decoder_positions":
                    found = positions_in_segments(batch["segment_ids"][index])
                elif name == "decoder_input_tokens" and not case["pack"]:
                    # Without packing the original shifts the row as a whole, so the last token also shows in
                    # the first column of padding. Our rows are always packed.
                    real = batch["segment_ids"][index] > 0
                    found = np.concatenate([[0], batch["target_tokens"][index][:-1]])
                    np.testing.assert_array_equal(batch["input_tokens"][index], found * real)
                else:
                    found = batch[NAMES[name]][index]
                np.testing.assert_array_equal(found, values, err_msg=name)


def test_examples_that_do_not_fit_are_refused() -> None:
    """Catches an example being cut without a word."""
    with pytest.raises(ValueError, match="don't fit"):
        fill_row(empty_batch(1, 4), 0, [(np.arange(3), np.arange(2))], [0])
