"""Examples into rows, with the semantics of seqio's decoder-only feature converters (facts 5.4).

A row holds whole examples one after the other: inputs ++ targets each, shifted right with 0 at the start of
each, loss on the targets only, segment ids from 1, padding 0.
"""

from collections.abc import Iterable

import numpy as np

Example = tuple[np.ndarray, np.ndarray]

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


def fill_row(
    batch: dict[str, np.ndarray], row: int, examples: Iterable[Example], source_ids: Iterable[int]
) -> None:
    """Write `examples` (inputs, targets) one after the other into row `row` of `batch`.

    Raises ValueError where they don't fit.
    """
    inputs, targets, weights, segments, prefix, sources = (batch[name][row] for name in BATCH_ARRAYS)
    start = 0
    for segment, ((given, learned), source) in enumerate(zip(examples, source_ids, strict=True), start=1):
        middle = start + len(given)
        stop = middle + len(learned)
        if stop > targets.size:
            raise ValueError(f"examples of {stop} tokens don't fit into a row of {targets.size}")
        targets[start:middle] = given
        targets[middle:stop] = learned
        inputs[start + 1 : stop] = targets[start : stop - 1]
        weights[middle:stop] = 1
        segments[start:stop] = segment
        if len(given):
            # One more than the inputs: the position that reads the last input token sees all of them.
            prefix[start : middle + 1] = True
        sources[start:stop] = source
        start = stop
