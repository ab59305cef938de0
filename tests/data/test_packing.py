"""Examples in rows: what each array holds, and how few rows they take."""

import itertools
from functools import cache

import numpy as np
import pytest

from openmoe.data.objectives import Examples
from openmoe.data.packing import BATCH_ARRAYS, NextFit, dense_pattern, empty_batch, place

# UL2 with 2048 tokens an example: Table 2's classes, and 4000 examples at its rates.
UL2_TOKENS = (1253, 1224, 2048, 2048, 2048, 1028)
UL2_COUNTS = (400, 400, 400, 400, 400, 2000)


def examples_of(*sizes: tuple[int, int]) -> Examples:
    """Examples of these input and target tokens; every token is another one."""
    sequences = np.zeros((len(sizes), max(map(sum, sizes)) + 2), np.int32)
    for number, (inputs, targets) in enumerate(sizes):
        sequences[number, : inputs + targets] = 100 * (number + 1) + np.arange(inputs + targets)
    return Examples(sequences, *(np.array(column) for column in zip(*sizes, strict=True)))


def test_a_batch_holds_what_was_placed() -> None:
    """Catches loss on inputs, a shift across examples, a prefix one too short, marks of another example."""
    examples = examples_of((3, 2), (0, 4), (1, 1))
    batch = empty_batch(2, 8)
    place(batch, [0, 1, 0], [0, 2, 5], [1, 2, 2], examples, [7, 8, 9])
    expected = {
        "target_tokens": [[100, 101, 102, 103, 104, 300, 301, 0], [0, 0, 200, 201, 202, 203, 0, 0]],
        "input_tokens": [[0, 100, 101, 102, 103, 0, 300, 0], [0, 0, 0, 200, 201, 202, 0, 0]],
        "loss_weights": [[0, 0, 0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 1, 1, 0, 0]],
        "segment_ids": [[1, 1, 1, 1, 1, 2, 2, 0], [0, 0, 2, 2, 2, 2, 0, 0]],
        "prefix_mask": [[1, 1, 1, 1, 0, 1, 1, 0], [0] * 8],
        "source_ids": [[7, 7, 7, 7, 7, 9, 9, -1], [-1, -1, 8, 8, 8, 8, -1, -1]],
    }
    assert set(expected) == set(BATCH_ARRAYS)
    for name, rows in expected.items():
        np.testing.assert_array_equal(batch[name], np.array(rows), err_msg=name)
        assert batch[name].dtype == BATCH_ARRAYS[name][0]


def test_examples_may_be_placed_in_any_order() -> None:
    """Catches one example spoiling a place of its neighbour, which would show in one order only."""
    examples = examples_of((3, 2), (2, 3), (0, 6))
    batches = []
    for order in itertools.permutations(range(3)):
        batch = empty_batch(1, 16)
        for number in order:
            one = Examples(*(part[number : number + 1] for part in examples))
            place(batch, [0], [(0, 5, 10)[number]], [number + 1], one, [number])
        batches.append(batch)
    for batch in batches[1:]:
        for name in BATCH_ARRAYS:
            np.testing.assert_array_equal(batch[name], batches[0][name], err_msg=name)


@pytest.mark.parametrize("start", [0, 1, 5])
def test_examples_that_do_not_fit_are_refused(start: int) -> None:
    """Catches an example being cut without a word, or running into the next row."""
    place(empty_batch(2, 5 + start), [0], [start], [1], examples_of((3, 2)), [0])
    with pytest.raises(ValueError, match="doesn't fit"):
        place(empty_batch(2, 4 + start), [0], [start], [1], examples_of((3, 2)), [0])


def test_next_fit() -> None:
    """Catches a row closed too early or too late, and places or segments that don't start anew."""
    packing = NextFit(8)
    assert [packing.add(size) for size in (4, 4, 3, 5, 1, 8, 8)] == [
        (0, 0, 1), (0, 4, 2), (1, 0, 1), (1, 3, 2), (2, 0, 1), (3, 0, 1), (4, 0, 1)
    ]  # fmt: skip
    with pytest.raises(ValueError, match="9 tokens doesn't fit into a row of 8"):
        NextFit(8).add(9)


def fill(pattern: np.ndarray, row_tokens: int) -> float:
    return float((pattern @ UL2_TOKENS).sum() / (len(pattern) * row_tokens))


def assert_complete(pattern: np.ndarray, tokens: tuple[int, ...], counts: tuple[int, ...], row: int) -> None:
    assert pattern.dtype == np.int64
    assert pattern.shape[1] == len(counts)
    assert pattern.sum(axis=0).tolist() == list(counts)
    assert (pattern >= 0).all()
    assert (pattern @ tokens).max() <= row
    assert (pattern.sum(axis=1) > 0).all()


@pytest.mark.parametrize(
    ("row_tokens", "rows"), [(2048, 4000), (4096, 1534), (8192, 700), (16384, 338), (32768, 168), (65536, 84)]
)
def test_rows_of_ul2_are_dense(row_tokens: int, rows: int) -> None:
    """Catches rows left open: 700 and 1534 are the fewest there are, as are 84 and 168 (99.99% full)."""
    pattern = dense_pattern(UL2_TOKENS, UL2_COUNTS, row_tokens)
    assert_complete(pattern, UL2_TOKENS, UL2_COUNTS, row_tokens)
    assert len(pattern) == rows
    assert fill(pattern, 32768) >= 0.975 or row_tokens != 32768
    np.testing.assert_array_equal(dense_pattern(UL2_TOKENS, UL2_COUNTS, row_tokens), pattern)


def test_rows_are_mixed_where_it_costs_nothing() -> None:
    """Catches rows of one class after the other, so that a step would hardly see some denoiser."""
    pattern = dense_pattern(UL2_TOKENS, UL2_COUNTS, 65536)
    assert (pattern > 0).all(axis=1).mean() > 0.7
    alike = dense_pattern((10, 10, 10), (30, 30, 30), 60)
    assert ((alike > 0).sum(axis=1) >= 2).mean() > 0.5


def fewest_rows(tokens: tuple[int, ...], counts: tuple[int, ...], row: int) -> int:
    """By trying everything."""

    @cache
    def fewest(left: tuple[int, ...]) -> int:
        if not any(left):
            return 0
        choices = itertools.product(*(range(count + 1) for count in left))
        fitting = [c for c in choices if any(c) and sum(map(int.__mul__, c, tokens)) <= row]
        return 1 + min(fewest(tuple(a - b for a, b in zip(left, c, strict=True))) for c in fitting)

    return fewest(counts)


@pytest.mark.parametrize(
    ("tokens", "counts", "row"),
    [
        ((5, 3), (4, 4), 8),
        ((7, 5, 3), (2, 2, 2), 15),
        ((6, 4), (3, 5), 10),
        ((4, 4), (3, 2), 9),
        ((9,), (5,), 10),
        ((3, 2), (0, 7), 6),
        ((6, 5, 4), (2, 2, 2), 10),
    ],
)
def test_few_rows_in_small_cases(tokens: tuple[int, ...], counts: tuple[int, ...], row: int) -> None:
    """Catches a rest that is filled worse than it could be, a class left over, or one used too often."""
    pattern = dense_pattern(tokens, counts, row)
    assert_complete(pattern, tokens, counts, row)
    assert len(pattern) == fewest_rows(tokens, counts, row)


def test_any_classes_are_used_up() -> None:
    """Catches counts that only come out for the classes of UL2."""
    random = np.random.default_rng(0)
    for _ in range(200):
        classes = int(random.integers(1, 7))
        tokens = tuple(random.integers(1, 60, classes).tolist())
        counts = tuple(random.integers(0, 30, classes).tolist())
        row = int(random.integers(max(tokens), 200))
        pattern = dense_pattern(tokens, counts, row)
        assert_complete(pattern, tokens, counts, row)
        # First-fit would never leave two rows that fit into one.
        assert len(pattern) <= max(1, 2 * np.dot(tokens, counts) / row + 1)
        if 2 * min(tokens) > row:
            assert len(pattern) == sum(counts)


def test_a_class_longer_than_the_row_is_refused() -> None:
    """Catches a search without end."""
    with pytest.raises(ValueError, match="9 tokens doesn't fit into a row of 8"):
        dense_pattern((4, 9), (1, 1), 8)
