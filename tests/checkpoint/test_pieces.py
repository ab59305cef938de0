"""What processes stored of a tensor, against what it is."""

import random

import pytest

from openmoe.checkpoint.pieces import Piece, fault_in


def cut(shape: list[int], rng: random.Random, cuts: int) -> list[Piece]:
    """Pieces of a tensor, cut in two again and again at a random place; some are empty."""
    pieces = [Piece([0] * len(shape), shape)]
    for _ in range(cuts):
        piece = pieces.pop(rng.randrange(len(pieces)))
        dim = rng.randrange(len(shape))
        at = rng.randint(0, piece.sizes[dim])
        for start, size in ((0, at), (at, piece.sizes[dim] - at)):
            offsets, sizes = list(piece.offsets), list(piece.sizes)
            offsets[dim] += start
            sizes[dim] = size
            pieces.append(Piece(offsets, sizes))
    rng.shuffle(pieces)
    return pieces


def elements(piece: Piece) -> int:
    count = 1
    for size in piece.sizes:
        count *= size
    return count


@pytest.mark.parametrize("seed", range(30))
def test_any_cutting_is_whole_and_any_change_of_it_is_not(seed: int) -> None:
    """A layout refused because its pieces are no grid; a piece that is missing, stored twice, or moved onto
    its neighbour so that the number of elements is right."""
    rng = random.Random(seed)
    shape = [rng.randint(1, 6) for _ in range(rng.randint(1, 3))]
    pieces = cut(shape, rng, rng.randint(0, 12))
    assert fault_in(shape, pieces) is None
    full = [number for number, piece in enumerate(pieces) if elements(piece)]
    number = rng.choice(full)
    rest = pieces[:number] + pieces[number + 1 :]
    assert "elements are there" in str(fault_in(shape, rest))
    assert "overlap" in str(fault_in(shape, [*pieces, pieces[number]]))
    for other in full:
        if pieces[other].sizes == pieces[number].sizes and other != number:
            assert "overlap" in str(fault_in(shape, [*rest, pieces[other]]))
    dim = rng.randrange(len(shape))
    for step in (-1, 1):
        moved = [at + step * (d == dim) for d, at in enumerate(pieces[number].offsets)]
        assert fault_in(shape, [*rest, Piece(moved, pieces[number].sizes)]) is not None


def test_tensors_without_dimensions_or_elements() -> None:
    """A count of steps or an empty tensor that is refused, or may be missing."""
    assert fault_in([], [Piece([], [])]) is None
    assert fault_in([], []) == "only 0 of 1 elements are there"
    assert "overlap" in str(fault_in([], [Piece([], []), Piece([], [])]))
    assert fault_in([0, 4], [Piece([0, 0], [0, 4])]) is None
    assert fault_in([0, 4], []) == "only 0 of 0 elements are there"
    assert fault_in([4], [Piece([0, 0], [4, 1])]) == "piece [0:4, 0:1] lies outside of [4]"
