"""What training is told by its ranks."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from openmoe.parallel.ranks import SentNumbers, ShardedRanks, sum_of_squares
from openmoe.parallel.spmd import XlaRanks


def test_norm_of_a_large_tensor() -> None:
    """Catches squares added up one after the other in float32: at this size 1 in 5,000 is lost."""
    x = torch.full((10_000_003,), 0.1)
    exact = x[0].double().square().item() * len(x)
    assert sum_of_squares([x[:17], x[17:], x[:0]]).item() == pytest.approx(exact, rel=1e-6)


def test_numbers_of_several_processes() -> None:
    """Bugs: a rank's own numbers added to another's, or those of one kind taken for those of another; values
    that all ranks have already summed as often as there are ranks."""
    vectors: list[Tensor] = []

    def rank_of(rank: int) -> ShardedRanks:
        world = SimpleNamespace(sum_=lambda x: (vectors.append(x.clone()), x.copy_(sum(vectors))))
        ranks = ShardedRanks.__new__(ShardedRanks)
        ranks.rank, ranks.world_size, ranks.groups = rank, 3, {"world": world}  # type: ignore[dict-item]
        return ranks

    def send(rank: int, step: int) -> SentNumbers:
        terms = torch.tensor([1.0, 10.0], dtype=torch.float64) * (rank + 1) * step
        return rank_of(rank).send_numbers(terms, torch.full((1,), 7.0 * step).double(), (rank + 0.5, -step))

    sent = []
    for step in (1, 2):  # the last rank has the sum of what came before
        vectors.clear()
        sent.append([send(rank, step) for rank in range(3)][-1])
    for step, (row, own) in enumerate(rank_of(2).read_numbers(sent), start=1):
        assert row.tolist() == [6.0 * step, 60.0 * step, 7.0 * step]
        assert own.tolist() == [[0.5, -step], [1.5, -step], [2.5, -step]]


def test_numbers_of_several_hosts() -> None:
    """Bugs: under XLA, where sums are global on every host, they are added up once more; a host's own numbers
    stand for another host, or for another step."""
    vectors: list[Tensor] = []
    hosts = SimpleNamespace(sum_=lambda x: (vectors.append(x.clone()), x.copy_(sum(vectors))))
    for host in range(3):  # the last one has the sum of what came before
        ranks = XlaRanks.__new__(XlaRanks)
        ranks.rank, ranks.world_size, ranks._hosts = host, 3, hosts  # type: ignore[assignment]
        ranks._run = lambda _: None  # type: ignore[method-assign]
        sums, same = torch.tensor([6.0, 60.0]).double(), torch.tensor([7.0]).double()
        sent = [ranks.send_numbers(step * sums, step * same, (host + 0.5, -step)) for step in (1, 2)]
        read = ranks.read_numbers(sent)
    for step, (row, own) in enumerate(read, start=1):
        assert row.tolist() == [6.0 * step, 60.0 * step, 7.0 * step]
        assert own.tolist() == [[0.5, -step], [1.5, -step], [2.5, -step]]
