"""How fast the loader is, beside the alternatives: tokens a second of one core, up to batch tensors.

    python -m benchmarks.data_loading            # 10 minutes, 25 GB in a temporary folder (or --folder)
    python -m benchmarks.data_loading --quick    # a minute, 400 MB: small corpus, short rounds, no memory

Prints tables; the full run also writes them, all rounds and a picture to benchmarks/results. Of datasets,
megatron-core and grain those take part that are installed.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before numpy and torch start their threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import matplotlib
import torch

from benchmarks.corpus import RATES, SEQ_LEN, Corpus, write_corpus
from benchmarks.loaders import CONTENDERS, DENSE_SEQ_LEN, Batch, Contender

matplotlib.use("Agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("numpy", "torch", "datasets", "pyarrow", "megatron-core", "grain")
COUNTS = ("positions", "text_tokens", "nonpad_tokens", "loss_tokens")
# Row positions a second and core that the loader is meant to reach.
GOALS = {"causal_lm": 100e6, "ul2": 20e6}
TITLES = {
    "causal_lm": f"Causal LM, rows of {SEQ_LEN}",
    "ul2": f"UL2, rows of {SEQ_LEN} (dense packing: {DENSE_SEQ_LEN})",
}
MEMORY_TOKENS = (50_000_000, 400_000_000, 800_000_000)
MEMORY_BATCHES = 100


def serve(contender: Contender, corpus: Corpus, rows: int) -> None:
    """Open the contender, then measure a round for each line of standard input (its seconds); prints JSON."""
    start = time.perf_counter()
    batches: Iterator[Batch] = contender.open(corpus, rows)
    next(batches)
    print(json.dumps(time.perf_counter() - start), flush=True)
    for line in sys.stdin:
        totals = dict.fromkeys(COUNTS, 0)
        cpu, start = time.process_time(), time.perf_counter()
        while time.perf_counter() - start < float(line):
            batch = next(batches)
            for name in COUNTS:
                totals[name] += getattr(batch, name)
        wall = time.perf_counter() - start
        measured = {"wall_seconds": wall, "cpu_seconds": time.process_time() - cpu} | totals
        print(json.dumps(measured), flush=True)


class Entrant:
    """A contender in a process of its own, idle between its rounds, and what each round gave."""

    def __init__(self, contender: Contender, corpus: Corpus, rows: int) -> None:
        self.contender = contender
        command = [sys.executable, "-m", "benchmarks.data_loading", "--serve", contender.name]
        command += [
            "--tokens",
            str(corpus.tokens),
            "--rows",
            str(rows),
            "--folder",
            str(corpus.folder.parent),
        ]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, cwd=RESULTS.parents[1], stdin=pipe, stdout=pipe, text=True)
        self.open_seconds = float(self._answer())
        self.rounds: list[dict[str, float]] = []

    def _answer(self) -> Any:
        """The next line of JSON; a contender may print other things while it opens."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                return json.loads(line)
            except ValueError:
                continue
        raise RuntimeError(f"{self.contender.name} ended with exit code {self._process.wait()}")

    def run_round(self, seconds: float) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        self.rounds.append(self._answer())

    def close(self) -> None:
        self._process.communicate()

    def speeds(self, count: str) -> list[float]:
        """Tokens per second of processor time of each round, sorted.

        All runs on one core and from the page cache, so that is what a core gives when nobody else wants it.
        """
        return sorted(each[count] / each["cpu_seconds"] for each in self.rounds)


def installed(contender: Contender) -> bool:
    """Is all there that it imports?"""
    try:
        return contender.imports is None or importlib.util.find_spec(contender.imports) is not None
    except ModuleNotFoundError:
        return False


def measure_speed(
    contenders: list[Contender], corpus: Corpus, rows: int, rounds: int, seconds: float
) -> list[Entrant]:
    """Rounds are interleaved, so that whatever else the machine does falls on all alike."""
    entrants = []
    for contender in contenders:
        print(f"opening {contender.name}", file=sys.stderr, flush=True)
        if contender.write:
            contender.write(corpus)
        entrants.append(Entrant(contender, corpus, rows))
    for entrant in entrants:
        entrant.run_round(seconds / 2)
        entrant.rounds.clear()
    for number in range(rounds):
        print(f"round {number + 1} of {rounds}", file=sys.stderr, flush=True)
        for entrant in entrants:
            entrant.run_round(seconds)
    for entrant in entrants:
        entrant.close()
    return entrants


def private_bytes() -> int:
    """Anonymous memory of this process: without maps of files, which the system may drop at any time."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024


def measure_own_memory(contender: Contender, corpus: Corpus, rows: int) -> dict[str, int]:
    """Private memory that opening and `MEMORY_BATCHES` batches add; for a fresh process."""
    # Imports and first allocations are no part of it: a small corpus has them over with.
    small = write_corpus(corpus.folder.parent / "small", 1_000_000)
    for each in (small, corpus):
        if contender.write:
            contender.write(each)
    next(contender.open(small, rows))
    gc.collect()
    before = private_bytes()
    batches = contender.open(corpus, rows)
    next(batches)
    opened = private_bytes() - before
    for _ in range(MEMORY_BATCHES):
        next(batches)
    return {"tokens": corpus.tokens, "opened_bytes": opened, "bytes": private_bytes() - before}


def measure_memory(contender: Contender, folder: Path, rows: int) -> list[dict[str, int]]:
    """The same in a process of its own for each size of the corpus."""
    results = []
    for tokens in MEMORY_TOKENS:
        print(f"memory of {contender.name} with {tokens:,} tokens", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "benchmarks.data_loading", "--memory-of", contender.name]
        command += ["--tokens", str(tokens), "--rows", str(rows), "--folder", str(folder)]
        done = subprocess.run(command, cwd=RESULTS.parents[1], check=True, stdout=subprocess.PIPE, text=True)
        results.append(json.loads(done.stdout.splitlines()[-1]))
    return results


def speed_table(entrants: list[Entrant]) -> str:
    lines = ["Million tokens per second of one core's time, median of rounds [least, most]", ""]
    for objective in dict.fromkeys(entrant.contender.objective for entrant in entrants):
        lines += [TITLES[objective]]
        lines += [
            f"{'':<27}{'row positions':>22}{'text':>8}{'non-pad':>9}{'loss':>8}{'busy':>7}{'opened in':>11}"
        ]
        for entrant in entrants:
            if entrant.contender.objective != objective:
                continue
            medians = [statistics.median(entrant.speeds(count)) / 1e6 for count in COUNTS]
            low, high = (entrant.speeds("positions")[end] / 1e6 for end in (0, -1))
            busy = sum(each["cpu_seconds"] for each in entrant.rounds)
            busy /= sum(each["wall_seconds"] for each in entrant.rounds)
            spread = f"{medians[0]:.1f} [{low:.1f}, {high:.1f}]"
            lines += [
                f"{entrant.contender.name:<27}{spread:>22}{medians[1]:>8.1f}{medians[2]:>9.1f}"
                f"{medians[3]:>8.1f}{busy:>7.0%}{entrant.open_seconds:>9.1f} s"
            ]
        lines += [""]
    return "\n".join(lines)


def memory_table(memory: dict[str, list[dict[str, int]]]) -> str:
    sizes = "".join(f"{f'{tokens / 1e6:.0f}M tokens':>14}" for tokens in MEMORY_TOKENS)
    lines = [
        f"Private memory after {MEMORY_BATCHES} batches, MB beyond that of the program",
        f"{'':<27}{sizes}",
    ]
    for name, results in memory.items():
        lines += [f"{name:<27}" + "".join(f"{each['bytes'] / 1e6:>14.1f}" for each in results)]
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Processor, system and versions."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }


def draw(entrants: list[Entrant], path: Path) -> None:
    """Bars of the medians with the spread, a panel for each objective and its goal."""
    objectives = list(dict.fromkeys(entrant.contender.objective for entrant in entrants))
    groups = [[e for e in entrants if e.contender.objective == objective] for objective in objectives]
    figure, axes = plt.subplots(
        len(groups),
        1,
        figsize=(9, 1.6 + 0.5 * len(entrants)),
        gridspec_kw={"height_ratios": [len(group) for group in groups]},
        layout="constrained",
        squeeze=False,
    )
    for axis, objective, group in zip(axes[:, 0], objectives, groups, strict=True):
        names = [entrant.contender.name for entrant in group]
        medians = [statistics.median(entrant.speeds("positions")) / 1e6 for entrant in group]
        lows = [m - e.speeds("positions")[0] / 1e6 for m, e in zip(medians, group, strict=True)]
        highs = [e.speeds("positions")[-1] / 1e6 - m for m, e in zip(medians, group, strict=True)]
        colours = ["#1f5fa8" if name.startswith("openmoe") else "#a8a8a8" for name in names]
        axis.barh(names, medians, xerr=[lows, highs], color=colours, height=0.65, capsize=2, ecolor="#444444")
        for index, entrant in enumerate(group):
            label = f"  {medians[index]:.0f}"
            if objective == "ul2":
                nonpad, loss = (
                    statistics.median(entrant.speeds(count)) / 1e6
                    for count in ("nonpad_tokens", "loss_tokens")
                )
                label += f"  ({nonpad:.0f} non-pad, {loss:.0f} loss)"
            axis.text(medians[index] + highs[index], index, label, va="center", fontsize=9)
        axis.axvline(GOALS[objective] / 1e6, color="#c0392b", linestyle="--", linewidth=1)
        axis.text(GOALS[objective] / 1e6, len(group) - 0.45, " goal", color="#c0392b", fontsize=8)
        axis.set_ylim(len(group) - 0.4, -0.5)
        axis.set_xlim(0, max([*medians, GOALS[objective] / 1e6]) * 1.3)
        axis.set_title(TITLES[objective], loc="left", fontsize=10)
        axis.set_xlabel("million row positions per second of one core's time")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    arguments = _arguments()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    if arguments.folder:
        run(arguments, Path(arguments.folder))
        return
    with tempfile.TemporaryDirectory(prefix="data_loading_") as folder:
        run(arguments, Path(folder))


def run(arguments: argparse.Namespace, folder: Path) -> None:
    """What the command line asks for, with the corpus in `folder`."""
    if arguments.memory_of:
        contender = next(each for each in CONTENDERS if each.name == arguments.memory_of)
        corpus = write_corpus(folder / f"{arguments.tokens}", arguments.tokens)
        print(json.dumps(measure_own_memory(contender, corpus, arguments.rows)))
        return
    if arguments.serve:
        contender = next(each for each in CONTENDERS if each.name == arguments.serve)
        serve(contender, write_corpus(folder / f"{arguments.tokens}", arguments.tokens), arguments.rows)
        return
    contenders = [each for each in CONTENDERS if arguments.only in each.name]
    for contender in contenders:
        if not installed(contender):
            print(f"left out: {contender.name}, because {contender.package} is not installed")
    contenders = [each for each in contenders if installed(each)]
    tokens = 20_000_000 if arguments.quick else arguments.tokens
    rounds, seconds = (3, 0.3) if arguments.quick else (arguments.rounds, 1.0)
    corpus = write_corpus(folder / f"{tokens}", tokens)
    entrants = measure_speed(contenders, corpus, arguments.rows, rounds, seconds)
    speeds = speed_table(entrants)
    print(speeds)
    if arguments.quick:
        return
    memory = {each.name: measure_memory(each, folder, arguments.rows) for each in contenders}
    memories = memory_table(memory)
    print(memories)
    RESULTS.mkdir(exist_ok=True)
    where = machine()
    versions = ", ".join(f"{package} {version}" for package, version in where["versions"].items())
    text = f"{where['processor']}, {where['cores']} cores, Python {where['python']}\n{versions}\n"
    text += f"Corpus of {tokens / 1e6:.0f}M tokens\n\n{speeds}\n{memories}\n"
    (RESULTS / "data_loading.txt").write_text(text)
    result = {
        "machine": where,
        "corpus": {"tokens": tokens, "rates": RATES},
        "batch_positions": arguments.rows * SEQ_LEN,
        "speed": {
            entrant.contender.name: {
                "objective": entrant.contender.objective,
                "open_seconds": entrant.open_seconds,
                "median_per_second": {count: statistics.median(entrant.speeds(count)) for count in COUNTS},
                "rounds": entrant.rounds,
            }
            for entrant in entrants
        },
        "memory": memory,
    }
    (RESULTS / "data_loading.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(entrants, RESULTS / "data_loading.png")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small corpus and short rounds, no memory")
    parser.add_argument("--tokens", type=int, default=200_000_000, help="size of the corpus")
    parser.add_argument("--rows", type=int, default=64, help=f"rows of {SEQ_LEN} a batch")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of a second each")
    parser.add_argument("--folder", help="where the corpus is written, and found again (default: temporary)")
    parser.add_argument("--only", default="", help="contenders whose name contains this")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
