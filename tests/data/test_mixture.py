"""The mixture keeps to its rates from the first example on."""

from openmoe.data.mixture import next_source


def test_shares_never_stray_by_more_than_one_example() -> None:
    """Catches a drifting or random choice: after any number of examples counts are within 1 of the rates."""
    rates = [0.5, 0.3, 0.15, 0.05, 0.0]
    given = [0] * 5
    for total in range(1, 3000):
        given[next_source(rates, given)] += 1
        assert all(abs(count - rate * total) <= 1 for rate, count in zip(rates, given, strict=True))
    assert given[4] == 0


def test_shares_by_weight() -> None:
    """Catches counting examples where the rates are per token."""
    rates, sizes, given = [0.7, 0.3], [100, 900], [0, 0]
    for _ in range(5000):
        source = next_source(rates, given)
        given[source] += sizes[source]
    assert abs(given[0] / sum(given) - 0.7) < 0.001
