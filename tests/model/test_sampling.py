"""What is drawn from, by hand for a vocabulary of four, and what is drawn."""

from typing import Any

import numpy as np
import pytest
import torch

from openmoe.model.sampling import SamplingConfig, choose, distribution, row_draws

PROBS = [0.4, 0.3, 0.2, 0.1]
CASES: list[tuple[dict[str, Any], list[float]]] = [
    ({}, PROBS),
    ({"temperature": 0.5}, [16 / 30, 9 / 30, 4 / 30, 1 / 30]),
    ({"temperature": 2.0}, [p**0.5 / sum(q**0.5 for q in PROBS) for p in PROBS]),
    ({"temperature": 1e-308}, [1, 0, 0, 0]),
    ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0]),
    ({"top_k": 1}, [1, 0, 0, 0]),
    ({"top_k": 9}, PROBS),
    ({"top_p": 0.5}, [4 / 7, 3 / 7, 0, 0]),  # the second crosses
    ({"top_p": 0.39}, [1, 0, 0, 0]),
    ({"top_p": 0.01}, [1, 0, 0, 0]),  # the first crosses
    ({"top_p": 0.95}, PROBS),
    # The temperature comes before the share: 16/30 is more than half already.
    ({"temperature": 0.5, "top_p": 0.5}, [1, 0, 0, 0]),
    # The share is one of what the k make together: 4/9 is more than 0.42, 0.4 is not.
    ({"top_k": 3, "top_p": 0.42}, [1, 0, 0, 0]),
    ({"top_k": 2, "top_p": 0.9}, [4 / 7, 3 / 7, 0, 0]),
    ({"temperature": 0.5, "top_k": 3, "top_p": 0.6}, [16 / 25, 9 / 25, 0, 0]),
]


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 3, 1]])
@pytest.mark.parametrize("case", range(len(CASES)))
def test_distribution(case: int, order: list[int]) -> None:
    """Catches another order of the three, a token beyond the one that crosses p or one too few, ranks for
    ids."""
    options, expected = CASES[case]
    logits = torch.tensor(PROBS, dtype=torch.float64).log()[order] + 100
    rows = torch.stack((logits, logits.flip(0)))
    found = distribution(rows, SamplingConfig(**options))
    wanted = torch.tensor(expected, dtype=torch.float64)[order]
    torch.testing.assert_close(found, torch.stack((wanted, wanted.flip(0))), rtol=0, atol=1e-13)


def test_ties() -> None:
    """Of equals the lowest ids, and exactly k: catches a threshold that lets all equals in."""
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0, -5.0]])
    expected = {1: [0, 1, 0, 0, 0], 2: [0, 0.5, 0.5, 0, 0]}
    for k, wanted in expected.items():
        found = distribution(logits, SamplingConfig(top_k=k))[0].tolist()
        assert found == pytest.approx(wanted)
    assert distribution(torch.zeros(1, 4), SamplingConfig(top_p=0.3))[0].tolist() == [0.5, 0.5, 0, 0]
    greedy, _ = choose(logits, SamplingConfig(temperature=0), torch.zeros(1, dtype=torch.float64))
    assert greedy.tolist() == [1]


def test_the_smallest_and_largest_draw() -> None:
    """Catches a token that was left out, or one behind the last, at the ends of [0, 1)."""
    logits = torch.tensor([[-9.0, 3.0, -8.0, 3.0, -7.0]] * 3)
    uniform = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    tokens, _ = choose(logits, SamplingConfig(top_k=2), uniform)
    assert tokens.tolist() == [1, 3, 3]
    many = torch.zeros(1, 7777)  # whose sum is not exactly one
    assert choose(many, SamplingConfig(), uniform[2:])[0].tolist() == [7776]


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7}, {"top_k": 3, "top_p": 0.9}])
def test_shares(options: dict[str, Any]) -> None:
    """20,000 draws of one row's stream against their distribution: chi-square, fixed seed."""
    sampling, draws = SamplingConfig(**options), 20_000
    logits = torch.tensor(PROBS).log()[[2, 0, 3, 1]]
    uniform = torch.from_numpy(row_draws(seed=5, count=draws))
    tokens, _ = choose(logits.expand(draws, -1), sampling, uniform)
    expected = distribution(logits[None], sampling)[0] * draws
    counts = tokens.bincount(minlength=4)
    assert not counts[expected == 0].any()
    likely = expected > 0
    statistic = ((counts - expected)[likely].square() / expected[likely]).sum()
    assert statistic < 16.3  # exceeded once in 1000 with three degrees of freedom


def test_draws_of_rows() -> None:
    """Catches rows that share their draws, draws that repeat, and a stream that depends on its length."""
    streams = np.stack([row_draws(seed, 400) for seed in range(50)])
    assert ((streams >= 0) & (streams < 1)).all()
    assert len(np.unique(streams)) == streams.size
    np.testing.assert_array_equal(row_draws(7, 10), streams[7, :10])
    correlation = np.corrcoef(streams) - np.eye(50)
    assert np.abs(correlation).max() < 0.25  # 5 standard deviations of independent streams


def test_log_probabilities_are_the_models() -> None:
    """Catches log-probabilities after temperature and truncation, which can't be compared with a score."""
    logits = torch.tensor([PROBS]).log()
    uniform = torch.zeros(1, dtype=torch.float64)
    for options in ({"temperature": 0.0}, {"temperature": 0.1}, {"top_k": 1}, {"top_p": 0.2}):
        token, logprob = choose(logits, SamplingConfig(**options), uniform)
        assert token.tolist() == [0]
        assert logprob.exp().item() == pytest.approx(0.4)


@pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        SamplingConfig(**options)
