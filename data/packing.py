"""Examples into rows, with the semantics of seqio's decoder-only feature converters (facts 5.4).

A row holds whole examples one after the other: inputs ++ targets each, shifted right with 0 at the start of
each, loss on the targets only, segment ids from 1, padding 0.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from openmoe.data.objectives import Examples

# Every array of a batch, [rows, seq_len], with the value that padding has.
BATCH_ARRAYS: dict[str, tuple[type[np.generic], int]] = {
    "input_tokens": (np.int32, 0),
    "target_tokens": (np.int32, 0),
    "loss_weights": (np.float32, 0),
    "segment_ids": (np.int32, 0),
    "prefix_mask": (np.bool_, 0),
    "source_ids": (np.int16, -1),
}


def empty_batch(rows: int, seq_len: int) -> dict[str, np.ndarray]:
    """A batch of padding."""
    return {name: np.full((rows, seq_len), padding, dtype) for name, (dtype, padding) in BATCH_ARRAYS.items()}


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
    seq_len = batch["target_tokens"].shape[1]
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
        inputs, targets, weights, segment_ids, prefix, sources = (batch[name][row] for name in BATCH_ARRAYS)
        targets[start:stop] = sequence[:size]
        inputs[start + 1 : stop] = sequence[: size - 1]
        weights[middle:stop] = 1
        segment_ids[start:stop] = segment
        if given:
            # One more than the inputs: the position that reads the last input token sees all of them.
            prefix[start : middle + 1] = True
        sources[start:stop] = source


def next_fit(sizes: Iterable[int], row_tokens: int) -> list[list[int]]:
    """Which examples each row holds, in order: one that doesn't fit closes the row and opens the next.

    `sizes` are the examples' tokens. Raises ValueError where one is longer than a row of `row_tokens`.
    """
    rows: list[list[int]] = []
    room = 0
    for index, size in enumerate(sizes):
        if size > row_tokens:
            raise ValueError(f"an example of {size} tokens doesn't fit into a row of {row_tokens}")
        if size > room:
            rows.append([])
            room = row_tokens
        rows[-1].append(index)
        room -= size
    return rows


def dense_pattern(
    class_row_tokens: Sequence[int], class_counts: Sequence[int], row_tokens: int
) -> np.ndarray:
    """How many examples of each class every row holds so that all `class_counts` are used; [rows, classes].

    Raises ValueError where an example is longer than a row of `row_tokens`.
    """
    sizes = np.asarray(class_row_tokens)
    left = np.array(class_counts)
    if (sizes > row_tokens).any():
        raise ValueError(f"an example of {sizes.max()} tokens doesn't fit into a row of {row_tokens}")
    rows = []
    while left.any():
        room, row = row_tokens, np.zeros_like(left)
        for index in np.argsort(-sizes, kind="stable"):
            row[index] = min(left[index], room // sizes[index])
            room -= row[index] * sizes[index]
        left -= row
        rows.append(row)
    return np.array(rows).reshape(-1, len(sizes))
