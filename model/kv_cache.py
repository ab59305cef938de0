"""Keys and values of the tokens that rows hold already, so that a new token costs one token.

Rows lie at the left, each as long as it is: padding is only ever behind a row's tokens, where a causal mask
hides it, and the next tokens of the row take its place. A key is rotated by its position in its own row.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from openmoe.model.config import ModelConfig
from openmoe.model.layers import rotary_table


class Columns(NamedTuple):
    """Where the new tokens of all rows come to lie, and which keys they see."""

    position: Tensor  # [rows, new] int64, of each token in its row
    keys: int  # positions in use by then, of the longest row
    rotary: tuple[Tensor, Tensor]  # cos and sin, each [rows, 1, new, head_dim / 2]
    real: Tensor  # [rows, new] bool, False = padding
    mask: Tensor | None  # [rows, 1, new, keys] bool; None = plain causal


class KVCache:
    """Room for `rows` rows of `max_tokens` tokens.

    Args:
        like: gives dtype and device of the activations.
        layers: of which something is kept; None = all.
    """

    def __init__(
        self, config: ModelConfig, rows: int, max_tokens: int, like: Tensor, layers: int | None = None
    ) -> None:
        shape = (
            config.n_layers if layers is None else layers,
            rows,
            config.n_heads,
            max_tokens,
            config.head_dim,
        )
        # Not empty: a masked key has weight zero, and zero times what memory held may be NaN.
        self.keys = like.new_zeros(shape)
        self.values = like.new_zeros(shape)
        self.rotary = rotary_table(max_tokens, config.head_dim, config.rope_base, like)
        self.lengths = [0] * rows  # tokens that each row holds

    def columns(self, counts: Sequence[int], prefix: Sequence[int] | None) -> Columns:
        """For `counts` new tokens of each row, padded to the largest count: all of that needs room.

        `prefix` makes the first so many positions of each row see each other; all of them must be new.

        Raises ValueError where the tokens don't fit, or where a prefix is not new.
        """
        held, new = max(self.lengths), max(counts)
        if held + new > self.keys.shape[3]:
            raise ValueError(f"{new} tokens behind {held}: the cache has room for {self.keys.shape[3]}")
        if prefix is not None and held:
            raise ValueError("a prefix that sees itself must come in one piece, as the first tokens of a row")
        device = self.keys.device
        step = torch.arange(new, device=device)
        position = torch.tensor(self.lengths, device=device)[:, None] + step
        cos, sin = (table[position][:, None] for table in self.rotary)
        real = step < torch.tensor(counts, device=device)[:, None]
        mask = None
        if held or prefix is not None:
            key = torch.arange(held + new, device=device)
            mask = key <= position[..., None]  # what a shorter row does not use lies behind all its queries
            if prefix is not None:
                ends = torch.tensor(prefix, device=device)[:, None, None]
                mask = mask | ((position[..., None] < ends) & (key < ends))
            mask = mask[:, None]
        return Columns(position, held + new, (cos, sin), real, mask)

    def append(self, layer: int, at: Columns, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k and v `[rows, heads, new, head_dim]` of one layer, padding included -> all that it holds by then,
        `[rows, heads, keys, head_dim]`."""
        row = torch.arange(len(k), device=k.device)[:, None]
        for stored, fresh in ((self.keys[layer], k), (self.values[layer], v)):
            stored.transpose(1, 2)[row, at.position] = fresh.transpose(1, 2)
        return self.keys[layer, :, :, : at.keys], self.values[layer, :, :, : at.keys]

    def advance(self, counts: Sequence[int]) -> None:
        """Once all layers have taken in the new tokens: the first `counts` of each row are real."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts, strict=True)]

    def keep(self, rows: Sequence[int]) -> None:
        """Goes on with these rows only, in this order. The memory stays."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.keys.device)
        used = max((self.lengths[row] for row in rows), default=0)
        for stored in (self.keys, self.values):
            for layer in stored:  # one at a time: the copy that is made on the way is small
                layer[: len(rows), :, :used] = layer[index, :, :used]
        self.keys, self.values = self.keys[:, : len(rows)], self.values[:, : len(rows)]
        self.lengths = [self.lengths[row] for row in rows]


class OnePass(KVCache):
    """For rows that come whole and are not continued: keys and values are used and forgotten."""

    def __init__(self, config: ModelConfig, rows: int, max_tokens: int, like: Tensor) -> None:
        super().__init__(config, rows, max_tokens, like, layers=0)

    def append(self, layer: int, at: Columns, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return k, v
