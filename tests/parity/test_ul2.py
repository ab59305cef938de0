"""UL2 against the original's integers. Every `ul2_*` file is found by pattern and read by what it holds."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openmoe.data import ul2
from openmoe.data.config import DataConfig
from openmoe.data.objectives import Objective, make_objective
from openmoe.data.rng import mix_bits

from .golden import golden_files
from .t5 import corrupted, ends_of, mask_of, random_spans_helper

FIRST_SENTINEL = 256_299
FIRST_EXTRA_ID = 256_000  # ids from here on are sentinels in the golden files
CONFIG = DataConfig()


def documents(pattern: str, key: str) -> list[Any]:
    """The JSON files that have `key`, as pytest parameters."""
    files = [(path, json.loads(path.read_text())) for path in golden_files(pattern)]
    return [pytest.param(content, id=path.stem) for path, content in files if key in content]


def lines(key: str) -> list[Any]:
    """The JSON lines files whose records have `key`, as pytest parameters (path, records)."""
    files = [
        (path, [json.loads(line) for line in path.read_text().splitlines()])
        for path in golden_files("ul2_*.jsonl")
    ]
    return [pytest.param(path, records, id=path.stem) for path, records in files if key in records[0]]


def draws(count: int) -> np.ndarray:
    return mix_bits(np.arange(count, dtype=np.uint64))


def draw_of_prefix(prefix: int) -> np.ndarray:
    """A word that draws a prefix of `prefix` tokens."""
    return np.array([max(0, prefix - 1)], np.uint64)


@pytest.mark.parametrize("content", documents("ul2_*.json", "values"))
def test_sizes(content: dict) -> None:
    """Catches another number of raw tokens per example: rounding, sentinels and EOS all count."""
    for name, expected in content["values"].items():
        fields = dict(field.split("=") for field in name.split(","))
        found = ul2.random_spans_helper(
            int(fields["inputs_length"]), float(fields["mean"]), float(fields["density"])
        )
        assert list(found) == expected, name


@pytest.mark.parametrize("density", [0.01, 0.15, 0.3, 0.5])
@pytest.mark.parametrize("mean_span", [1.0, 3.0, 4.5, 8.0, 64.0])
def test_sizes_at_any_length(mean_span: float, density: float) -> None:
    """Catches sizes that are T5's at the golden lengths only: short rows, where the EOS doesn't fit too."""
    for length in [*range(8, 150), 511, 512, 1024, 4095]:
        found = ul2.random_spans_helper(length, mean_span, density)
        assert found == random_spans_helper(length, mean_span, density), length


@pytest.mark.parametrize("content", documents("ul2_*.json", "stats"))
def test_masks_have_the_same_statistics(content: dict) -> None:
    """Catches other span lengths (say geometric), a random start, or noise that favours some places."""
    for expected in content["stats"]:
        length, mean, density = (expected[k] for k in ("length", "mean_noise_span_length", "noise_density"))
        noise, spans = ul2.noise_counts(length, mean, density)
        assert noise == expected["noise_tokens_min"] == expected["noise_tokens_max"]
        assert spans == expected["num_spans_min"] == expected["num_spans_max"]
        ends = ul2.span_ends(length, noise, spans, draws(expected["n_masks"]))
        runs = np.diff(ends, axis=1, prepend=0)
        assert (runs > 0).all()
        assert (runs[:, spans:].sum(axis=1) == noise).all()
        for lengths, kind in ((runs[:, spans:], "span"), (runs[:, :spans], "nonnoise")):
            mean_key = "mean_span_length" if kind == "span" else "mean_nonnoise_span"
            std_key = "std_span_length" if kind == "span" else "std_nonnoise_span"
            assert lengths.mean() == pytest.approx(expected[mean_key])
            assert lengths.std() == pytest.approx(expected[std_key], rel=0.05)
            shares = np.bincount(lengths.reshape(-1), minlength=13)[1:13] / lengths.size
            # Both sides are samples: four standard errors of their difference.
            wanted = np.array(expected[f"{kind}_length_pmf_1_to_12"])
            assert (abs(shares - wanted) < 4 * np.sqrt(2 * wanted / lengths.size) + 1e-4).all()
        masks = np.stack([mask_of(row, length) for row in ends])
        places = [round(f * (length - 1)) for f in (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)]
        assert masks[:, places].mean(axis=0) == pytest.approx(
            np.array(expected["noise_prob_at_fraction_0_0p1_0p25_0p5_0p75_0p9_1"]), abs=0.065
        )


def assert_corrupts(tokens: np.ndarray, noise: np.ndarray, inputs: list[int], targets: list[int]) -> bool:
    """The oracle makes these inputs and targets, and so does the package where it can have such a mask."""
    assert corrupted(tokens, noise, FIRST_SENTINEL) == (inputs, targets)
    ends = ends_of(noise)
    if ends is None:
        return False
    found = ul2.corrupt_spans(tokens[np.newaxis], ends, FIRST_SENTINEL)
    # Of a single token the original only makes the first of the inputs.
    assert [part[0].tolist() for part in found] == [inputs, targets]
    return True


@pytest.mark.parametrize(("path", "records"), lines("kind"))
def test_examples_from_given_masks(path: Path, records: list[dict]) -> None:
    """Catches sentinels counted up, restarted or placed wrongly, and masks of another form or size."""
    for record in records:
        tokens = np.array(record["tokens"], np.int32)
        if record["kind"] == "prefix_lm":
            prefix = record["prefix_len"]
            assert ul2.prefix_lengths(len(tokens), draw_of_prefix(prefix)).tolist() == [prefix]
            assert tokens[:prefix].tolist() == record["inputs"]
            assert tokens[prefix:].tolist() == record["targets"]
            continue
        noise = np.array(record["noise_mask"], np.bool_)
        assert assert_corrupts(tokens, noise, record["inputs"], record["targets"])
        spans = int((noise & ~np.pad(noise, (1, 0))[:-1]).sum())
        counts = ul2.noise_counts(len(tokens), record["mean_span"], record["density"])
        assert counts == (noise.sum(), spans)
        own = mask_of(ul2.span_ends(len(tokens), *counts, draws(1))[0], len(tokens))
        assert own.sum() == noise.sum()
        assert own[0] == noise[0]


@pytest.mark.parametrize("content", documents("ul2_*.json", "rows"))
def test_sentinels_at_the_edges(content: dict) -> None:
    """Catches off-by-ones where noise begins or ends a sequence, covers all of it, or none."""
    drawn = [
        assert_corrupts(
            np.array(row["tokens"], np.int32),
            np.array(row["noise_mask"], np.bool_),
            row["inputs"],
            row["targets"],
        )
        for row in content["rows"]
    ]
    assert any(drawn)


class PlaceholderTokenizer:
    """Stands for the original's tokenizer, of which the files only have placeholders for the mode strings."""

    first_sentinel = FIRST_SENTINEL

    def __init__(self, modes: dict[str, list[int]]) -> None:
        self._modes = modes

    def encode(self, text: str) -> list[int]:
        return self._modes[text]


def original_objective(side_length: int, modes: dict[str, list[int]]) -> Objective:
    return make_objective("ul2", 2 * side_length, PlaceholderTokenizer(modes), CONFIG)  # type: ignore[arg-type]


def classes_of_mode(mode: str) -> list[int]:
    return [index for index, denoiser in enumerate(CONFIG.denoisers) if denoiser.mode == mode]


def sizes(objective: Objective, index: int, raw_tokens: int, draw: np.ndarray) -> tuple[int, int]:
    """Input and target tokens of one example."""
    inputs, targets = objective.sizes(index, raw_tokens, draw)
    return inputs.item(), targets.item()


@pytest.mark.parametrize("content", documents("ul2_*.json", "per_example"))
def test_pipeline_sizes(content: dict) -> None:
    """Catches other trims, EOS rules or segment sizes in the assembled objective."""
    modes = json.loads(re.search(r"\{.*\}", content["what"]).group())  # type: ignore[union-attr]
    side_length = int(re.search(r"inputs=targets=(\d+)", content["what"]).group(1))  # type: ignore[union-attr]
    objective = original_objective(side_length, modes)
    for example in content["per_example"]:
        mode = example["prefix"]
        inputs = example["inputs_len_before_eos_trim"] - len(modes[mode])
        raw_tokens = inputs + example["targets_len_before"] - 2 * example["sentinels_targets"]
        found = [
            sizes(objective, index, raw_tokens, draw_of_prefix(inputs))
            for index in classes_of_mode(mode)
            if raw_tokens <= objective.classes[index].raw_tokens
        ]
        assert (example["inputs_len_final"], example["targets_len_final"]) in found, example
    split = content["prefix_lm_split_distribution_L50"]
    lengths = ul2.prefix_lengths(split["length"], draws(split["n"]))
    assert (lengths.min(), lengths.max()) == (split["min"], split["max"])
    assert lengths.mean() == pytest.approx(split["mean"], abs=0.9)
    assert lengths.std() == pytest.approx(split["std"], rel=0.04)


def undo_span_corruption(inputs: list[int], targets: list[int]) -> tuple[list[int], list[bool]]:
    """The tokens and the noise mask that inputs and targets were made of."""
    spans: dict[int, list[int]] = {}
    for token in targets:
        if token >= FIRST_EXTRA_ID:
            spans[token] = []
        else:
            next(reversed(spans.values())).append(token)
    tokens: list[int] = []
    noise: list[bool] = []
    for token in inputs:
        part = spans[token] if token >= FIRST_EXTRA_ID else [token]
        tokens += part
        noise += [token >= FIRST_EXTRA_ID] * len(part)
    return tokens, noise


@pytest.mark.parametrize(("path", "records"), lines("inputs_before_trim"))
def test_pipeline_examples(path: Path, records: list[dict], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches any difference in the whole objective: mode strings, sentinels, trims, EOS, prefix split."""
    named = re.search(r"len(\d+)", path.stem)
    side_length = int(named.group(1)) if named else max(len(r["inputs"]) for r in records)
    size_of_mode = 3
    modes = {d.mode: [0] * size_of_mode for d in CONFIG.denoisers} | {
        r["prefix"]: r["inputs_before_trim"][:size_of_mode] for r in records
    }
    objective = original_objective(side_length, modes)
    for record in records:
        inputs, targets = record["inputs_before_trim"][size_of_mode:], record["targets_before_trim"]
        if record["prefix"] == "[S2S] ":
            tokens = np.array(inputs + targets, np.int32)
        else:
            raw, mask = undo_span_corruption(inputs, targets)
            tokens, noise = np.array(raw, np.int32), np.array(mask)
            assert assert_corrupts(tokens, noise, inputs, targets)
            ends = ends_of(noise)
            monkeypatch.setattr(ul2, "span_ends", lambda *_, ends=ends: ends)
        draw = draw_of_prefix(len(inputs))
        wanted = (len(record["inputs"]), len(record["targets"]))
        fitting = [
            index
            for index in classes_of_mode(record["prefix"])
            if len(tokens) <= objective.classes[index].raw_tokens
            and sizes(objective, index, len(tokens), draw) == wanted
        ]
        assert fitting
        for index in fitting:
            built = objective.build(index, tokens[np.newaxis], draw)
            assert (built.input_tokens.item(), built.target_tokens.item()) == wanted
            assert built.sequences[0, : sum(wanted)].tolist() == record["inputs"] + record["targets"]


def test_paper_sizes() -> None:
    """Catches wrong values of Table 2: raw tokens, spans and lengths at 1024 + 1024 (facts 5.3)."""
    objective = original_objective(1024, {d.mode: [5] * 3 for d in CONFIG.denoisers})
    expected = [
        (1137, (1024, 229), 57), (1178, (1024, 200), 22), (1534, (1024, 1024), 256),
        (1818, (1024, 1024), 114), (2014, (1024, 1024), 16),
    ]  # fmt: skip
    for index, (raw_tokens, parts, spans) in enumerate(expected):
        denoiser = CONFIG.denoisers[index]
        assert objective.classes[index].raw_tokens == raw_tokens
        assert objective.classes[index].row_tokens == sum(parts)
        assert sizes(objective, index, raw_tokens, draws(1)) == parts
        assert denoiser.mean_span is not None
        assert ul2.noise_counts(raw_tokens, denoiser.mean_span, denoiser.density)[1] == spans
    assert objective.classes[5].raw_tokens == 1023
    assert sizes(objective, 5, 1023, draw_of_prefix(500)) == (500 + 3 + 1, 523 + 1)
    assert [c.rate for c in objective.classes] == pytest.approx([0.1] * 5 + [0.5])


def test_released_rows_are_filled_as_the_released_runs_were() -> None:
    """Catches rates or sizes that add up to another fill: 67.3% of 2048, 29.6% learned (facts 5.4)."""
    objective = original_objective(1024, {d.mode: [5] * 3 for d in CONFIG.denoisers})
    inputs = targets = 0.0
    for index, example_class in enumerate(objective.classes):
        found = objective.sizes(index, example_class.raw_tokens, draws(4000))
        inputs += example_class.rate * found[0].mean()
        targets += example_class.rate * found[1].mean()
    assert (inputs + targets) / 2048 == pytest.approx(0.673, abs=0.002)
    assert targets / 2048 == pytest.approx(0.296, abs=0.002)
