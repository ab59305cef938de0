"""Blocks of rows: exact counts for every class and source, from any row on, at any distance."""

from typing import Any

import numpy as np
import pytest

from openmoe.data.config import DataConfig
from openmoe.data.errors import DataError
from openmoe.data.objectives import ExampleClass, Objective, make_objective
from openmoe.data.prepare import PreparedData
from openmoe.data.recipe import PhaseRecipe, apportion

RATES = np.array([0.5, 0.335, 0.1, 0.055, 0.01])


class Sizes:
    """A kind of example without content."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens

    def sizes(self, raw_tokens: int, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        given = (draws % np.uint64(self._tokens)).astype(np.int64)
        return given, self._tokens - given

    def build(self, tokens: np.ndarray, draws: np.ndarray) -> Any:
        raise AssertionError("the plan touches no token")


def objective(sizes: list[int], rates: list[float]) -> Objective:
    classes = [ExampleClass(f"class {n}", rate, n + 3, n) for n, rate in zip(sizes, rates, strict=True)]
    return Objective(classes, False, [Sizes(n) for n in sizes])


def recipe(packed: bool = False, **changes: Any) -> PhaseRecipe:
    values: dict[str, Any] = {
        "objective": objective([60, 40, 33], [0.1, 0.4, 0.5]),
        "rates": RATES,
        "row_tokens": 256 if packed else 64,
        "packed": packed,
        "seed": 5,
        "phase": 0,
    }
    return PhaseRecipe(**values | changes)


def test_apportion_is_exact_monotone_and_close() -> None:
    """Catches shares that drift, a source that gives text back, and totals that don't add up."""
    shares = np.array([0.0, 0.31, 0.004, 0.006, 0.0, 0.68, 0.0])
    offsets = np.array([0.9, 0.1, 0.99, 0.5, 0.3, 0.0, 0.7])
    totals = np.concatenate([np.arange(3000), 10**12 + np.arange(1000)])
    dealt = apportion(totals, shares, offsets)
    np.testing.assert_array_equal(dealt.sum(axis=1), totals)
    assert (np.diff(dealt[:3000], axis=0) >= 0).all()
    assert (np.diff(dealt[3000:], axis=0) >= 0).all()
    assert not dealt[0].any()
    assert not dealt[:, shares == 0].any()
    assert np.abs(dealt - totals[:, None] * shares).max() < 3


@pytest.mark.parametrize("packed", [False, True])
def test_every_block_has_its_classes_and_rows(packed: bool) -> None:
    """Catches blocks of another size, rows that overflow, overlap or stay empty, segments out of order."""
    made = recipe(packed)
    for block in (0, 1, 10**6):
        examples = made.examples(block * made.block_rows, made.block_rows)
        shares = np.bincount(examples.kind) / len(examples.kind)
        np.testing.assert_allclose(shares, [0.1, 0.4, 0.5])
        assert set(examples.row.tolist()) == set(range(made.block_rows))
        sizes = examples.input_tokens + examples.target_tokens
        for row in range(made.block_rows):
            mine = examples.row == row
            stops = examples.place[mine] + sizes[mine]
            np.testing.assert_array_equal(examples.place[mine], [0, *stops[:-1]])
            assert stops[-1] <= (256 if packed else 64)
            np.testing.assert_array_equal(examples.segment[mine], np.arange(1, mine.sum() + 1))


@pytest.mark.parametrize("packed", [False, True])
def test_any_rows_are_part_of_the_whole(packed: bool) -> None:
    """Catches rows that depend on where planning began: text lost or doubled between blocks and steps."""
    made = recipe(packed)
    rows = 3 * made.block_rows
    whole = made.examples(0, rows)
    draw = np.random.default_rng(0)
    for first, past in np.sort(draw.integers(0, rows, (40, 2))).tolist():
        part = recipe(packed).examples(first, past + 1 - first)
        mine = (whole.row >= first) & (whole.row <= past)
        for name, array in part._asdict().items():
            expected = getattr(whole, name)[mine] - (first if name == "row" else 0)
            np.testing.assert_array_equal(array, expected, err_msg=name)
    for source in range(len(RATES)):
        mine = whole.source == source
        ends = whole.start[mine] + whole.raw_tokens[mine]
        np.testing.assert_array_equal(whole.start[mine], [0, *ends[:-1]])
        for row in (0, 1, 199, 200, 257, rows - 1):
            before = whole.raw_tokens[mine & (whole.row < row)].sum()
            assert made.tokens_before(row)[source] == before


def test_shares_hold_at_every_row_and_at_any_distance() -> None:
    """Catches rates that hold on average only, and errors that grow with the run."""
    made = recipe()
    whole = made.examples(0, 20 * made.block_rows)
    for source, rate in enumerate(RATES):
        given = np.cumsum(whole.source == source)
        assert np.abs(given - rate * np.arange(1, len(given) + 1)).max() < 5
    far = 10**9
    tokens = made.tokens_before(far)
    mean = 0.1 * 63 + 0.4 * 43 + 0.5 * 36
    assert np.abs(tokens - RATES * far * mean).max() < 500


def test_sources_and_classes_are_independent() -> None:
    """Catches a source that only ever shows some of the denoisers."""
    whole = recipe().examples(0, 100 * 200)
    for source, rate in enumerate(RATES):
        kinds = np.bincount(whole.kind[whole.source == source], minlength=3)
        expected = rate * 20_000 * np.array([0.1, 0.4, 0.5])
        assert np.abs(kinds - expected).max() < 4
    order = whole.kind[whole.source == 0]
    repeats = np.mean(order[1:] == order[:-1])
    assert repeats == pytest.approx(0.1**2 + 0.4**2 + 0.5**2, abs=0.02)


def test_seed_phase_and_block_change_the_order() -> None:
    """Catches one order for all blocks, seeds or phases, and draws that repeat."""
    first = recipe().examples(0, 400)
    for other in (recipe(seed=6).examples(0, 400), recipe(phase=1).examples(0, 400)):
        assert (first.kind != other.kind).any()
        assert not set(first.draw.tolist()) & set(other.draw.tolist())
    assert (first.kind[:200] != first.kind[200:]).any()
    assert len(set(first.draw.tolist())) == 400


def test_a_ramp_goes_linearly_from_mix_to_mix() -> None:
    """Catches a ramp that jumps, lags, drops a small source, or leaves a debt to the rows after it."""
    start = np.array([0.0, 0.1, 0.3, 0.59, 0.01])
    rows = 400 * 200
    made = recipe(ramp_from=start, ramp_rows=rows)
    whole = made.examples(0, 2 * rows)
    for first in range(0, rows, rows // 8):
        middle = (first + rows // 16) / rows
        shares = np.bincount(whole.source[first : first + rows // 8], minlength=5) / (rows // 8)
        np.testing.assert_allclose(shares, start * (1 - middle) + RATES * middle, atol=0.006)
    after = np.bincount(whole.source[rows:], minlength=5)
    assert np.abs(after - RATES * rows).max() < 5
    # The sum over the ramp is worked out in stretches: the same as adding up the examples.
    for row in (rows - 77, rows, rows + 1000):
        given = np.bincount(whole.source[:row], whole.raw_tokens[:row], 5)
        np.testing.assert_array_equal(made.tokens_before(row), given)


def test_long_ramps_are_added_up_in_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a stretch that is left out or counted twice."""
    monkeypatch.setattr("openmoe.data.recipe._RAMP_BLOCKS", 7)
    values = {"ramp_from": RATES[::-1].copy(), "ramp_rows": 50 * 200}
    made = recipe(**values)
    whole = made.examples(0, 60 * 200)
    for block in (6, 7, 8, 21, 49, 50, 51):
        given = np.bincount(whole.source[: block * 200], whole.raw_tokens[: block * 200], 5)
        np.testing.assert_array_equal(recipe(**values).tokens_before(block * 200), given)


def test_odd_rates_are_rounded_in_four_thousand() -> None:
    """Catches a class that vanishes because 200 examples can't show its rate."""
    made = recipe(objective=objective([60, 40, 33], [0.0004, 1 / 3, 1 - 1 / 3 - 0.0004]))
    assert made.block_rows == 4000
    assert np.bincount(made.examples(0, 4000).kind).tolist() == [2, 1333, 2665]
    with pytest.raises(DataError, match=r"class 60 has a share of 0.0001 .*at least 0.00025"):
        recipe(objective=objective([60, 40], [0.0001, 0.9999]))


def test_equal_rates_are_rounded_alike_on_every_machine() -> None:
    """Catches counts that depend on how a processor sorts equal remainders."""
    rates = np.array([1, 2, 3, 1, 3, 3, 3, 3, 2]) / 21
    made = recipe(objective=objective([60] * 9, rates.tolist()))
    assert made.class_counts.tolist() == [191, 381, 572, 191, 571, 571, 571, 571, 381]


def test_ul2_at_scale_keeps_table_2(prepared: PreparedData) -> None:
    """Catches denoisers off their rates, or packing that leaves more than 3% of long rows empty."""
    for row_tokens, packed in ((2048, False), (32_768, True)):
        made = PhaseRecipe(
            make_objective("ul2", 2048, prepared.tokenizer, DataConfig()), RATES, row_tokens, packed, 0, 0
        )
        examples = made.examples(0, made.block_rows)
        shares = np.bincount(examples.kind) / len(examples.kind)
        np.testing.assert_allclose(shares, [0.1, 0.1, 0.1, 0.1, 0.1, 0.5])
        fill = (examples.input_tokens + examples.target_tokens).sum() / (made.block_rows * row_tokens)
        assert fill == pytest.approx(0.673, abs=0.01) if not packed else fill > 0.97


def test_shares_of_100000_rows_are_within_three_standard_errors(prepared: PreparedData) -> None:
    """Catches a mix or denoisers off their rates, judged as if each row had been drawn (Tables 1 and 2)."""
    version_1 = np.array([7.5, 2.25, 1.0, 1.25, 2.25, 2.25, 33.5, 50.0]) / 100
    denoisers = np.array([0.1, 0.1, 0.1, 0.1, 0.1, 0.5])
    rows = 100_000
    made = PhaseRecipe(
        make_objective("ul2", 2048, prepared.tokenizer, DataConfig()), version_1, 2048, False, 1, 0
    )
    examples = made.examples(12_345, rows)
    for found, rates in ((examples.source, version_1), (examples.kind, denoisers)):
        shares = np.bincount(found) / rows
        assert (np.abs(shares - rates) < 3 * np.sqrt(rates * (1 - rates) / rows)).all()
