"""Span corruption and prefix splits as in T5 (Raffel et al. 2020), many examples at a time.

Sizes, rounding and the form of the masks equal T5's `random_spans_*` functions to the integer; only the
random bits are ours. Facts 5.3. All examples of a call have the same length and so the same number of noise
tokens and spans; what differs is where the spans lie, and each example has that from its own random word.
"""

from bisect import bisect_right
from functools import lru_cache

import numpy as np

from openmoe.data.rng import mix_bits, random_words


def random_spans_helper(inputs_length: int, mean_span: float, density: float) -> tuple[int, int]:
    """Raw tokens that fill `inputs_length` after corruption, EOS included, and the length of their targets.

    Counts one sentinel per span and one EOS on either side. Never fewer than `inputs_length` tokens, even
    where the EOS doesn't fit then. Targets that would be longer than that cost one token at density 0.5, as
    in T5; at higher densities, which T5 has no rule for, as many as it takes.
    """

    def lengths(tokens: int) -> tuple[int, int]:
        noise = round(tokens * density)
        spans = round(noise / mean_span)
        return tokens - noise + spans + 1, noise + spans + 1

    candidates = range(2 * inputs_length)  # with more, one of the two would be too long
    fitting = bisect_right(candidates, inputs_length, key=lambda tokens: lengths(tokens)[0]) - 1
    tokens = max(inputs_length, fitting)
    targets = lengths(tokens)[1]
    if density == 0.5 and targets > inputs_length:
        return tokens - 1, targets - 1
    while density > 0.5 and lengths(tokens)[1] > inputs_length:
        tokens -= 1
    return tokens, lengths(tokens)[1]


@lru_cache(maxsize=1024)
def noise_counts(length: int, mean_span: float, density: float) -> tuple[int, int]:
    """How many of `length` tokens are noise, and in how many spans: fixed, only their places are random.

    Rounds in float32 as the original does.
    """
    if length < 2:
        return 0, 0
    noise = int(np.round(np.float32(length) * np.float32(density)))
    noise = min(max(noise, 1), length - 1)
    spans = max(1, int(np.round(np.float32(noise) / np.float32(mean_span))))
    return noise, min(spans, length - noise)


def span_ends(length: int, noise: int, spans: int, draws: np.ndarray) -> np.ndarray:
    """Where the runs end once all kept tokens are put before all noise tokens: int64 [n, 2 * spans].

    An example is kept run 0, noise run 0, kept run 1, ..., and ends with a noise run. All ways to cut
    `length - noise` kept tokens into `spans` runs, and `noise` tokens into as many, are equally likely.
    `draws` is uint64 [n], a random word for each example.
    """
    examples, kept = len(draws), length - noise
    ends = np.empty((examples, 2 * spans), np.int64)
    if spans == 0:
        return ends
    ends[:, spans - 1], ends[:, -1] = kept, length
    if spans == 1:
        return ends
    # Each place between two kept tokens, or two noise tokens, has a random word; the lowest are cut.
    words = random_words(draws, length - 2)
    cut = np.empty(words.shape, np.bool_)
    for part in (slice(kept - 1), slice(kept - 1, None)):
        highest = np.partition(words[:, part], spans - 2, axis=1)[:, spans - 2, np.newaxis]
        np.less_equal(words[:, part], highest, out=cut[:, part])
    places = np.flatnonzero(cut)
    cuts = 2 * (spans - 1)
    if places.size > examples * cuts:
        # Equal words at the border: those examples are drawn anew, which keeps all ways alike.
        tied = np.count_nonzero(cut, axis=1) > cuts
        ends[tied] = span_ends(length, noise, spans, mix_bits(draws[tied]))
        ends[~tied] = span_ends(length, noise, spans, draws[~tied])
        return ends
    columns = places.reshape(examples, cuts) - np.arange(examples)[:, np.newaxis] * (length - 2)
    np.add(columns[:, : spans - 1], 1, out=ends[:, : spans - 1])
    np.add(columns[:, spans - 1 :], 2, out=ends[:, spans:-1])
    return ends


def corrupt_spans(tokens: np.ndarray, ends: np.ndarray, first_sentinel: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (each noise run replaced by a sentinel) and targets (each kept run replaced by one).

    `tokens` int32 [n, length], `ends` as from `span_ends`; sentinels count down from `first_sentinel`.
    Returns int32 [n, kept + spans] and [n, noise + spans].
    """
    examples, length = tokens.shape
    spans = ends.shape[1] // 2
    if spans == 0:
        # A single token: T5 makes two of it, kept and noise, and cuts off what is beyond the first.
        return tokens, np.full((examples, 1), first_sentinel, np.int32)
    kept = int(ends[0, spans - 1])
    width = length + 2 * spans
    rows = np.arange(examples)[:, np.newaxis]
    number = np.arange(spans)
    # Inputs and targets side by side are 2 * spans pieces: kept runs with a sentinel after each, noise runs
    # with a sentinel before each. Within a piece the place in `tokens` is the column plus a shift; the
    # sentinel reads a neighbour at first and is then written over.
    kept_ends, noise_starts = ends[:, :spans], ends[:, spans - 1 : -1]
    pieces = ends + 1
    pieces[:, 1:] -= ends[:, :-1]
    shifts = np.empty_like(ends)
    np.add(noise_starts, rows * length - number - kept, out=shifts[:, :spans])
    np.add(kept_ends, rows * length - number - (kept + spans + 1), out=shifts[:, spans:])
    places = np.repeat(shifts.reshape(-1), pieces.reshape(-1)).reshape(examples, width)
    places += np.arange(width)
    result = tokens.reshape(-1).take(places)
    sentinels = np.empty_like(ends)
    np.add(kept_ends, rows * width + number, out=sentinels[:, :spans])
    np.add(noise_starts, rows * width + number + spans, out=sentinels[:, spans:])
    result.reshape(-1)[sentinels] = np.tile(first_sentinel - number, 2)
    return result[:, : kept + spans], result[:, kept + spans :]


def prefix_lengths(tokens: int, draws: np.ndarray) -> np.ndarray:
    """Length of the prefix of `tokens` tokens, uniform in 1 .. tokens-1 (0 for a single token), int64 [n]."""
    if tokens < 2:
        return np.zeros(len(draws), np.int64)
    return 1 + (draws % np.uint64(tokens - 1)).astype(np.int64)
