"""The numbers about rows, against rows made by hand and against the loader's own."""

import dataclasses
from itertools import product

import numpy as np
import pytest

from openmoe.data.config import DataConfig, PhaseConfig
from openmoe.data.curriculum import Curriculum
from openmoe.data.inspection import (
    class_denoisers,
    composition_shares,
    count_plans,
    expected_mix,
    measure_rows,
    percentile,
    shares,
)
from openmoe.data.loader import Loader, StepBatch
from openmoe.data.packing import empty_batch
from openmoe.data.prepare import PreparedData
from openmoe.data.recipe import PlannedExamples

FIRST_SENTINEL = 999
ROW = 20

# (source, class, row, text read, inputs, targets) of two rows, by hand. Text is 10 and up, mode string 7,
# EOS 1. Class 0 has spans, class 1 a prefix; both have a mode string of one token.
EXAMPLES = [
    (1, 0, 0, 7, [7, 10, 11, 999, 13, 1], [999, 14, 15, 998, 16, 1]),
    (0, 1, 0, 4, [7, 20, 1], [21, 22, 23, 1]),
    (1, 1, 1, 4, [7, 30, 31, 32, 1], [33, 1]),
]


def by_hand(step: int = 0) -> StepBatch:
    arrays = empty_batch(2, ROW)
    lines = []
    places, segments = [0, 0], [0, 0]
    for source, kind, row, raw, inputs, targets in EXAMPLES:
        first, middle, past = places[row], places[row] + len(inputs), places[row] + len(inputs) + len(targets)
        segments[row] += 1
        arrays["target_tokens"][row, first:past] = inputs + targets
        arrays["loss_weights"][row, middle:past] = 1
        arrays["segment_ids"][row, first:past] = segments[row]
        arrays["source_ids"][row, first:past] = source
        lines.append([source, kind, row, first, segments[row], 0, raw, len(inputs), len(targets)])
        places[row] = past
    source_of, kind_of, *rest = np.array(lines).T
    return StepBatch(
        step=step,
        phase=0,
        objective="ul2",
        arrays=arrays,
        positions=2 * ROW,
        nonpad_tokens=26,
        loss_tokens=12,
        source_text_tokens={},
        source_tokens={},
        source_epochs={"a": step + 0.25, "b": step + 0.5},
        examples=PlannedExamples(source_of, kind_of, np.zeros(3, np.uint64), *rest),
    )


def test_plans_are_added_up() -> None:
    """Catches a sum over the wrong axis or quantity, a step counted whole where half was asked for, and
    epochs or steps of another batch."""
    counts = count_plans((by_hand(step) for step in (5, 6, 7)), 3, ROW, 2, 2)
    assert (counts.rows, counts.first_step, counts.past_step, counts.positions) == (3, 5, 7, 60)
    # Rows 0, 1 and 0 again: the first two examples twice, the third once.
    np.testing.assert_array_equal(counts.examples, [[0, 2], [2, 1]])
    np.testing.assert_array_equal(counts.raw_tokens, [[0, 8], [14, 4]])
    np.testing.assert_array_equal(counts.input_tokens, [[0, 6], [12, 5]])
    np.testing.assert_array_equal(counts.target_tokens, [[0, 8], [12, 2]])
    assert counts.raw_squares == 2 * 7**2 + 3 * 4**2
    assert counts.size_squares == 2 * 12**2 + 3 * 7**2
    assert counts.rows_by_segments.tolist() == [0, 1, 2]
    assert counts.epochs == {"a": 6.25, "b": 6.5}
    assert counts.fill == pytest.approx((2 * 19 + 7) / 60)
    assert counts.loss_share == pytest.approx((2 * 10 + 2) / 60)


def test_plans_of_fewer_batches_than_asked() -> None:
    """Catches a count that claims rows it has not seen."""
    assert count_plans([by_hand()], 100, ROW, 2, 2).rows == 2


def test_rows_are_read_by_their_sentinels() -> None:
    """Catches marks counted as text, spans cut at the wrong mark, and an example counted under another's
    class."""
    measures = measure_rows([by_hand()], 2, FIRST_SENTINEL, [1, 1])
    assert measures.rows == 2
    assert measures.examples.tolist() == [1, 2]
    assert measures.raw_tokens.tolist() == [7, 8]
    # Of seven tokens one was cut off behind the last sentinel.
    assert measures.kept_tokens.tolist() == [3, 4]
    assert measures.masked_tokens.tolist() == [3, 4]
    assert measures.spans.tolist() == [2, 0]
    assert {length: int(n) for length, n in enumerate(measures.span_lengths[0]) if n} == {1: 1, 2: 1}
    assert {length: int(n) for length, n in enumerate(measures.kept_lengths[1]) if n} == {1: 1, 3: 1}


def test_only_the_asked_rows_are_read() -> None:
    """Catches a sample that takes whole steps."""
    measures = measure_rows((by_hand() for _ in range(9)), 3, FIRST_SENTINEL, [1, 1])
    assert measures.rows == 3
    assert measures.examples.tolist() == [2, 3]
    with pytest.raises(ValueError, match="no batch"):
        measure_rows([], 3, FIRST_SENTINEL, [1, 1])


def test_shares_and_their_errors() -> None:
    """Catches rates that aren't normalised, and a standard error of something else than a share."""
    first, second = shares(np.array([30, 70]), np.array([1.0, 3.0]), 100)
    assert (first.realised, first.configured, second.configured) == (0.3, 0.25, 0.75)
    assert first.standard_error == pytest.approx((0.25 * 0.75 / 100) ** 0.5)
    # Items of unequal size, by simulation.
    generator = np.random.default_rng(0)
    sizes = generator.integers(1, 30, 400)
    drawn = generator.random((4000, 400)) < 0.2
    spread = ((drawn * sizes).sum(axis=1) / sizes.sum()).std()
    by_formula = shares(np.array([0, sizes.sum()]), np.array([0.2, 0.8]), float((sizes**2).sum()))
    assert by_formula[0].standard_error == pytest.approx(spread, rel=0.05)


def test_mix_of_a_ramp() -> None:
    """Catches a ramp compared with its end, or counted from the run's first step."""
    phases = [
        PhaseConfig(until_steps=10, mix={"a": 1, "b": 3}, objective="ul2"),
        PhaseConfig(mix={"b": 1, "c": 1}, ramp_steps=10, objective="ul2"),
    ]
    curriculum = Curriculum(phases, 8, 2)
    mix = [expected_mix(curriculum, phase, "abc", *steps) for phase, steps in ((0, (0, 5)), (1, (10, 20)))]
    np.testing.assert_allclose(mix, [[0.25, 0.75, 0], [0.125, 0.625, 0.25]])
    np.testing.assert_allclose(expected_mix(curriculum, 1, "abc", 10, 15), [0.1875, 0.6875, 0.125])
    np.testing.assert_allclose(expected_mix(curriculum, 1, "abc", 500, 501), [0, 0.5, 0.5])


def test_denoisers_stand_beside_their_classes(prepared: PreparedData, config: DataConfig) -> None:
    """Catches a denoiser without a rate that shifts the others against the objective's classes."""
    table = [
        d.model_copy(update={"rate": 0.0 if i in (0, 3) else 1.0}) for i, d in enumerate(config.denoisers)
    ]
    changed = config.model_copy(update={"denoisers": table})
    for objective in ("ul2", "span_corruption", "prefix_lm", "causal_lm"):
        phase = PhaseConfig(mix={"short": 1.0}, objective=objective)
        classes = Loader(prepared, [phase], changed, 128, 4, 0).class_names(0)
        denoisers = class_denoisers(phase.objective, changed)
        assert len(denoisers) == len(classes)
        for name, denoiser in zip(classes, denoisers, strict=True):
            if objective == "ul2" and denoiser is not None:
                assert name.startswith(denoiser.mode.strip())
                assert ("prefix" in name) == (denoiser.mean_span is None)
    assert class_denoisers("causal_lm", changed) == [None]


@pytest.mark.parametrize("packing", ["released", "dense"])
@pytest.mark.parametrize("objective", ["ul2", "span_corruption", "prefix_lm", "causal_lm"])
def test_what_is_read_agrees_with_what_was_planned(
    prepared: PreparedData, config: DataConfig, objective: str, packing: str
) -> None:
    """Catches a reader of rows that loses examples or text, on the rows of every objective."""
    changed = config.model_copy(
        update={"packing": packing, "example_tokens": 128 if packing == "dense" else None}
    )
    seq_len = 512 if packing == "dense" else 128
    phase = PhaseConfig(mix={"short": 0.3, "middle": 0.3, "long": 0.4}, objective=objective)  # type: ignore[arg-type]
    loader = Loader(prepared, [phase], changed, seq_len, 16, 3)
    planner = Loader(prepared, [phase], changed, seq_len, 16, 3, rows=slice(0, 0))
    denoisers = class_denoisers(phase.objective, changed)
    modes = [len(prepared.tokenizer.encode(d.mode)) if d else 0 for d in denoisers]
    batches = [next(loader) for _ in range(12)]
    counts = count_plans(planner, 190, seq_len, 3, len(denoisers))
    measures = measure_rows(batches, 190, prepared.tokenizer.first_sentinel, modes)
    np.testing.assert_array_equal(measures.examples, counts.examples.sum(axis=0))
    np.testing.assert_array_equal(measures.raw_tokens, counts.raw_tokens.sum(axis=0))
    filled = sum(int((b.arrays["segment_ids"] > 0).sum()) for b in batches[:-1])
    filled += int((batches[-1].arrays["segment_ids"][:14] > 0).sum())
    assert counts.sizes.sum() == filled
    for index, denoiser in enumerate(denoisers):
        if denoiser is None:
            continue
        examples, raw_tokens = measures.examples[index], measures.raw_tokens[index]
        assert measures.kept_lengths[index] @ np.arange(seq_len + 1) == measures.kept_tokens[index]
        lost = raw_tokens - measures.kept_tokens[index] - measures.masked_tokens[index]
        assert 0 <= lost <= modes[index] * examples
        # Every position is text, a sentinel, the mode string or an EOS.
        inputs, targets = (t.sum(axis=0)[index] for t in (counts.input_tokens, counts.target_tokens))
        assert targets == measures.masked_tokens[index] + measures.spans[index] + examples
        assert measures.span_lengths[index] @ np.arange(seq_len + 1) == (
            0 if denoiser.mean_span is None else measures.masked_tokens[index]
        )
        left = inputs - measures.kept_tokens[index] - (modes[index] + 1) * examples
        assert 0 <= left <= measures.spans[index]
        if denoiser.mean_span is not None:
            assert measures.masked_tokens[index] / raw_tokens == pytest.approx(denoiser.density, rel=0.05)


def test_percentile() -> None:
    """Catches a percentile that is off by one value."""
    histogram = np.bincount([1, 1, 2, 5])
    assert [percentile(histogram, share) for share in (0.25, 0.5, 0.75, 0.76, 1)] == [1, 1, 2, 5, 5]


def test_composition_shares() -> None:
    """Catches a wrong expectation of span lengths, against all compositions of a few numbers."""
    for total, parts in ((1, 1), (6, 1), (6, 2), (7, 3), (5, 5)):
        ways = [cut for cut in product(range(1, total + 1), repeat=parts) if sum(cut) == total]
        lengths = np.bincount([length for way in ways for length in way], minlength=total + 1)
        np.testing.assert_allclose(composition_shares(total, parts, total), lengths / lengths.sum())
    assert composition_shares(6, 2, 3).tolist() == composition_shares(6, 2, 6)[:4].tolist()


def test_counting_is_not_changed_by_the_rows_that_are_built(
    prepared: PreparedData, config: DataConfig
) -> None:
    """Catches statistics of one rank's rows only."""
    phase = PhaseConfig(mix={"short": 1.0, "long": 1.0}, objective="ul2")
    one, other = (
        count_plans(Loader(prepared, [phase], config, 64, 6, 1, rows=rows), 33, 64, 3, 6)
        for rows in (None, slice(0, 0))
    )
    for field in dataclasses.fields(one):
        np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))
