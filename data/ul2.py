"""UL2: the six denoisers of the paper's Table 2 (Tay et al. 2022), as in the released pre-processing.

Sizes, rounding and the form of the masks equal T5's `random_spans_*` functions to the integer; only the
random bits are ours. Facts 5.3.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from openmoe.data.rng import RandomKey
from openmoe.data.tokenizer import EOS


class Denoiser(NamedTuple):
    """One row of Table 2. `mean_span` None is the prefix language model."""

    mode: str
    mean_span: float | None
    density: float
    rate: float


DENOISERS = (
    Denoiser("[NLU] ", 3.0, 0.15, 0.1),
    Denoiser("[NLU] ", 8.0, 0.15, 0.1),
    Denoiser("[NLG] ", 3.0, 0.5, 0.1),
    Denoiser("[NLG] ", 8.0, 0.5, 0.1),
    Denoiser("[NLG] ", 64.0, 0.5, 0.1),
    Denoiser("[S2S] ", None, 0.0, 0.5),
)


def random_spans_helper(inputs_length: int, mean_span: float, density: float) -> tuple[int, int]:
    """Raw tokens that fill `inputs_length` after corruption, EOS included, and the length of their targets.

    Counts one sentinel per span and one EOS on either side.
    """

    def lengths(tokens: int) -> tuple[int, int]:
        noise = round(tokens * density)
        spans = round(noise / mean_span)
        return tokens - noise + spans + 1, noise + spans + 1

    tokens = inputs_length
    while lengths(tokens + 1)[0] <= inputs_length:
        tokens += 1
    targets_length = lengths(tokens)[1]
    # At density 0.5 the targets may come out one longer than the inputs: T5 drops one token instead.
    if density == 0.5 and targets_length > inputs_length:
        return tokens - 1, targets_length - 1
    return tokens, targets_length


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


def _random_composition(total: int, parts: int, bits: np.ndarray) -> np.ndarray:
    """`total` as a sum of `parts` positive integers, all ways alike; `bits` is uint64 [total - 1]."""
    cuts = np.argpartition(bits, parts - 2)[: parts - 1] if parts > 1 else np.empty(0, np.int64)
    edges = np.empty(parts + 1, np.int64)
    edges[0], edges[-1] = 0, total
    edges[1:-1] = np.sort(cuts) + 1
    return np.diff(edges)


def random_spans_noise_mask(length: int, mean_span: float, density: float, key: RandomKey) -> np.ndarray:
    """Which tokens are noise, bool [length]; starts with a kept span, ends with a noise span, alternating."""
    noise, spans = noise_counts(length, mean_span, density)
    if spans == 0:
        return np.zeros(length, np.bool_)
    bits = key.bits(length - 2)
    span_lengths = np.empty(2 * spans, np.int64)
    span_lengths[0::2] = _random_composition(length - noise, spans, bits[noise - 1 :])
    span_lengths[1::2] = _random_composition(noise, spans, bits[: noise - 1])
    return np.repeat(np.arange(2 * spans) % 2 == 1, span_lengths)


def noise_span_to_unique_sentinel(tokens: np.ndarray, noise: np.ndarray, first_sentinel: int) -> np.ndarray:
    """Replace each run of noise by one sentinel, the first by `first_sentinel`, then counting down.

    `tokens` [n] and `noise` bool [n] -> int32 [kept + spans]. With `~noise` it yields the targets.
    """
    starts = noise.copy()
    starts[1:] &= ~noise[:-1]
    result = tokens.astype(np.int32)
    places = np.flatnonzero(starts)
    result[places] = first_sentinel - np.arange(places.size, dtype=np.int32)
    return result[starts | ~noise]


def span_corruption(
    tokens: np.ndarray, noise: np.ndarray, first_sentinel: int
) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (noise replaced by sentinels) and targets (the rest replaced by sentinels), both int32."""
    return (
        noise_span_to_unique_sentinel(tokens, noise, first_sentinel),
        noise_span_to_unique_sentinel(tokens, ~noise, first_sentinel),
    )


def prefix_length(tokens: int, key: RandomKey) -> int:
    """Length of the prefix of `tokens` tokens, uniform in 1 .. tokens-1 (0 for a single token)."""
    return 1 + key.second % (tokens - 1) if tokens > 1 else 0


def append_eos_after_trim(tokens: np.ndarray, length: int) -> np.ndarray:
    """The first `length - 1` tokens, then EOS: what is cut lies before the EOS, never the EOS itself."""
    kept = tokens[: length - 1]
    return np.append(kept, np.int32(EOS)).astype(np.int32, copy=False)


def draw_denoiser(key: RandomKey) -> int:
    """Index into DENOISERS, drawn at their rates."""
    place = key.first / 2**64
    for index, denoiser in enumerate(DENOISERS):
        place -= denoiser.rate
        if place < 0:
            return index
    return len(DENOISERS) - 1
