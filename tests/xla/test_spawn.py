"""xla_spawn with the engine it is for: a run on virtual devices that is killed, goes on, and is stopped."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

SECONDS = 240
SMALL = [
    "experiment=tiny", "logging.wandb=disabled", "model.dispatch=einsum", "model.d_model=16",
    "model.n_heads=2", "model.head_dim=8", "model.d_ff=16", "model.n_layers=2", "model.num_experts=4",
    "model.vocab_size=1024", "data.tokenizer.vocab_size=512", "train.seq_len=32",
    "train.global_batch_rows=8", "train.validation_rows=0", "train.steps=2000", "checkpoint.every_steps=5",
    "parallel.expert=2",
]  # fmt: skip


def steps_of(run_dir: Path) -> list[int]:
    file = run_dir / "metrics.jsonl"
    return [json.loads(line)["step"] for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.timeout(2 * SECONDS)
def test_killed_and_stopped(tmp_path: Path) -> None:
    """Bug: a run under XLA that its launcher does not start again, or from nothing; devices that the killed
    process still holds; a signal that does not reach it."""
    run_dir, printed = tmp_path / "run", tmp_path / "printed"
    with printed.open("wb") as file:
        launcher = subprocess.Popen(
            [
                sys.executable, "-m", "openmoe.launcher.xla_spawn", "--devices=4", "--max-restarts=1", *SMALL,
                f"run.dir={run_dir}", f"data.cache_dir={tmp_path / 'cache'}",
            ],
            stdin=subprocess.DEVNULL, stdout=file, stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1", "XLA_FLAGS": "--xla_backend_optimization_level=0"},
        )  # fmt: skip
    limit = time.monotonic() + SECONDS

    def wait_until(there: Callable[[], bool]) -> None:
        while not there():
            assert launcher.poll() is None, printed.read_text()
            assert time.monotonic() < limit, printed.read_text()
            time.sleep(0.02)

    try:
        wait_until(lambda: any((run_dir / "checkpoints").glob("step_*[0-9]")))
        child = int(Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text())
        os.kill(child, signal.SIGKILL)
        reached = max(steps_of(run_dir))
        wait_until(lambda: max(steps_of(run_dir)) > reached + 5)
        launcher.terminate()
        assert launcher.wait(SECONDS) == 0, printed.read_text()
    finally:
        if launcher.poll() is None:
            launcher.kill()  # its process saves and leaves
    text = printed.read_text()
    assert "no TPU: 4 virtual devices of the CPU" in text
    assert "the process was ended by SIGKILL; start 2 of 2" in text
    assert re.search(r"resumed from \S+step_\d+ \(step \d+\)", text)
    steps = steps_of(run_dir)
    assert steps == list(range(1, len(steps) + 1))
    assert f"stopped by SIGTERM, saved at step {len(steps)}" in text
    assert (run_dir / "checkpoints" / f"step_{len(steps)}").is_dir()
