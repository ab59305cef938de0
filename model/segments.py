"""Segments of long rows, cut apart for attention.

A row of 32,768 positions holds some 20 examples, and a mask over it has 2^30 elements, nearly all False. In
tiles of one example each attention is plain causal, and costs as much as it would in short rows. Everything
but attention sees the rows as they are.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class SegmentTiles:
    """Which position of the rows lies where in the tiles: two partial permutations, each other's inverse.

    A tile may be empty, so their number can be kept constant where a compiler asks for it.
    """

    positions: Tensor  # [segments, longest] int64 into the flattened rows, -1 behind a segment's end
    slots: Tensor  # [rows, seq_len] int64 into the flattened tiles, -1 = padding

    def cut(self, x: Tensor) -> Tensor:
        """x `[rows, seq_len, d]` -> `[segments, longest, d]`, zero behind a segment's end."""
        return _Take.apply(x, self.positions, self.slots)

    def join(self, tiles: Tensor) -> Tensor:
        """tiles `[segments, longest, d]` -> `[rows, seq_len, d]`, zero at padding."""
        return _Take.apply(tiles, self.slots, self.positions)


class _Take(torch.autograd.Function):
    """x[index], zero where index is -1. No element is taken twice, so the gradient is a gather too, by the
    inverse; autograd's scatter-add would have no fixed order on GPUs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(index, inverse)
        return _take(x, index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        _, inverse = ctx.saved_tensors
        return _take(grad, inverse), None, None


def _take(x: Tensor, index: Tensor) -> Tensor:
    flat = index.flatten()
    taken = x.flatten(0, 1).index_select(0, flat.clamp(min=0))
    return taken.masked_fill_((flat < 0)[:, None], 0).unflatten(0, index.shape)


def tile_index(segment_ids: np.ndarray, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """`positions` and `slots` of SegmentTiles, on the host; at least one tile.

    Args:
        segment_ids: `[rows, seq_len]`, equal and above 0 over each segment, 0 = padding.
        longest: width of a tile, the most positions a segment may take.

    Raises:
        ValueError: a segment is longer.
    """
    changes = np.ones(segment_ids.shape, bool)
    changes[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
    start = np.flatnonzero(changes)
    length = np.diff(start, append=segment_ids.size)
    real = segment_ids.reshape(-1)[start] > 0
    start, length = start[real], length[real]
    if not real.any():
        start, length = np.zeros((2, 1), int)
    if length.max() > longest:
        row = start[length.argmax()] // segment_ids.shape[1]
        raise ValueError(f"row {row}: a segment of {length.max()} positions; allowed: at most {longest}")
    column = np.arange(longest)
    inside = column < length[:, None]
    positions = np.where(inside, start[:, None] + column, -1)
    slots = np.full(segment_ids.shape, -1)
    slots.reshape(-1)[positions[inside]] = np.flatnonzero(inside)
    return positions, slots
