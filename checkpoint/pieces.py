"""The pieces that processes wrote of each tensor must be all of it, and nothing twice."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Piece:
    """A box of a tensor's elements: by dimension where it begins, and how long it is."""

    offsets: Sequence[int]
    sizes: Sequence[int]

    def __str__(self) -> str:
        ranges = (f"{start}:{start + size}" for start, size in zip(self.offsets, self.sizes, strict=True))
        return f"[{', '.join(ranges)}]"


def fault_in(shape: Sequence[int], pieces: Sequence[Piece]) -> str | None:
    """Why these pieces are not each element of a tensor of this shape exactly once; None where they are."""
    for piece in pieces:
        if len(piece.sizes) != len(shape) or any(
            start < 0 or start + size > whole
            for start, size, whole in zip(piece.offsets, piece.sizes, shape, strict=False)
        ):
            return f"piece {piece} lies outside of {list(shape)}"
    overlap = _overlap(pieces)
    if overlap:
        return f"pieces {overlap[0]} and {overlap[1]} overlap"
    # Boxes within the tensor that don't overlap fill it exactly if they are as large as it is.
    stored = sum(math.prod(piece.sizes) for piece in pieces)
    if not pieces or stored != math.prod(shape):
        return f"only {stored} of {math.prod(shape)} elements are there"
    return None


def _overlap(pieces: Sequence[Piece]) -> tuple[Piece, Piece] | None:
    if len(pieces) < 2:
        return None
    starts = np.array([piece.offsets for piece in pieces], np.int64)
    stops = starts + np.array([piece.sizes for piece in pieces], np.int64)
    meet = np.ones((len(pieces), len(pieces)), bool)
    for start, stop in zip(starts.T, stops.T, strict=True):
        meet &= np.maximum(start[:, None], start) < np.minimum(stop[:, None], stop)
    pairs = np.argwhere(np.triu(meet, 1))
    return (pieces[pairs[0][0]], pieces[pairs[0][1]]) if len(pairs) else None
