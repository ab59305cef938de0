"""Randomness without order: every draw is a pure function of names and numbers, never of earlier draws.

A key is a hash of what it belongs to, e.g. (seed, source, epoch). Many words come from a key by counting and
scrambling (splitmix64): the same on every machine, whichever of them are asked for.
"""

import hashlib
import struct
from typing import NamedTuple

import numpy as np

# Step of splitmix64's counter.
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


class RandomKey(NamedTuple):
    """Four independent 64-bit words."""

    first: int
    second: int
    third: int
    fourth: int


def random_key(*parts: str | int) -> RandomKey:
    """The key that belongs to `parts`."""
    text = "\x1f".join(map(str, parts))
    return RandomKey(*struct.unpack("<4Q", hashlib.blake2b(text.encode(), digest_size=32).digest()))


def mix_bits(words: np.ndarray) -> np.ndarray:
    """Scramble uint64 words one by one (the finaliser of splitmix64, Steele et al. 2014)."""
    words = words + _GAMMA
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words


def random_words(seeds: np.ndarray, count: int) -> np.ndarray:
    """`count` random words for each seed; uint64 [n] -> uint32 [n, count].

    The halves of splitmix64's sequence from that seed, low half first.
    """
    steps = np.arange((count + 1) // 2, dtype=np.uint64) * _GAMMA
    words = mix_bits(seeds[:, np.newaxis] + steps)
    return words.astype("<u8", copy=False).view("<u4")[:, :count]


class IndexPermutation:
    """A random permutation of 0 .. size-1 that is computed where asked, without a table.

    A four-round Feistel network over the next power of four; results outside the range are put through
    again until they fall inside (cycle walking), which keeps it one-to-one.
    """

    def __init__(self, size: int, *parts: str | int) -> None:
        self.size = size
        self._half_bits = np.uint64(max(1, ((size - 1).bit_length() + 1) // 2))
        self._half_mask = np.uint64((1 << int(self._half_bits)) - 1)
        self._round_keys = np.array(random_key("permutation", *parts), dtype=np.uint64)

    def __call__(self, ranks: np.ndarray) -> np.ndarray:
        """The index at each rank; int64 [n] -> int64 [n]."""
        values = self._feistel(ranks.astype(np.uint64))
        outside = np.flatnonzero(values >= self.size)
        while outside.size:
            values[outside] = self._feistel(values[outside])
            outside = outside[values[outside] >= self.size]
        return values.astype(np.int64)

    def _feistel(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self._half_bits, values & self._half_mask
        for key in self._round_keys:
            left, right = right, left ^ (mix_bits(right ^ key) & self._half_mask)
        return (left << self._half_bits) | right
