"""What a training step loses while a checkpoint is written.

    OMP_NUM_THREADS=1 python -m benchmarks.saving [FOLDER]      # a few minutes; one core stays free of two

One process, a MoE model in float32 with Adafactor, large for its short steps (0.5 GB a checkpoint, in FOLDER
or the folder for temporary files). Each round takes in random order: steps without a save, steps from an
asynchronous save until it is done, and a save that the run waits for. What steps lose is their time beyond as
many steps without a save, `save()` itself included; its share is that of the time that the save takes. A
product of matrices before each round says how quiet the machine is. Prints a table and writes it to
benchmarks/results/saving.txt.
"""

import os
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from openmoe.checkpoint.config import CheckpointConfig
from openmoe.checkpoint.manager import CheckpointManager
from openmoe.checkpoint.state import training_tensors
from openmoe.launcher.entry import load_config
from openmoe.optim.build import build_optimizer
from openmoe.parallel.build import build_decoder
from openmoe.parallel.ranks import OneProcess
from openmoe.train.step import MicroBatch, micro_batches, train_step

ROUNDS = 7
STEPS = 12  # without a save, a round
RESULT = Path(__file__).resolve().parent / "results" / "saving.txt"
OVERRIDES = [
    "experiment=tiny", "run.dir=unused", "model.d_model=512", "model.d_ff=4096", "model.n_heads=8",
    "model.head_dim=64", "train.global_batch_rows=2",
]  # fmt: skip


class Training:
    """The steps, on random tokens."""

    def __init__(self, folder: Path) -> None:
        self.config = load_config(OVERRIDES)
        torch.manual_seed(0)
        self.model = build_decoder(self.config.model, self.config.train.precision, torch.device("cpu"), 0)
        self.ranks = OneProcess(self.model)
        self.optimizer = build_optimizer(self.config.optim, self.ranks.named_parameters(), self.ranks.shards)
        self.batch = self._batch()
        self.number = 0
        self.save_seconds = 0.0
        self.managers = {
            asynchronous: CheckpointManager(
                folder / str(asynchronous), CheckpointConfig(keep=1, asynchronous=asynchronous)
            )
            for asynchronous in (True, False)
        }
        for manager in self.managers.values():
            manager._write = self._timed(manager._write)  # type: ignore[method-assign]
        self.optimizer.register_step_pre_hook(lambda *_: self.managers[True].wait_to_update())

    def _batch(self) -> list[MicroBatch]:
        rows, seq_len = self.config.train.global_batch_rows, self.config.train.seq_len
        draw = torch.Generator().manual_seed(1)
        tokens = torch.randint(1, self.config.model.vocab_size, (rows, seq_len), generator=draw).numpy()
        ones = tokens > 0
        arrays = {
            "input_tokens": tokens, "target_tokens": tokens, "loss_weights": ones.astype("float32"),
            "segment_ids": ones.astype("int32"), "prefix_mask": ~ones, "source_ids": (~ones).astype("int16"),
        }  # fmt: skip
        return micro_batches(arrays, -1, torch.device("cpu"))

    def _timed(self, write: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            start = time.perf_counter()
            write(*args, **kwargs)
            self.save_seconds = time.perf_counter() - start

        return call

    def step(self) -> None:
        loss_tokens = float(self.batch[0].batch.loss_weights.sum())
        train_step(self.model, self.optimizer, self.batch, loss_tokens, 0.01, self.config.train, self.ranks)

    def save(self, asynchronous: bool) -> None:
        self.number += 1
        counts = {"step": self.number, "tokens_seen": 0, "milestone": False}
        tensors = training_tensors(self.model, self.optimizer, self.ranks)
        self.managers[asynchronous].save(tensors, **counts, model={}, metadata={})


def seconds_of(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def steps_during_save(training: Training) -> tuple[float, int]:
    """Seconds from the save on, and the steps in them."""
    manager, steps, start = training.managers[True], 0, time.perf_counter()
    training.save(asynchronous=True)
    while manager.is_saving:
        training.step()
        steps += 1
    return time.perf_counter() - start, steps


def quartiles(values: list[float]) -> str:
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as folder:
        training = Training(Path(folder))
        for _ in range(2):
            training.step()
            steps_during_save(training)
        square = torch.randn(1024, 1024)
        found: dict[str, list[float]] = {name: [] for name in ("matmul", "step", "save", "share", "waiting")}
        for _ in range(ROUNDS):
            found["matmul"].append(seconds_of(lambda: square @ square))
            kinds = ["without", "asynchronous", "waiting"]
            random.shuffle(kinds)
            seconds, steps = 0.0, 1
            for kind in kinds:
                if kind == "without":
                    found["step"].append(statistics.median(seconds_of(training.step) for _ in range(STEPS)))
                elif kind == "asynchronous":
                    seconds, steps = steps_during_save(training)
                    found["save"].append(training.save_seconds)
                else:
                    found["waiting"].append(seconds_of(lambda: training.save(asynchronous=False)))
            lost = seconds - steps * found["step"][-1]
            found["share"].append(lost / found["save"][-1])
        spread = max(found["matmul"]) / min(found["matmul"]) - 1
        parameters = sum(parameter.numel() for parameter in training.model.parameters())
        machine = f"{torch.get_num_threads()} thread(s), {os.cpu_count()} cores, {platform.machine()}"
        text = f"""{parameters:,} parameters, {machine}; torch {torch.__version__}
medians of {ROUNDS} rounds (quartiles)
the matrix product differs by {spread:.0%} between rounds; above 15% the machine was not quiet

| | seconds |
|---|---|
| a step without a save | {quartiles(found["step"])} |
| a save that the run waits for | {quartiles(found["waiting"])} |
| a save in the background | {quartiles(found["save"])} |
| what the steps lose, of the time of the save | {quartiles(found["share"])} |
"""
        print(text)
        RESULT.write_text(text)


if __name__ == "__main__":
    main()
