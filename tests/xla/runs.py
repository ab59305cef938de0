"""Whole small runs through the launcher, in this process."""

import json
from pathlib import Path
from typing import Any

import pytest

from openmoe.launcher.entry import load_config
from openmoe.launcher.train import train
from openmoe.train.throughput import PeakFlops

SMALL = (
    "experiment=tiny", "logging.wandb=disabled", "data.tokenizer.vocab_size=512", "data.workers=0",
    "model.vocab_size=896", "model.d_model=32", "model.n_heads=2", "model.head_dim=16", "model.d_ff=32",
    "model.n_layers=2", "model.num_experts=4", "model.dispatch=einsum", "train.global_batch_rows=8",
    "train.seq_len=64", "train.validation_rows=2", "checkpoint.keep=0", "checkpoint.resume=auto",
    "curriculum=[{until_steps: 6, mix: {code: 1}, objective: ul2}, "
    "{until_steps: 10, mix: {manual: 3, code: 1}, objective: causal_lm}]",
)  # fmt: skip
# On a mesh of (2, 2, 2).
XLA = ("parallel.engine=xla", "parallel.expert=2", "parallel.tensor=2")


def run(run_dir: Path, *more: str) -> None:
    with pytest.MonkeyPatch.context() as patch:  # measuring takes half a second
        patch.setattr("openmoe.launcher.train.peak_flops", lambda device, dtype: PeakFlops(1e12, "no clock"))
        train(load_config([*SMALL, f"run.dir={run_dir}", *more]))


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
