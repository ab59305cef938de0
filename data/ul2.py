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
    where the EOS doesn't fit then. Targets that would be longer than that cost one token at density 0.5, as in
    T5, and as many as it takes at higher densities, which T5 doesn't provide for.
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


def span_ends(length: int, noise: int, spans: int, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the kept runs and the noise runs end, each counted in its own tokens: two int64 [n, spans].

    An example is kept run 0, noise run 0, kept run 1, ..., and ends with a noise run. All ways to cut
    `length - noise` kept tokens into `spans` runs, and `noise` tokens into as many, are equally likely.
    `draws` is uint64 [n], a random word for each example.
    """
    return _composition_ends(length - noise, spans, draws), _composition_ends(noise, spans, mix_bits(draws))


def _composition_ends(total: int, parts: int, draws: np.ndarray) -> np.ndarray:
    """Partial sums of `total` as a sum of `parts` positive integers, all ways alike; int64 [n, parts]."""
    ends = np.empty((len(draws), parts), np.int64)
    ends[:, -1:] = total
    if parts < 2:
        return ends
    # Each of the total - 1 places between tokens gets a random word; the lowest parts - 1 are cut.
    words = random_words(draws, total - 1)
    highest = np.partition(words, parts - 2, axis=1)[:, parts - 2, np.newaxis]
    cut = words <= highest
    places = np.flatnonzero(cut)
    if places.size > len(draws) * (parts - 1):
        # Equal words at the border: those examples are drawn anew, which keeps all ways alike.
        tied = np.count_nonzero(cut, axis=1) > parts - 1
        ends[tied] = _composition_ends(total, parts, mix_bits(~draws[tied]))
        ends[~tied] = _composition_ends(total, parts, draws[~tied])
        return ends
    rows = np.arange(len(draws))[:, np.newaxis]
    ends[:, :-1] = places.reshape(len(draws), parts - 1) - rows * (total - 1) + 1
    return ends


def corrupt_spans(
    tokens: np.ndarray, kept_ends: np.ndarray, noise_ends: np.ndarray, first_sentinel: int
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (each noise run replaced by a sentinel) and targets (each kept run replaced by one).

    `tokens` int32 [n, length], the runs as `span_ends` returns them; sentinels count down from
    `first_sentinel`. Returns int32 [n, kept + spans] and [n, noise + spans].
    """
    examples, length = tokens.shape
    spans = kept_ends.shape[1]
    if spans == 0:
        # A single token: T5 makes two of it, kept and noise, and cuts off what is beyond the first.
        return tokens, np.full((examples, 1), first_sentinel, np.int32)
    kept = int(kept_ends[0, -1])
    width = length + 2 * spans
    # Inputs and targets side by side are 2 * spans pieces: a kept run with the sentinel after it, or a noise
    # run with the sentinel before it. In each piece the token's place is the column plus a fixed shift; the
    # sentinel reads a neighbour first and is written over.
    number = np.arange(spans)
    noise_before = np.zeros_like(noise_ends)
    noise_before[:, 1:] = noise_ends[:, :-1]
    pieces = np.empty((examples, 2 * spans), np.int64)
    pieces[:, :spans] = kept_ends
    pieces[:, 1:spans] -= kept_ends[:, :-1]
    pieces[:, spans:] = noise_ends - noise_before
    pieces += 1
    shifts = np.empty((examples, 2 * spans), np.int64)
    shifts[:, :spans] = noise_before - number
    shifts[:, spans:] = kept_ends - (number + 1 + kept + spans)
    shifts += np.arange(0, examples * length, length)[:, np.newaxis]
    places = np.repeat(shifts.reshape(-1), pieces.reshape(-1)).reshape(examples, width)
    places += np.arange(width)
    result = tokens.reshape(-1).take(places)
    sentinels = np.empty((examples, 2 * spans), np.int64)
    sentinels[:, :spans] = kept_ends + number
    sentinels[:, spans:] = noise_before + (number + kept + spans)
    sentinels += np.arange(0, examples * width, width)[:, np.newaxis]
    result.reshape(-1)[sentinels] = np.tile(first_sentinel - number.astype(np.int32), 2)
    return result[:, : kept + spans], result[:, kept + spans :]


def prefix_lengths(tokens: int, draws: np.ndarray) -> np.ndarray:
    """Length of the prefix of `tokens` tokens, uniform in 1 .. tokens-1 (0 for a single token), int64 [n]."""
    if tokens < 2:
        return np.zeros(len(draws), np.int64)
    return 1 + (draws % np.uint64(tokens - 1)).astype(np.int64)
