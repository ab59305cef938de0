"""The endless stream of one source: documents in a random order, epoch after epoch, addressed by position.

Which token stands at which position is a pure function of (seed, source, position). In each epoch every
document contributes one chunk of at most `chunk_tokens`, cut at a multiple of that and chosen at random, as
in the released pre-processing (facts 5.3, 5.5): documents that are longer show another part in another epoch.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from openmoe.data.rng import IndexPermutation, mix_bits, random_key
from openmoe.data.shards import TokenShard
from openmoe.data.tokenizer import EOS

# Documents whose order and chunks are worked out at once.
_BLOCK_DOCUMENTS = 1024


class Position(NamedTuple):
    """A place in the stream."""

    epoch: int
    # Of the document, in the epoch's order.
    rank: int
    # Tokens of its chunk already used.
    offset: int


START = Position(0, 0, 0)

# A run of tokens of the shard, and whether an EOS follows it.
_Piece = tuple[int, int, bool]


class TokenSource:
    """Reads tokens at a position, and tells the position after them."""

    def __init__(self, name: str, shard: TokenShard, seed: int, chunk_tokens: int | None) -> None:
        """`chunk_tokens` None uses documents whole."""
        self.name = name
        self.documents = shard.documents
        self._shard = shard
        self._seed = seed
        self._chunk_tokens = chunk_tokens
        # Threads share it: at worst two of them work out the same block.
        self._block = lru_cache(maxsize=8)(self._make_block)

    def _make_block(self, epoch: int, index: int) -> tuple[list[int], list[int]]:
        """First and past-the-end token of the chunks at the ranks of one block."""
        first = index * _BLOCK_DOCUMENTS
        ranks = np.arange(first, min(first + _BLOCK_DOCUMENTS, self.documents))
        documents = IndexPermutation(self.documents, self._seed, self.name, epoch)(ranks)
        starts, stops = self._shard.offsets[documents], self._shard.offsets[documents + 1]
        if self._chunk_tokens is not None:
            chunks = -(-(stops - starts) // self._chunk_tokens)
            key = np.uint64(random_key("chunk", self._seed, self.name, epoch).first)
            draws = mix_bits(documents.astype(np.uint64) ^ key)
            starts = starts + (draws % chunks.astype(np.uint64)).astype(np.int64) * self._chunk_tokens
            stops = np.minimum(starts + self._chunk_tokens, stops)
        return starts.tolist(), stops.tolist()

    def _pieces(self, position: Position, count: int, join_eos: bool) -> tuple[list[_Piece], Position]:
        epoch, rank, offset = position
        pieces: list[_Piece] = []
        while count:
            starts, stops = self._block(epoch, rank // _BLOCK_DOCUMENTS)
            place = rank % _BLOCK_DOCUMENTS
            start, stop = starts[place] + offset, stops[place]
            available = stop - start + join_eos
            take = min(count, available)
            end = min(start + take, stop)
            pieces.append((start, end, end - start < take))
            count -= take
            offset += take
            if take == available:
                rank, offset = rank + 1, 0
                if rank == self.documents:
                    epoch, rank = epoch + 1, 0
        return pieces, Position(epoch, rank, offset)

    def skip(self, position: Position, count: int, join_eos: bool) -> Position:
        """The position `count` tokens on; `join_eos` counts an EOS after each document."""
        return self._pieces(position, count, join_eos)[1]

    def read(self, position: Position, count: int, join_eos: bool) -> np.ndarray:
        """`count` tokens from `position` on, int32; `join_eos` puts an EOS after each document."""
        tokens = np.empty(count, np.int32)
        filled = 0
        for start, end, eos_follows in self._pieces(position, count, join_eos)[0]:
            tokens[filled : filled + end - start] = self._shard.tokens[start:end]
            filled += end - start
            if eos_follows:
                tokens[filled] = EOS
                filled += 1
        return tokens

    def epoch_tokens(self, join_eos: bool) -> int:
        """Tokens of one epoch where documents are used whole."""
        return len(self._shard.tokens) + join_eos * self.documents
