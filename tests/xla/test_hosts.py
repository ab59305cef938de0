"""Two processes as two hosts: what they exchange themselves. What devices of several hosts exchange needs a
TPU: on a CPU each process has devices of its own, so here both train on all rows."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.xla.training import SWITCH

ROOT = Path(__file__).resolve().parents[2]
# A pod's devices say of how many hosts they are; these are counted as one host each.
PROCESS = """
import sys
from openmoe.launcher import layout
from openmoe.parallel import xla
layout.start_xla = lambda hosts: xla.start()
from openmoe.launcher.train import main
main()
"""


def run(folder: Path, processes: int, *more: str) -> list[dict[str, object]]:
    script = folder / "process.py"
    script.write_text(PROCESS)
    arguments = [
        "experiment=tiny", "parallel.engine=xla", "model.dispatch=einsum", f"run.dir={folder / 'run'}",
        SWITCH, "train.steps=4", "train.global_batch_rows=4", "train.seq_len=64", "train.validation_rows=2",
        "train.validate_every_steps=2", "logging.wandb=disabled", "logging.read_every_steps=2",
        "data.tokenizer.vocab_size=512", "model.n_layers=2", "parallel.expert=2", *more,
    ]  # fmt: skip
    start = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}", str(script)]
    environment = os.environ | {"CPU_NUM_DEVICES": "2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*start, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    log = (folder / "run/logs/rank_00001.log").read_text() if processes > 1 else ""
    assert processes == 1 or "host 1 of 2" in log
    assert (folder / "run/checkpoints/step_4/manifest.json").is_file()
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def test_hosts_agree_and_train_the_same(tmp_path: Path, devices: int) -> None:
    """Bugs: groups for what hosts exchange that torch_xla's own replacements refuse; a host's numbers added
    to the devices'; a compilation, which takes longer than the time limit, taken for a run that hangs."""
    alone, both = tmp_path / "alone", tmp_path / "both"
    alone.mkdir()
    both.mkdir()
    expected = run(alone, 1)
    found = run(both, 2, "parallel.timeout_seconds=4")
    timing = {"tokens_per_second", "step_seconds", "mfu", "data_seconds", "peak_memory_bytes"}
    for ours, theirs in zip(found, expected, strict=True):
        assert {k: v for k, v in ours.items() if k not in timing} == {
            k: v for k, v in theirs.items() if k not in timing
        }
