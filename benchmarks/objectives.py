"""How long it takes to build examples and to put them into rows, for each class of each objective.

    OMP_NUM_THREADS=1 python -m benchmarks.objectives [EXAMPLE_TOKENS] [EXAMPLES]

Nanoseconds per raw token, the best of several runs of EXAMPLES (default 16) examples at once; and what dense
packing makes of UL2. Reads no data.
"""

import sys
import time
from collections.abc import Callable

import numpy as np

from openmoe.data.config import DataConfig, ObjectiveName
from openmoe.data.objectives import ExampleClass, make_objective
from openmoe.data.packing import dense_pattern, empty_batch, place

_OBJECTIVES: tuple[ObjectiveName, ...] = ("ul2", "prefix_lm", "span_corruption", "causal_lm")
_RUNS = 100
_BLOCK_EXAMPLES = 4000


class _Tokenizer:
    """The umT5 ids, and three tokens for a mode string."""

    first_sentinel = 256_299

    def encode(self, text: str) -> list[int]:
        return [5, 6, 7]


def _nanoseconds(work: Callable[[], object]) -> float:
    best = float("inf")
    for _ in range(_RUNS):
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best * 1e9


def _measure(name: ObjectiveName, example_tokens: int, examples: int) -> list[ExampleClass]:
    """Print a line for each class, and one for their mixture."""
    objective = make_objective(name, example_tokens, _Tokenizer(), DataConfig())  # type: ignore[arg-type]
    random = np.random.default_rng(0)
    rows = range(examples)
    batch = empty_batch(examples, example_tokens)
    mixture = np.zeros(3)
    for index, own in enumerate(objective.classes):
        tokens = random.integers(2, 250_000, (examples, own.raw_tokens), np.int32)
        draws = random.integers(0, 2**64, examples, np.uint64)
        built = objective.build(index, tokens, draws)
        build = _nanoseconds(lambda i=index, t=tokens, d=draws: objective.build(i, t, d))  # type: ignore[misc]
        into_rows = _nanoseconds(
            lambda b=built: place(batch, rows, [0] * examples, [1] * examples, b, rows)  # type: ignore[misc]
        )
        mixture += own.rate * np.array([build, into_rows, tokens.size])
        print(f"{own.name:18} {build / tokens.size:8.2f} {into_rows / tokens.size:8.2f} {own.raw_tokens:8}")
    if len(objective.classes) > 1:
        build, into_rows, tokens_read = mixture
        print(f"{name + ' mix':18} {build / tokens_read:8.2f} {into_rows / tokens_read:8.2f}")
    return list(objective.classes)


def main(example_tokens: int = 2048, examples: int = 16) -> None:
    print(f"{examples} examples of up to {example_tokens} tokens at a time")
    print(f"{'ns per raw token':18} {'build':>8} {'place':>8} {'raw':>8}")
    classes = {name: _measure(name, example_tokens, examples) for name in _OBJECTIVES}["ul2"]
    sizes = [own.row_tokens for own in classes]
    counts = [round(own.rate * _BLOCK_EXAMPLES) for own in classes]
    print(f"\ndense packing of {sum(counts)} examples of UL2")
    print(f"{'row tokens':>12} {'rows':>8} {'fill':>8} seconds")
    for times in (1, 2, 4, 8, 16, 32):
        start = time.perf_counter()
        rows = len(dense_pattern(sizes, counts, times * example_tokens))
        seconds = time.perf_counter() - start
        fill = np.dot(sizes, counts) / (rows * times * example_tokens)
        print(f"{times * example_tokens:12} {rows:8} {fill:8.2%} {seconds:7.2f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
