"""Which source comes next: the one that lies furthest behind its rate.

Deterministic, and its only state is what each source has been given so far, so that a resume is exact and
realised shares never stray further from the rates than one example.
"""

from collections.abc import Sequence


def next_source(rates: Sequence[float], given: Sequence[int]) -> int:
    """Index of the source with the largest deficit; ties go to the first.

    `rates` sum to 1; `given` counts what each source contributed (examples or tokens).
    """
    total = sum(given) + 1
    best, best_deficit = -1, float("-inf")
    for index, (rate, count) in enumerate(zip(rates, given, strict=True)):
        deficit = rate * total - count
        if rate > 0 and deficit > best_deficit:
            best, best_deficit = index, deficit
    return best
