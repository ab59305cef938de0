"""Examples into rows, with the semantics of seqio's decoder-only feature converters (facts 5.4).

A row holds whole examples one after the other: inputs ++ targets each, shifted right with 0 at the start of
each, loss on the targets only, segment ids from 1, padding 0.
"""

from collections.abc import Sequence

import numpy as np

from openmoe.data.objectives import Examples

# Every array of a batch, [rows, seq_len], with the value that padding has. As small as they can be: writing
# them is what building a row costs. Loss weights are 0 or 1.
BATCH_ARRAYS: dict[str, tuple[type[np.generic], int]] = {
    "input_tokens": (np.int32, 0),
    "target_tokens": (np.int32, 0),
    "loss_weights": (np.uint8, 0),
    "segment_ids": (np.int16, 0),
    "prefix_mask": (np.bool_, 0),
    "source_ids": (np.int16, -1),
}


def empty_batch(rows: int, seq_len: int) -> dict[str, np.ndarray]:
    """A batch of padding."""
    return {name: np.full((rows, seq_len), padding, kind) for name, (kind, padding) in BATCH_ARRAYS.items()}


def place(
    batch: dict[str, np.ndarray],
    rows: Sequence[int],
    starts: Sequence[int],
    segments: Sequence[int],
    examples: Examples,
    source_ids: Sequence[int],
) -> None:
    """Write example i of `examples` into row `rows[i]` of `batch`, from position `starts[i]` on.

    `batch` holds padding there. `segments[i]` is the example's number within its row, from 1 on.
    Raises ValueError where an example doesn't fit.
    """
    inputs, targets, weights, segment_ids, prefix, sources = (batch[name] for name in BATCH_ARRAYS)
    seq_len = targets.shape[1]
    places = zip(
        rows,
        starts,
        segments,
        source_ids,
        examples.sequences,
        examples.input_tokens.tolist(),
        examples.target_tokens.tolist(),
        strict=True,
    )
    for row, start, segment, source, sequence, given, learned in places:
        size = given + learned
        middle, stop = start + given, start + size
        if stop > seq_len:
            raise ValueError(f"an example of {size} tokens doesn't fit at {start} into a row of {seq_len}")
        targets[row, start:stop] = sequence[:size]
        inputs[row, start + 1 : stop] = sequence[: size - 1]
        weights[row, middle:stop] = 1
        segment_ids[row, start:stop] = segment
        if given:
            # One more than the inputs: the position that reads the last input token sees all of them.
            prefix[row, start : middle + 1] = True
        sources[row, start:stop] = source


class NextFit:
    """seqio's packing: an example that doesn't fit closes the row and opens the next one."""

    def __init__(self, row_tokens: int) -> None:
        self._row_tokens = row_tokens
        self._row, self._used, self._segment = 0, 0, 0

    def add(self, size: int) -> tuple[int, int, int]:
        """Row, first position and segment number of the next example, which takes `size` positions.

        Raises ValueError where it is longer than a row.
        """
        if size > self._row_tokens:
            raise ValueError(f"an example of {size} tokens doesn't fit into a row of {self._row_tokens}")
        if self._used + size > self._row_tokens:
            self._row, self._used, self._segment = self._row + 1, 0, 0
        place = self._used
        self._used += size
        self._segment += 1
        return self._row, place, self._segment


def dense_pattern(
    class_row_tokens: Sequence[int], class_counts: Sequence[int], row_tokens: int
) -> np.ndarray:
    """How many examples of each class every row holds, all of them in few rows; int64 [rows, classes].

    `class_row_tokens` are the tokens an example of each class takes, `class_counts` how many there are of it.
    A row gets examples of all classes, and the rest of it those that fill it best. The smaller the rest, the
    more alike the rows are; the larger, the fewer rows it takes. Of a few such shares the one with the fewest
    rows is used, or the most alike of those. Raises ValueError where an example is longer than a row.
    """
    if max(class_row_tokens) > row_tokens:
        raise ValueError(
            f"an example of {max(class_row_tokens)} tokens doesn't fit into a row of {row_tokens}"
        )
    tried = [
        _filled_rows(class_row_tokens, class_counts, row_tokens, rest) for rest in (0.25, 0.5, 0.75, 1.0)
    ]
    return np.array(min(tried, key=len), np.int64).reshape(-1, len(class_counts))


def _filled_rows(
    sizes: Sequence[int], counts: Sequence[int], row_tokens: int, rest: float
) -> list[list[int]]:
    """The rows where all but the share `rest` of each is in proportion to what is left of the classes."""
    left = list(counts)
    rows = []
    while any(left):
        left_tokens = sum(size * count for size, count in zip(sizes, left, strict=True))
        share = min(1.0, (1 - rest) * row_tokens / left_tokens)
        row = [int(share * count) for count in left]
        left = [count - used for count, used in zip(left, row, strict=True)]
        room = row_tokens - sum(size * used for size, used in zip(sizes, row, strict=True))
        # The class with the most tokens left is taken from first, so that none is left over at the end.
        order = sorted(range(len(sizes)), key=lambda i: -left[i] * sizes[i])
        best = _best_fill([sizes[i] for i in order], [left[i] for i in order], room)
        for i, used in zip(order, best, strict=True):
            row[i] += used
            left[i] -= used
        rows.append(row)
    return rows


def _best_fill(sizes: Sequence[int], counts: Sequence[int], room: int) -> list[int]:
    """How many of each size to take, of `counts`, for the largest sum up to `room`; earlier ones first."""
    reachable, sums_below = 1, (1 << (room + 1)) - 1  # bit s: there are examples of s tokens together
    steps = []
    for index, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        left, times = min(count, room // size), 1
        while left:  # 1, 2, 4, ... of them, and what remains: together any number up to `left`
            times = min(times, left)
            steps.append((index, times, reachable))
            reachable |= (reachable << (times * size)) & sums_below
            left -= times
            times *= 2
    total = reachable.bit_length() - 1
    used = [0] * len(sizes)
    for index, times, before in reversed(steps):
        if not before >> total & 1:
            used[index] += times
            total -= times * sizes[index]
    return used
