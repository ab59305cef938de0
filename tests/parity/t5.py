"""T5's span corruption for one example, written as the original defines it: the oracle of the tests."""

import numpy as np


def random_spans_helper(inputs_length: int, mean_span: float, density: float) -> tuple[int, int]:
    """Raw tokens and target tokens of an example whose inputs fill `inputs_length`."""

    def lengths(tokens: int) -> tuple[int, int]:
        noise = round(tokens * density)
        spans = round(noise / mean_span)
        return tokens - noise + spans + 1, noise + spans + 1

    tokens = inputs_length
    while lengths(tokens + 1)[0] <= inputs_length:
        tokens += 1
    targets = lengths(tokens)[1]
    return (tokens - 1, targets - 1) if density == 0.5 and targets > inputs_length else (tokens, targets)


def corrupted(tokens: np.ndarray, noise: np.ndarray, first_sentinel: int) -> tuple[list[int], list[int]]:
    """Inputs and targets of `tokens` [n] under the mask `noise`, bool [n]."""
    return _with_sentinels(tokens, noise, first_sentinel), _with_sentinels(tokens, ~noise, first_sentinel)


def _with_sentinels(tokens: np.ndarray, removed: np.ndarray, first_sentinel: int) -> list[int]:
    result: list[int] = []
    spans = 0
    for index, token in enumerate(tokens.tolist()):
        if not removed[index]:
            result.append(token)
        elif index == 0 or not removed[index - 1]:
            result.append(first_sentinel - spans)
            spans += 1
    return result


def mask_of(ends: np.ndarray, length: int) -> np.ndarray:
    """The mask of one example whose runs are `ends`, one row of what `ul2.span_ends` returns."""
    runs = np.diff(ends, prepend=0).reshape(2, -1)
    mask = np.repeat(np.arange(runs.size) % 2 == 1, runs.T.reshape(-1))
    return mask if runs.size else np.zeros(length, np.bool_)


def ends_of(noise: np.ndarray) -> np.ndarray | None:
    """The inverse of `mask_of`, as int64 [1, 2 * spans]; None where no example can have this mask."""
    if noise.size == 1 and not noise[0]:
        return np.empty((1, 0), np.int64)
    if noise[0] or not noise[-1]:
        return None
    edges = np.flatnonzero(noise[1:] != noise[:-1]) + 1
    runs = np.diff(np.concatenate([[0], edges, [noise.size]]))
    return np.cumsum(np.concatenate([runs[0::2], runs[1::2]]))[np.newaxis]
