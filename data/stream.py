"""The endless text of one source, addressed by token number: document after document, epoch after epoch.

Which token stands where is a pure function of (seed, source, number). Documents are shuffled in two steps:
blocks of 1024 neighbours are put into a random order, 64 of them make a window, and the documents of a window
are put into a random order again. So 65,536 documents from 64 random places are mixed, and yet any token is
found in bounded time, from the number of tokens in each block: some 50 bytes of memory for 1024 documents.

A source to which text was added has several parts. Every epoch goes through them in the order they came, each
shuffled in itself: what was read before text was added would be read again in the same order.

Of a document longer than `chunk_tokens` an epoch shows one piece of that size, another one each time, as in
the released pre-processing (facts 5.3, 5.5); its last piece is moved back to be as long as the others, so
that every epoch has the same number of tokens.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from openmoe.data.rng import IndexPermutation, mix_bits, random_key
from openmoe.data.shards import BLOCK_DOCUMENTS, Part
from openmoe.data.tokenizer import EOS

WINDOW_BLOCKS = 64


class Position(NamedTuple):
    """A place in a source that doesn't depend on whether documents are joined with EOS."""

    epoch: int
    # Of the document, in the epoch's order; at an epoch's end, the number of documents.
    document: int
    # Tokens of its piece already read; its length where only the EOS is left.
    offset: int


class _Blocks(NamedTuple):
    """The blocks of one part; every array int64 [blocks]."""

    shard: np.ndarray
    first_document: np.ndarray
    documents: np.ndarray
    tokens: np.ndarray


class _Epoch(NamedTuple):
    """The windows of one epoch."""

    # The part each window lies in, and its blocks as places in the part's order, from .. to.
    part: np.ndarray
    first_block: np.ndarray
    past_block: np.ndarray
    # Block numbers in this epoch's order, for each part.
    orders: list[np.ndarray]
    # Before each window and after the last, int64 [windows + 1]: documents, and tokens without and with EOS.
    documents: np.ndarray
    tokens: tuple[np.ndarray, np.ndarray]


class _Window(NamedTuple):
    """The documents of one window in their order; arrays int64 [documents]."""

    shard: np.ndarray
    # First token in the shard.
    start: np.ndarray
    # Of the piece that is read.
    length: np.ndarray
    # Tokens up to the end of each document, without and with an EOS after each.
    ends: tuple[np.ndarray, np.ndarray]


class TokenStream:
    """Reads tokens by number. Safe to share between threads."""

    def __init__(self, name: str, parts: Sequence[Part], seed: int, chunk_tokens: int | None) -> None:
        """`chunk_tokens` None uses documents whole. At least one part must hold a document."""
        self.name = name
        self._parts = parts
        self._seed = seed
        self._chunk_tokens = chunk_tokens
        self._blocks = [_count_blocks(part, chunk_tokens) for part in parts]
        self._documents = sum(int(blocks.documents.sum()) for blocks in self._blocks)
        self._tokens = sum(int(blocks.tokens.sum()) for blocks in self._blocks)
        # Threads share the caches: at worst two of them work out the same entry.
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._window = lru_cache(maxsize=3)(self._make_window)
        # A window of a source with many shards reads from up to 64 of them.
        self._shard_tokens = lru_cache(maxsize=WINDOW_BLOCKS)(lambda p, s: self._parts[p][s].map_tokens())
        self._shard_offsets = lru_cache(maxsize=4)(lambda p, s: self._parts[p][s].map_offsets())

    def epoch_tokens(self, join_eos: bool) -> int:
        """Tokens of one epoch; `join_eos` counts an EOS after each document."""
        return self._tokens + join_eos * self._documents

    def read(self, start: int, count: int, join_eos: bool) -> np.ndarray:
        """`count` tokens from number `start` on, int32; `join_eos` puts an EOS after each document."""
        pieces: list[np.ndarray] = []
        eos = np.full(1, EOS, np.int32)
        while count:
            epoch, number, inside = self._find(start, join_eos)
            part = int(self._epoch(epoch).part[number])
            window = self._window(epoch, number)
            ends = window.ends[join_eos]
            taken = min(count, int(ends[-1]) - inside)
            first = int(np.searchsorted(ends, inside, "right"))
            past = int(np.searchsorted(ends, inside + taken, "left")) + 1
            skipped, left = inside - _before(window, first, join_eos), taken
            for shard, place, length in zip(
                window.shard[first:past].tolist(),
                window.start[first:past].tolist(),
                window.length[first:past].tolist(),
                strict=True,
            ):
                used = min(length - skipped, left)
                pieces.append(self._shard_tokens(part, shard)[place + skipped : place + skipped + used])
                left -= used
                if join_eos and left:
                    pieces.append(eos)
                    left -= 1
                skipped = 0
            start += taken
            count -= taken
        return np.concatenate(pieces) if pieces else np.empty(0, np.int32)

    def position(self, number: int, join_eos: bool) -> Position:
        """The place of token `number`.

        Where an epoch ends and the next begins it is the end: text that is added later comes first.
        """
        if number and number % self.epoch_tokens(join_eos) == 0:
            return Position(number // self.epoch_tokens(join_eos) - 1, self._documents, 0)
        epoch, window_number, inside = self._find(number, join_eos)
        window = self._window(epoch, window_number)
        document = int(np.searchsorted(window.ends[join_eos], inside, "right"))
        earlier = int(self._epoch(epoch).documents[window_number])
        return Position(epoch, earlier + document, inside - _before(window, document, join_eos))

    def number(self, position: Position, join_eos: bool) -> int:
        """The token number of a place: the inverse of `position`."""
        if position.document == self._documents:
            return (position.epoch + 1) * self.epoch_tokens(join_eos)
        windows = self._epoch(position.epoch)
        number = int(np.searchsorted(windows.documents, position.document, "right")) - 1
        document = position.document - int(windows.documents[number])
        before = int(windows.tokens[join_eos][number])
        before += _before(self._window(position.epoch, number), document, join_eos)
        return position.epoch * self.epoch_tokens(join_eos) + before + position.offset

    def _find(self, number: int, join_eos: bool) -> tuple[int, int, int]:
        """Epoch, window, and the number inside the window."""
        epoch, inside = divmod(number, self.epoch_tokens(join_eos))
        firsts = self._epoch(epoch).tokens[join_eos]
        window = int(np.searchsorted(firsts, inside, "right")) - 1
        return epoch, window, inside - int(firsts[window])

    def _make_epoch(self, epoch: int) -> _Epoch:
        orders, parts, firsts, pasts = [], [], [], []
        documents, tokens = [np.zeros(1, np.int64)], [np.zeros(1, np.int64)]
        for index, blocks in enumerate(self._blocks):
            count = len(blocks.tokens)
            order = np.empty(0, np.int64)
            if count:
                permutation = IndexPermutation(count, self._seed, self.name, "blocks", index, epoch)
                order = permutation(np.arange(count))
                first = np.arange(0, count, WINDOW_BLOCKS)
                parts.append(np.full(len(first), index))
                firsts.append(first)
                pasts.append(np.minimum(first + WINDOW_BLOCKS, count))
                documents.append(np.add.reduceat(blocks.documents[order], first))
                tokens.append(np.add.reduceat(blocks.tokens[order], first))
            orders.append(order)
        part, first_block, past_block = map(np.concatenate, (parts, firsts, pasts))
        before_documents, before_tokens = (np.cumsum(np.concatenate(a)) for a in (documents, tokens))
        both = (before_tokens, before_tokens + before_documents)
        return _Epoch(part, first_block, past_block, orders, before_documents, both)

    def _make_window(self, epoch: int, number: int) -> _Window:
        windows = self._epoch(epoch)
        part = int(windows.part[number])
        blocks = self._blocks[part]
        shards, starts, lengths, names = [], [], [], []
        chosen = windows.orders[part][windows.first_block[number] : windows.past_block[number]]
        # In the order of storage, so that neighbouring blocks open their shard once.
        for block in np.sort(chosen).tolist():
            shard, first = int(blocks.shard[block]), int(blocks.first_document[block])
            documents = int(blocks.documents[block])
            offsets = np.array(self._shard_offsets(part, shard)[first : first + documents + 1])
            shards.append(np.full(documents, shard))
            starts.append(offsets[:-1])
            lengths.append(np.diff(offsets))
            names.append(np.uint64(block * BLOCK_DOCUMENTS) + np.arange(documents, dtype=np.uint64))
        shard_of, start, length, name = (
            np.concatenate(arrays) for arrays in (shards, starts, lengths, names)
        )
        key = random_key("documents", self._seed, self.name, part, epoch)
        if self._chunk_tokens is not None:
            pieces = -(-length // self._chunk_tokens)
            drawn = mix_bits(name ^ np.uint64(key.first)) % pieces.astype(np.uint64)
            kept = np.minimum(length, self._chunk_tokens)
            start = start + np.minimum(drawn.astype(np.int64) * self._chunk_tokens, length - kept)
            length = kept
        order = np.argsort(mix_bits(name ^ np.uint64(key.second)), kind="stable")
        ends = np.cumsum(length[order])
        return _Window(
            shard_of[order], start[order], length[order], (ends, ends + np.arange(1, len(ends) + 1))
        )


def _before(window: _Window, document: int, join_eos: bool) -> int:
    """Tokens of the window before `document`."""
    return int(window.ends[join_eos][document] - window.length[document]) - join_eos


def _count_blocks(part: Part, chunk_tokens: int | None) -> _Blocks:
    shards, firsts, documents, tokens = [], [], [], []
    for index, shard in enumerate(part):
        if not shard.documents:
            continue
        first = np.arange(0, shard.documents, BLOCK_DOCUMENTS)
        shards.append(np.full(len(first), index))
        firsts.append(first)
        documents.append(np.minimum(BLOCK_DOCUMENTS, shard.documents - first))
        block_tokens, longest = np.array(shard.map_blocks()).T
        if chunk_tokens is not None:
            offsets = shard.map_offsets()
            for block in np.flatnonzero(longest > chunk_tokens).tolist():
                lengths = np.diff(offsets[block * BLOCK_DOCUMENTS : (block + 1) * BLOCK_DOCUMENTS + 1])
                block_tokens[block] = np.minimum(lengths, chunk_tokens).sum()
        tokens.append(block_tokens)
    none = [np.empty(0, np.int64)]
    return _Blocks(*(np.concatenate(arrays or none) for arrays in (shards, firsts, documents, tokens)))
