"""The entropies that a trained model is measured against."""

import numpy as np
import pytest

from openmoe.data.statistics import bigram_cross_entropy, unigram_entropy


def test_unigram_entropy_of_known_frequencies() -> None:
    """Catches bits for nats, or sums for means."""
    assert unigram_entropy(np.array([3, 4, 5, 6] * 10)) == pytest.approx(np.log(4))
    assert unigram_entropy(np.array([3] * 10)) == 0


def test_bigram_figures() -> None:
    """Catches a model that isn't normalised, or looks at the wrong neighbour."""
    cycle = np.array([3, 4, 5, 6] * 5000)
    assert bigram_cross_entropy(cycle, cycle[:100], 8) < 0.01
    noise = np.random.default_rng(0).integers(0, 50, 100_000)
    assert bigram_cross_entropy(noise[:90_000], noise[90_000:], 50) == pytest.approx(np.log(50), abs=0.05)
    # Probabilities of all continuations sum to one, seen before or not.
    train = np.array([0, 1, 0, 2, 0, 1, 3])
    for before in range(5):
        total = sum(np.exp(-bigram_cross_entropy(train, np.array([before, after]), 5)) for after in range(5))
        assert total == pytest.approx(1)
