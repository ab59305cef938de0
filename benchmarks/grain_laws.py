"""Does grain (google/grain) keep the loader's laws? Measures each and prints one line a finding.

    python -m benchmarks.grain_laws

The verdict drawn from it is in docs/data_alternatives.md. Needs `pip install grain`, which the project itself
does not use.
"""

import hashlib
import json
import logging
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
logging.getLogger("absl").setLevel(logging.ERROR)

import numpy as np  # noqa: E402

try:
    import grain  # type: ignore[import-not-found]
    from grain import experimental
except ImportError:
    sys.exit("grain is not installed: pip install grain")

from openmoe.data.rng import IndexPermutation  # noqa: E402

SEQ_LEN = 2048
# Rates of Table 1, version I, in percent.
VERSION_1 = [7.5, 2.25, 1.0, 1.25, 2.25, 2.25, 33.5, 50.0]
# Rows of a run over a trillion tokens.
LAST_ROW = 10**12 // SEQ_LEN
# Row positions that UL2's six denoisers take at 1024 + 1024 (facts 5.3), and their rates.
UL2_TOKENS, UL2_RATES = [1253, 1224, 2048, 2048, 2048, 1028], [0.1] * 5 + [0.5]
IN_PROCESS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=1)


class Documents:
    """Documents of log-normal length around 1000 tokens; every token is different."""

    def __init__(self, documents: int) -> None:
        lengths = np.random.default_rng(0).lognormal(np.log(1000) - 0.5, 1, documents).astype(np.int64)
        self._offsets = np.concatenate([[0], np.cumsum(np.clip(lengths, 1, 65_536))])
        self._tokens = np.arange(self._offsets[-1], dtype=np.int32)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"tokens": self._tokens[self._offsets[index] : self._offsets[index + 1]]}


class UL2Examples:
    """Examples with the lengths that UL2 has, all tokens equal: packing alone is measured."""

    def __init__(self, examples: int) -> None:
        self._kinds = np.random.default_rng(0).choice(6, size=examples, p=UL2_RATES)

    def __len__(self) -> int:
        return len(self._kinds)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"tokens": np.full(UL2_TOKENS[self._kinds[index]], index, np.int32)}


class Rows:
    """Rows of SEQ_LEN tokens of one flat array."""

    def __init__(self, rows: int) -> None:
        self._tokens, self._rows = np.arange(rows * SEQ_LEN, dtype=np.int32), rows

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {"tokens": self._tokens[index * SEQ_LEN : (index + 1) * SEQ_LEN]}


def say(law: str, finding: str) -> None:
    print(f"{law:<24} {finding}", flush=True)


def cpu_seconds(function: Callable[..., object], *arguments: Any) -> float:
    """Best CPU time of three calls."""
    best = float("inf")
    for _ in range(3):
        start = time.process_time()
        function(*arguments)
        best = min(best, time.process_time() - start)
    return best


def take(iterator: Iterator[Any], count: int) -> list[Any]:
    return [next(iterator) for _ in range(count)]


def digest(rows: list[Any]) -> str:
    tokens = b"".join(np.ascontiguousarray(row["tokens"]).tobytes() for row in rows)
    return hashlib.blake2b(tokens, digest_size=8).hexdigest()


def size_bytes(state: Any) -> int:
    return len(json.dumps(state, default=str))


def numbered(source: int, rows: int) -> Any:
    """A source whose element at i is (source, i): shows what a mix picks."""
    return grain.MapDataset.range(rows).map(lambda index: (source, index))


def mixed(rows: int) -> Any:
    parts = [numbered(source, rows).shuffle(seed=source) for source in range(len(VERSION_1))]
    return grain.MapDataset.mix(parts, weights=VERSION_1)


def shuffle_one_by_one(size: int) -> None:
    for index in range(20_000):
        experimental.index_shuffle(index, max_index=size - 1, seed=3, rounds=4)


def shuffle_in_blocks(permutation: IndexPermutation) -> None:
    ranks = np.arange(1000)
    for block in range(20):
        permutation(ranks + 1000 * block)


def measure_shuffle() -> None:
    for size in (10**6, 10**9):
        theirs = cpu_seconds(shuffle_one_by_one, size)
        ours = cpu_seconds(shuffle_in_blocks, IndexPermutation(size, 3))
        say(
            "shuffle, speed",
            f"size {size:.0e}: grain {theirs / 20_000 * 1e9:.0f} ns an index; ours in blocks of 1000 "
            f"{ours / 20_000 * 1e9:.0f} ns; neither keeps a table",
        )
    shuffled = [grain.MapDataset.range(1000).shuffle(seed=seed).repeat(2) for seed in (0, 1)]
    same = all(shuffled[0][1000 + index] == shuffled[1][index] for index in range(1000))
    say("shuffle, seeds", f"epoch 1 of seed 0 is epoch 0 of seed 1: {same}")
    before = grain.MapDataset.range(10**6).shuffle(seed=0)
    for more in (10**4, 10**5):
        after = grain.MapDataset.range(10**6 + more).shuffle(seed=0)
        kept = sum(before[index] == after[index] for index in range(10_000))
        say("append", f"{more} more than 1,000,000: {kept} of the first 10,000 places unchanged")
    parts = [before, grain.MapDataset.range(10**4).shuffle(seed=1)]
    joined = grain.MapDataset.concatenate(parts)
    kept = sum(before[index] == joined[index] for index in range(10_000))
    say("append", f"as concatenated parts, each shuffled alone: {kept} of 10,000 (epoch 0 only)")


def read_again(dataset: Any, index: int) -> None:
    for _ in range(1000):
        dataset[index]


def measure_mix() -> None:
    mix, shares = mixed(10**9), np.array(VERSION_1) / 100
    given, worst = np.zeros(len(shares)), 0.0
    for index in range(100_000):
        given[mix[index][0]] += 1
        worst = max(worst, float(np.abs(given - (index + 1) * shares).max()))
    say(
        "mix, counts",
        f"version I, 100,000 rows: {given.astype(int).tolist()}, worst prefix off by {worst:.1f}",
    )
    pair = grain.MapDataset.mix([numbered(source, 10**9) for source in (0, 1)], weights=[1.0, 1.999])
    realised = sum(pair[index][0] == 0 for index in range(299_900)) / 299_900
    say("mix, counts", f"weights [1, 1.999] are cut to integers: {realised:.5f} instead of {1 / 2.999:.5f}")
    for index in (0, LAST_ROW):
        seconds = cpu_seconds(read_again, mix, index)
        say("random access, mix", f"row {index}: {seconds * 1e3:.1f} us")
    short = grain.MapDataset.mix([numbered(0, 100), numbered(1, 10**6)], weights=[0.5, 0.5])
    say("repetition", f"a source of 100 rows at 50%: the mix ends silently after {len(short)} rows")
    again = [numbered(0, 100).repeat(), numbered(1, 10**6).repeat()]
    take(iter(grain.MapDataset.mix(again, weights=[0.5, 0.5]).to_iter_dataset()), 1000)
    say("repetition", "with .repeat(): the source came five times, no warning")


def elastic_rows(
    dataset: Any, ranks: int, state: Any, steps: int, processes: int = 0
) -> tuple[list[Any], Any]:
    """Global batches of 8 rows read by `ranks` ranks, and the state after them."""
    iterators = []
    parallel = grain.MultiprocessingOptions(num_workers=processes) if processes else None
    for rank in range(ranks):
        options = grain.sharding.ShardOptions(shard_index=rank, shard_count=ranks)
        iterators.append(
            iter(experimental.ElasticIterator(dataset, 8, options, multiprocessing_options=parallel))
        )
        if state is not None:
            iterators[-1].set_state(state)
    rows: list[Any] = []
    for _ in range(steps):
        batches = [next(iterator) for iterator in iterators]
        rows += [batches[row % ranks][row // ranks] for row in range(8)]
    state = iterators[0].get_state()
    for iterator in iterators:
        iterator.close()
    return rows, state


def measure_ranks() -> None:
    dataset = mixed(10**6).map(np.array)
    whole = np.array(elastic_rows(dataset, 1, None, 20)[0])
    equal = [
        np.array_equal(np.array(elastic_rows(dataset, ranks, None, 20)[0]), whole) for ranks in (2, 4, 8)
    ]
    say("ranks, fixed rows", f"ElasticIterator, 2, 4, 8 ranks give the rows of one: {equal}")
    state = elastic_rows(dataset, 2, None, 7)[1]
    rest = np.array(elastic_rows(dataset, 4, state, 13)[0])
    say("resume, fixed rows", f"2 -> 4 ranks exact: {np.array_equal(rest, whole[56:])}; state {state}")
    state = elastic_rows(dataset, 2, None, 7, processes=2)[1]
    rest = np.array(elastic_rows(dataset, 1, state, 13, processes=1)[0])
    same = np.array_equal(rest, whole[56:])
    say("resume, fixed rows", f"ElasticIterator, 2 ranks of 2 processes -> 1 rank of 1: exact {same}")


def measure_packing() -> None:
    documents = grain.MapDataset.source(Documents(20_000)).shuffle(seed=0)

    def joined(part: Any) -> Any:
        return experimental.ConcatThenSplitIterDataset(
            part.to_iter_dataset(IN_PROCESS), length_struct={"tokens": SEQ_LEN}
        )

    def fitted(fit: Any, seq_len: int) -> Any:
        return fit(
            grain.MapDataset.source(UL2Examples(10**6)).to_iter_dataset(IN_PROCESS),
            length_struct={"tokens": seq_len},
            num_packing_bins=64,
            shuffle_bins=False,
        )

    cases = [("concat-then-split 2048", joined(documents), SEQ_LEN, 2000)]
    first_fit, best_fit = experimental.FirstFitPackIterDataset, experimental.BestFitPackIterDataset
    for size in (2048, 8192, 32_768):
        cases += [(f"first fit {size}", fitted(first_fit, size), size, 128)]
        cases += [(f"best fit {size}", fitted(best_fit, size), size, 128)]
    for name, dataset, seq_len, count in cases:
        seconds = cpu_seconds(lambda d, n: take(iter(d), n), dataset, count)
        iterator = iter(dataset)
        rows = take(iterator, count)
        fill = np.mean([(row["tokens_segment_ids"] > 0).mean() for row in rows])
        state = pickle.loads(pickle.dumps(iterator.get_state()))
        following, resumed = digest(take(iterator, 20)), iter(dataset)
        resumed.set_state(state)
        say(
            "packing",
            f"{name}: fill {fill:.3f}, {count * seq_len / seconds / 1e6:.1f}M positions/s, state "
            f"{size_bytes(state)} bytes, resume exact {digest(take(resumed, 20)) == following}",
        )
    try:
        cases[0][1][1000]
    except TypeError as error:
        say("random access, packed", f"{error}")
    try:
        elastic_rows(cases[0][1], 2, None, 1)
    except TypeError as error:
        say("ranks, packed", f"ElasticIterator: {error}")
    packed = {"concat-then-split": joined(documents), "first fit 8192": fitted(first_fit, 8192)}
    for name, dataset in packed.items():
        wanted = digest(take(iter(dataset), 256))
        for workers in (1, 2):
            parallel = iter(dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers)))
            same = digest(take(parallel, 256)) == wanted
            state = parallel.get_state()
            parallel.close()
            say(
                "workers, packed",
                f"{name}, {workers}: rows as without {same}; state {size_bytes(state)} bytes",
            )
    wanted = digest(take(iter(joined(documents)), 256))
    ranks = [iter(joined(documents[rank::2])) for rank in range(2)]
    same = digest([next(ranks[row % 2]) for row in range(256)]) == wanted
    say("ranks, packed", f"concat-then-split, 2: rows as of one {same}")


def in_processes(dataset: Any, processes: int) -> Any:
    """Iterator over a MapDataset that `processes` processes read."""
    options = grain.MultiprocessingOptions(num_workers=processes)
    return iter(dataset.to_iter_dataset(IN_PROCESS).mp_prefetch(options))


def measure_rows() -> None:
    rows = grain.MapDataset.source(Rows(50_000)).shuffle(seed=0).batch(16)
    tokens = 200 * 16 * SEQ_LEN
    for threads in (0, 16):
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(1, threads))
        iterator = iter(rows.to_iter_dataset(options))
        take(iterator, 5)
        speed = tokens / cpu_seconds(take, iterator, 200)
        say("speed, fixed rows", f"{threads} threads: {speed / 1e6:.0f}M tokens per CPU second")
    wanted = digest(take(iter(rows.to_iter_dataset(IN_PROCESS)), 25))
    states = {}
    for processes in (1, 2):
        iterator = in_processes(rows, processes)
        same = digest(take(iterator, 25)) == wanted
        start = time.perf_counter()
        take(iterator, 200)
        speed = tokens / (time.perf_counter() - start)
        states[processes] = iterator.get_state()
        iterator.close()
        say(
            "workers, fixed rows",
            f"{processes} processes: rows as without {same}, {speed / 1e6:.0f}M tokens/s wall",
        )
    wanted = digest(take(iter(rows[225:].to_iter_dataset(IN_PROCESS)), 5))
    for saved, restored in ((1, 1), (2, 2), (1, 2), (2, 1)):
        iterator = in_processes(rows, restored)
        try:
            iterator.set_state(states[saved])
            finding = f"exact {digest(take(iterator, 5)) == wanted}"
        except IndexError as error:
            finding = f"IndexError, {error}"
        say("resume, fixed rows", f"mp_prefetch, {saved} -> {restored} processes: {finding}")
        iterator.close()


if __name__ == "__main__":
    print(f"grain {grain.__version__}, numpy {np.__version__}, {os.cpu_count()} cores")
    measure_shuffle()
    measure_mix()
    measure_ranks()
    measure_packing()
    measure_rows()
