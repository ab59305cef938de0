"""The stream of one source: order, chunks, positions."""

import numpy as np
import pytest

from openmoe.data.rng import IndexPermutation, random_key
from openmoe.data.shards import TokenShard
from openmoe.data.sources import START, Position, TokenSource


def shard(lengths: list[int]) -> TokenShard:
    """Documents whose tokens tell where they come from: 1000 * document + place + 10."""
    tokens = [1000 * d + i + 10 for d, length in enumerate(lengths) for i in range(length)]
    return TokenShard(np.array(tokens, np.int32), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 1000, 4097])
def test_a_permutation_has_every_index_once(size: int) -> None:
    """Catches documents that an epoch leaves out or repeats."""
    permutation = IndexPermutation(size, 1, "a", 0)
    assert sorted(permutation(np.arange(size)).tolist()) == list(range(size))
    some = np.arange(0, size, 3)
    np.testing.assert_array_equal(permutation(some), permutation(np.arange(size))[some])


def test_permutations_differ_by_seed_source_and_epoch_and_are_spread() -> None:
    """Catches the same order in each epoch, and an order close to the original one."""
    ranks = np.arange(1000)
    orders = [
        IndexPermutation(1000, *parts)(ranks)
        for parts in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1))
    ]
    for i, one in enumerate(orders):
        assert abs(np.corrcoef(ranks, one)[0, 1]) < 0.12
        for other in orders[i + 1 :]:
            assert np.mean(one == other) < 0.01


def test_the_random_stream_is_pinned() -> None:
    """Catches a change of numpy or of ours that would silently give every run other data."""
    key = random_key("example", 0, "manual", 3)
    assert key.first == 13907936989493424212
    assert key.bits(3).tolist() == [
        13649151042023484696,
        5277694357008411719,
        15090587270405423657,
    ]


@pytest.mark.parametrize("join_eos", [False, True])
def test_an_epoch_holds_every_document_once(join_eos: bool) -> None:
    """Catches lost or doubled tokens at document, block and epoch borders."""
    lengths = [3, 1, 7, 2, 5] * 500
    source = TokenSource("a", shard(lengths), seed=4, chunk_tokens=None)
    total = sum(lengths) + join_eos * len(lengths)
    assert source.epoch_tokens(join_eos) == total
    tokens = source.read(START, total, join_eos)
    assert (tokens != source.read(Position(1, 0, 0), total, join_eos)).mean() > 0.9
    assert source.skip(START, total, join_eos) == Position(1, 0, 0)
    assert sorted(tokens[tokens != 1].tolist()) == sorted(shard(lengths).tokens.tolist())
    assert (tokens == 1).sum() == join_eos * len(lengths)
    if join_eos:
        ends = np.flatnonzero(tokens == 1)
        assert all(len({t // 1000 for t in part[part != 1]}) == 1 for part in np.split(tokens, ends + 1)[:-1])


@pytest.mark.parametrize("join_eos", [False, True])
def test_reading_in_steps_is_reading_at_once(join_eos: bool) -> None:
    """Catches positions that don't tell exactly where the next read starts."""
    source = TokenSource("a", shard([3, 1, 7, 2, 900]), seed=4, chunk_tokens=50)
    at_once = source.read(START, 1000, join_eos)
    position, parts = START, []
    sizes = [1, 2, 3, 5, 8, 13, 21, 34, 55, 89] * 10
    for size in sizes:
        parts.append(source.read(position, size, join_eos))
        position = source.skip(position, size, join_eos)
    joined = np.concatenate(parts)[:1000]
    np.testing.assert_array_equal(joined, at_once)


def test_a_switch_of_joining_keeps_the_place() -> None:
    """Catches text repeated or skipped where a phase without EOS gives way to one with it, at any place."""
    source = TokenSource("a", shard([3, 4, 5]), seed=0, chunk_tokens=None)
    text = source.read(START, 24, False)
    for cut in range(1, 13):
        after = source.read(source.skip(START, cut, False), 14, True)
        np.testing.assert_array_equal(after[after != 1], text[cut : cut + (after != 1).sum()])
    joined = source.read(START, 24, True)
    for cut in range(1, 15):
        # An EOS not yet read is left out, and nothing else is.
        used = (joined[:cut] != 1).sum()
        after = source.read(source.skip(START, cut, True), 9, False)
        np.testing.assert_array_equal(after, text[used : used + 9])


def test_long_documents_give_one_aligned_chunk_an_epoch() -> None:
    """Catches chunks that are not aligned, too long, or the same in every epoch."""
    source = TokenSource("a", shard([105]), seed=0, chunk_tokens=20)
    position, seen = START, set()
    for epoch in range(60):
        start = int(source.read(position, 1, False)[0]) - 10
        assert start % 20 == 0
        seen.add(start)
        length = 5 if start == 100 else 20
        position = source.skip(position, length, False)
        assert position == Position(epoch + 1, 0, 0)
    assert seen == {0, 20, 40, 60, 80, 100}
