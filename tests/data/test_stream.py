"""The text of a source by token number: every document once an epoch, from anywhere, in bounded time."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from openmoe.data import stream
from openmoe.data.stream import TokenStream
from openmoe.data.tokenizer import EOS


@dataclass
class MemoryShard:
    """A shard whose tokens say where they are from."""

    lengths: np.ndarray
    first_token: int
    reads: int = 0

    @property
    def documents(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())

    def map_tokens(self) -> np.ndarray:
        return np.arange(self.first_token, self.first_token + self.tokens, dtype=np.int32)

    def map_offsets(self) -> np.ndarray:
        self.reads += 1
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)

    def map_blocks(self) -> np.ndarray:
        blocks = np.split(self.lengths, range(4, self.documents, 4))
        return np.array([[block.sum(), block.max()] for block in blocks])


LENGTHS = np.random.default_rng(0)
SHARDS = [MemoryShard(LENGTHS.integers(1, 30, n), 10_000 * (i + 1)) for i, n in enumerate((17, 5, 9))]
PARTS: Any = [(SHARDS[0], SHARDS[1]), (), (SHARDS[2],)]
ALL_TOKENS = np.sort(np.concatenate([shard.map_tokens() for shard in SHARDS]))


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several windows an epoch, and blocks cut short by the end of a shard."""
    monkeypatch.setattr(stream, "BLOCK_DOCUMENTS", 4)
    monkeypatch.setattr(stream, "WINDOW_BLOCKS", 2)


def make(seed: int = 3, chunk_tokens: int | None = None, parts: Any = PARTS) -> TokenStream:
    return TokenStream("source", parts, seed, chunk_tokens)


@pytest.mark.parametrize("join_eos", [False, True])
@pytest.mark.parametrize("chunk_tokens", [None, 7])
def test_any_stretch_is_part_of_the_whole(chunk_tokens: int | None, join_eos: bool) -> None:
    """Catches tokens skipped or doubled where a read begins or ends inside a document, window or epoch."""
    source = make(chunk_tokens=chunk_tokens)
    total = 3 * source.epoch_tokens(join_eos)
    whole = source.read(0, total, join_eos)
    assert len(whole) == total
    draw = np.random.default_rng(1)
    for start, stop in np.sort(draw.integers(0, total + 1, (300, 2))).tolist():
        np.testing.assert_array_equal(source.read(start, stop - start, join_eos), whole[start:stop])


@pytest.mark.parametrize("join_eos", [False, True])
def test_an_epoch_holds_every_document_once_and_whole(join_eos: bool) -> None:
    """Catches documents that never come, come twice or are cut; EOS missing, doubled or misplaced."""
    source = make()
    size = source.epoch_tokens(join_eos)
    assert size == len(ALL_TOKENS) + join_eos * sum(s.documents for s in SHARDS)
    for epoch in range(3):
        tokens = source.read(epoch * size, size, join_eos)
        np.testing.assert_array_equal(np.sort(tokens[tokens != EOS]), ALL_TOKENS)
        if join_eos:
            documents = np.split(tokens, np.flatnonzero(tokens == EOS) + 1)[:-1]
            expected = {tuple(d) for s in SHARDS for d in np.split(s.map_tokens(), s.map_offsets()[1:-1])}
            assert {tuple(d[:-1]) for d in documents} == expected


def test_order_differs_by_epoch_and_seed_and_is_mixed() -> None:
    """Catches documents or blocks in the order of storage, and a shuffle without seed or epoch."""
    size = make().epoch_tokens(False)
    first, second = make().read(0, size, False), make().read(size, size, False)
    other = make(seed=4).read(0, size, False)
    assert (first != second).any()
    assert (first != other).any()
    starts = {int(s.map_tokens()[o]) for s in SHARDS for o in s.map_offsets()[:-1]}
    mixed = shuffled = regrouped = 0
    for seed in range(10):
        orders = [make(seed).read(epoch * size, size, False).tolist() for epoch in (0, 1)]
        windows = [[token for token in order if token in starts][:8] for order in orders]
        mixed += len({token // 10_000 for token in windows[0]}) == 2  # blocks of both shards
        shuffled += windows[0] != sorted(windows[0])
        regrouped += set(windows[0]) != set(windows[1])
    assert mixed >= 3
    assert shuffled == 10
    assert regrouped >= 7
    np.testing.assert_array_equal(first, make().read(0, size, False))


@pytest.mark.parametrize("chunk_tokens", [None, 7])
def test_positions_and_numbers_are_inverse(chunk_tokens: int | None) -> None:
    """Catches text lost or read twice where a phase with EOS between documents follows one without."""
    source = make(chunk_tokens=chunk_tokens)
    for join_eos in (False, True):
        tokens = source.read(0, 2 * source.epoch_tokens(join_eos), join_eos)
        for number in range(len(tokens)):
            place = source.position(number, join_eos)
            assert source.number(place, join_eos) == number
            other = source.number(place, not join_eos)
            # What comes next is the same text; where only the EOS was left, the next document.
            ahead = tokens[number:][tokens[number:] != EOS][:5]
            there = source.read(other, 12, not join_eos)
            np.testing.assert_array_equal(there[there != EOS][: len(ahead)], ahead)


def test_a_long_document_shows_one_aligned_piece_of_full_size_an_epoch() -> None:
    """Catches chunks that are always the first, overlap by chance, or make epochs of different size."""
    source = make(parts=[(MemoryShard(np.array([23]), 100),)], chunk_tokens=7)
    assert source.epoch_tokens(False) == 7
    starts = {int(source.read(7 * epoch, 7, False)[0]) - 100 for epoch in range(200)}
    assert starts == {0, 7, 14, 16}  # the last of the four pieces is moved back to be whole
    for epoch in range(20):
        assert (np.diff(source.read(7 * epoch, 7, False)) == 1).all()


def test_appended_text_leaves_the_order_before_it() -> None:
    """Catches a source that is shuffled anew when text is added to it."""
    before, after = make(parts=PARTS[:1]), make(parts=PARTS)
    for join_eos in (False, True):
        size = before.epoch_tokens(join_eos)
        np.testing.assert_array_equal(before.read(0, size, join_eos), after.read(0, size, join_eos))
        second = before.read(size, size, join_eos)
        later = after.read(after.epoch_tokens(join_eos), size, join_eos)
        np.testing.assert_array_equal(second, later)


@pytest.mark.parametrize("join_eos", [False, True])
def test_text_added_at_the_end_of_an_epoch_comes_next(join_eos: bool) -> None:
    """Catches old text read again before the new, where a run had used up a source to its last token."""
    before, after = make(parts=PARTS[:1]), make(parts=PARTS)
    size = before.epoch_tokens(join_eos)
    for epoch in (1, 3):
        place = before.position(epoch * size, join_eos)
        assert before.number(place, join_eos) == epoch * size
        assert before.number(place, not join_eos) == epoch * before.epoch_tokens(not join_eos)
        new = after.read(after.number(place, join_eos), 5, join_eos)
        assert (new[new != EOS] >= SHARDS[2].first_token).all()


def test_a_place_far_on_touches_a_few_blocks_only() -> None:
    """Catches a seek that goes through all documents: offsets are mapped for the blocks of one window."""
    shards = [MemoryShard(np.full(8, 5), 1000 * i) for i in range(50)]
    source = make(parts=[tuple(shards)])
    assert not sum(shard.reads for shard in shards)  # nor does opening
    source.read(10**12, 3, True)
    assert 0 < sum(shard.reads for shard in shards) <= stream.WINDOW_BLOCKS
