"""UL2 against the original's integers. Every `ul2_*` file is found by pattern and read by what it holds."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from openmoe.data import ul2
from openmoe.data.objectives import UL2
from openmoe.data.rng import RandomKey, random_key

from .golden import golden_files

FIRST_SENTINEL = 256_299
FIRST_EXTRA_ID = 256_000  # ids from here on are sentinels in the golden files


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


@pytest.mark.parametrize("content", documents("ul2_*.json", "values"))
def test_sizes(content: dict) -> None:
    """Catches another number of raw tokens per example: rounding, sentinels and EOS all count."""
    for name, expected in content["values"].items():
        fields = dict(field.split("=") for field in name.split(","))
        found = ul2.random_spans_helper(
            int(fields["inputs_length"]), float(fields["mean"]), float(fields["density"])
        )
        assert list(found) == expected, name


@pytest.mark.parametrize("content", documents("ul2_*.json", "stats"))
def test_masks_have_the_same_statistics(content: dict) -> None:
    """Catches other span lengths (say geometric), a random start, or noise that favours some places."""
    for expected in content["stats"]:
        length, mean, density = (expected[k] for k in ("length", "mean_noise_span_length", "noise_density"))
        masks = np.stack(
            [
                ul2.random_spans_noise_mask(length, mean, density, random_key("mask", length, i))
                for i in range(expected["n_masks"])
            ]
        )
        noise_tokens = masks.sum(axis=1)
        starts = masks & ~np.pad(masks, ((0, 0), (1, 0)))[:, :-1]
        spans = starts.sum(axis=1)
        assert noise_tokens.min() == expected["noise_tokens_min"]
        assert noise_tokens.max() == expected["noise_tokens_max"]
        assert spans.min() == expected["num_spans_min"]
        assert spans.max() == expected["num_spans_max"]
        noise_lengths, kept_lengths = [], []
        for mask in masks:
            lengths = [len(list(group)) for _, group in itertools.groupby(mask)]
            kept_lengths += lengths[0::2]
            noise_lengths += lengths[1::2]
        for lengths, kind in ((noise_lengths, "span"), (kept_lengths, "nonnoise")):
            mean_key = "mean_span_length" if kind == "span" else "mean_nonnoise_span"
            std_key = "std_span_length" if kind == "span" else "std_nonnoise_span"
            assert np.mean(lengths) == pytest.approx(expected[mean_key])
            assert np.std(lengths) == pytest.approx(expected[std_key], rel=0.05)
            shares = np.bincount(lengths, minlength=13)[1:13] / len(lengths)
            # Both sides are samples: four standard errors of their difference.
            wanted = np.array(expected[f"{kind}_length_pmf_1_to_12"])
            assert (abs(shares - wanted) < 4 * np.sqrt(2 * wanted / len(lengths)) + 1e-4).all()
        places = [round(f * (length - 1)) for f in (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)]
        assert masks[:, places].mean(axis=0) == pytest.approx(
            np.array(expected["noise_prob_at_fraction_0_0p1_0p25_0p5_0p75_0p9_1"]), abs=0.065
        )


@pytest.mark.parametrize(("path", "records"), lines("kind"))
def test_examples_from_given_masks(path: Path, records: list[dict]) -> None:
    """Catches sentinels counted up, restarted or placed wrongly, and masks of another form or size."""
    for record in records:
        tokens = np.array(record["tokens"], np.int32)
        if record["kind"] == "prefix_lm":
            prefix = record["prefix_len"]
            key = RandomKey(0, max(0, prefix - 1), 0, 0)
            assert ul2.prefix_length(len(tokens), key) == prefix
            assert tokens[:prefix].tolist() == record["inputs"]
            assert tokens[prefix:].tolist() == record["targets"]
            continue
        noise = np.array(record["noise_mask"], np.bool_)
        inputs, targets = ul2.span_corruption(tokens, noise, FIRST_SENTINEL)
        assert inputs.tolist() == record["inputs"]
        assert targets.tolist() == record["targets"]
        spans = int((noise & ~np.pad(noise, (1, 0))[:-1]).sum())
        counts = ul2.noise_counts(len(tokens), record["mean_span"], record["density"])
        assert counts == (noise.sum(), spans)
        own = ul2.random_spans_noise_mask(
            len(tokens), record["mean_span"], record["density"], random_key("own", len(tokens))
        )
        assert own.sum() == noise.sum()
        assert own[0] == noise[0]


@pytest.mark.parametrize("content", documents("ul2_*.json", "rows"))
def test_sentinels_at_the_edges(content: dict) -> None:
    """Catches off-by-ones where noise begins or ends a sequence, covers all of it, or none."""
    for row in content["rows"]:
        tokens, noise = np.array(row["tokens"], np.int32), np.array(row["noise_mask"], np.bool_)
        inputs, targets = ul2.span_corruption(tokens, noise, content["vocab_size"] - 1)
        assert (inputs.tolist(), targets.tolist()) == (row["inputs"], row["targets"])


class PlaceholderTokenizer:
    """Stands for the original's tokenizer, of which the files only have placeholders for the mode strings."""

    first_sentinel = FIRST_SENTINEL

    def __init__(self, modes: dict[str, list[int]]) -> None:
        self._modes = modes

    def encode(self, text: str) -> list[int]:
        return self._modes[text]


def original_objective(side_length: int, modes: dict[str, list[int]]) -> UL2:
    return UL2(2 * side_length, PlaceholderTokenizer(modes))  # type: ignore[arg-type]


def keys_of_mode(mode: str, prefix: int) -> list[RandomKey]:
    """Keys that draw each denoiser of `mode`, and a prefix of `prefix` tokens."""
    places = [(sum(d.rate for d in ul2.DENOISERS[:i]) + 0.05, d) for i, d in enumerate(ul2.DENOISERS)]
    keys = [RandomKey(int(place * 2**64), max(0, prefix - 1), 0, 0) for place, d in places if d.mode == mode]
    assert all(ul2.DENOISERS[ul2.draw_denoiser(key)].mode == mode for key in keys)
    return keys


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
        sizes = [objective.measure(key, raw_tokens) for key in keys_of_mode(mode, inputs)]
        assert (raw_tokens, example["inputs_len_final"], example["targets_len_final"]) in sizes, example
    split = content["prefix_lm_split_distribution_L50"]
    lengths = [ul2.prefix_length(split["length"], random_key("prefix", i)) for i in range(split["n"])]
    assert (min(lengths), max(lengths)) == (split["min"], split["max"])
    assert np.mean(lengths) == pytest.approx(split["mean"], abs=0.9)
    assert np.std(lengths) == pytest.approx(split["std"], rel=0.04)


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
def test_pipeline_examples(path: Path, records: list[dict]) -> None:
    """Catches any difference in the whole objective: mode strings, sentinels, trims, EOS, prefix split."""
    named = re.search(r"len(\d+)", path.stem)
    side_length = int(named.group(1)) if named else max(len(r["inputs"]) for r in records)
    size_of_mode = 3
    modes = {d.mode: [0] * size_of_mode for d in ul2.DENOISERS} | {
        r["prefix"]: r["inputs_before_trim"][:size_of_mode] for r in records
    }
    objective = original_objective(side_length, modes)
    for record in records:
        inputs, targets = record["inputs_before_trim"][size_of_mode:], record["targets_before_trim"]
        keys = keys_of_mode(record["prefix"], len(inputs))
        if record["prefix"] == "[S2S] ":
            tokens = np.array(inputs + targets, np.int32)
            built = objective.build(tokens, keys[0])
            assert [part.tolist() for part in built] == [record["inputs"], record["targets"]]
        else:
            raw, noise = undo_span_corruption(inputs, targets)
            tokens = np.array(raw, np.int32)
            corrupted = ul2.span_corruption(tokens, np.array(noise), FIRST_SENTINEL)
            assert [part.tolist() for part in corrupted] == [inputs, targets]
            whole = np.concatenate([modes[record["prefix"]], corrupted[0]])
            assert ul2.append_eos_after_trim(whole, side_length).tolist() == record["inputs"]
            assert ul2.append_eos_after_trim(corrupted[1], side_length).tolist() == record["targets"]
        sizes = [objective.measure(key, len(tokens)) for key in keys]
        assert (len(tokens), len(record["inputs"]), len(record["targets"])) in sizes


def test_paper_sizes() -> None:
    """Catches wrong values of Table 2: raw tokens, spans and lengths at 1024 + 1024 (facts 5.3)."""
    objective = original_objective(1024, {d.mode: [5] * 3 for d in ul2.DENOISERS})
    expected = [
        ((1137, 1024, 229), 57), ((1178, 1024, 200), 22), ((1534, 1024, 1024), 256),
        ((1818, 1024, 1024), 114), ((2014, 1024, 1024), 16),
    ]  # fmt: skip
    for index, (sizes, spans) in enumerate(expected):
        denoiser = ul2.DENOISERS[index]
        assert objective.measure(RandomKey(int((index + 0.5) / 10 * 2**64), 0, 0, 0)) == sizes
        assert denoiser.mean_span is not None
        assert ul2.noise_counts(sizes[0], denoiser.mean_span, denoiser.density)[1] == spans
    assert objective.measure(RandomKey(2**64 - 1, 499, 0, 0)) == (1023, 500 + 3 + 1, 523 + 1)
    assert sum(d.rate for d in ul2.DENOISERS) == pytest.approx(1)
