"""The smallest run that has everything: two sources, a switch, experts, checkpoints, validation."""

import json
import logging
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from openmoe.train.throughput import PeakFlops

from .commands import Commands

TIMING = {"tokens_per_second", "step_seconds", "mfu", "data_seconds", "peak_memory_bytes"}
STEPS, MARK, TOKENS_PER_STEP = 12, 6, 4 * 64

# until_tokens lies inside step 6, so the switch comes after it: at the first boundary at or after the mark.
CURRICULUM = (
    f"curriculum=[{{until_tokens: {MARK * TOKENS_PER_STEP - 100}, mix: {{alpha: 1, beta: 3}}, "
    f"objective: ul2}}, {{until_steps: {STEPS}, mix: {{alpha: 3, beta: 1}}, objective: causal_lm}}]"
)
SMALL = (
    "experiment=tiny",
    "logging.wandb=disabled",
    "data.tokenizer.vocab_size=512",
    "data.tokenizer.model_type=bpe",
    "data.workers=0",
    "model.vocab_size=896",
    "model.d_model=32",
    "model.n_heads=2",
    "model.head_dim=16",
    "model.d_ff=32",
    "model.n_layers=2",
    "model.num_experts=4",
    "train.global_batch_rows=4",
    "train.seq_len=64",
    "train.validation_rows=2",
    "train.validate_every_steps=0",
    "checkpoint.every_steps=3",
    "checkpoint.keep=3",
    CURRICULUM,
)

Small = Callable[..., list[str]]


def made_up_documents(seed: int, documents: int, words: int) -> list[str]:
    draw = random.Random(seed)
    vocabulary = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(2, 7))) for _ in range(80)]
    return [
        " ".join(draw.choice(vocabulary) for _ in range(draw.randint(words // 4, words)))
        for _ in range(documents)
    ]


def write_source(folder: Path, documents: list[str]) -> None:
    folder.mkdir(parents=True)
    (folder / "part.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


def lines(run_dir: Path) -> list[dict[str, Any]]:
    """`metrics.jsonl` without the timing fields."""
    text = (run_dir / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [
        {name: value for name, value in json.loads(line).items() if name not in TIMING}
        for line in text.splitlines()
    ]


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """small(run_dir, "key=value", ...) -> the arguments of a small run there."""
    root, cache = tmp_path_factory.mktemp("corpus"), tmp_path_factory.mktemp("cache")
    write_source(root / "alpha", made_up_documents(1, 60, 80))
    write_source(root / "beta", made_up_documents(2, 20, 300))

    def arguments(run_dir: Path, *more: str) -> list[str]:
        return [*SMALL, f"run.dir={run_dir}", f"data.root={root}", f"data.cache_dir={cache}", *more]

    return arguments


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    server = Commands(tmp_path_factory.mktemp("commands"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def undisturbed(
    small: Small, commands: Commands, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """The lines of a run that nothing happens to."""
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    code, stderr = commands.run(*small(run_dir))
    assert code == 0, stderr
    return lines(run_dir)


@pytest.fixture(scope="session", autouse=True)
def _like_the_commands() -> Iterator[None]:
    """As in the commands: sums over another number of threads may round differently, and small runs are
    faster. The peak isn't measured, which takes half a second."""
    logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.WARNING)  # a page for each checkpoint
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("openmoe.launcher.train.peak_flops", lambda device, dtype: PeakFlops(1e12, "no clock"))
        yield
    torch.set_num_threads(threads)
