"""Rows against seqio's DecoderFeatureConverter, packed and not, with and without inputs."""

import json
from pathlib import Path

import numpy as np
import pytest

from openmoe.data.objectives import Examples
from openmoe.data.packing import NextFit, empty_batch, place

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


def given_examples(parts: list[tuple[list[int], list[int]]]) -> Examples:
    """Examples of these inputs and targets."""
    sequences = np.zeros((len(parts), max(len(given) + len(learned) for given, learned in parts)), np.int32)
    for sequence, (given, learned) in zip(sequences, parts, strict=True):
        sequence[: len(given) + len(learned)] = given + learned
    return Examples(sequences, *(np.array([len(pair[i]) for pair in parts]) for i in (0, 1)))


@pytest.mark.parametrize("path", golden_files("feature_converter*.json"), ids=lambda path: path.stem)
def test_rows(path: Path) -> None:
    """Catches loss on inputs, a wrong shift or BOS, other packing, and a prefix that is one too short."""
    cases = json.loads(path.read_text())["cases"]
    assert cases
    for case in cases:
        features = ["inputs", "targets"] if case["with_inputs"] else ["targets"]
        row_length = sum(case["task_feature_lengths"][name] for name in features)
        examples = given_examples(
            [(e["inputs"] if case["with_inputs"] else [], e["targets"]) for e in case["examples"]]
        )
        sizes = (examples.input_tokens + examples.target_tokens).tolist()
        places = [(i, 0, 1) for i in range(len(sizes))]
        if case["pack"]:
            packing = NextFit(row_length)
            places = [packing.add(size) for size in sizes]
        numbers, starts, segments = zip(*places, strict=True)
        assert max(numbers) + 1 == len(case["converted"])
        batch = empty_batch(len(case["converted"]), row_length)
        place(batch, numbers, starts, segments, examples, range(len(sizes)))
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
