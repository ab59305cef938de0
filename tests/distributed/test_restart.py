"""torchrun starts a run again that has lost a worker, and the run goes on as if nothing had been."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.launcher.conftest import SMALL, lines, made_up_documents, write_source

STEPS = 30
SECONDS = 400


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments of a small run, but for its folder."""
    folder = tmp_path_factory.mktemp("corpus")
    write_source(folder / "root" / "alpha", made_up_documents(1, 60, 80))
    write_source(folder / "root" / "beta", made_up_documents(2, 20, 300))
    return [
        *SMALL,
        f"data.root={folder / 'root'}",
        f"data.cache_dir={folder / 'cache'}",
        f"train.steps={STEPS}",
        "checkpoint.every_steps=4",
        "checkpoint.resume=auto",
        "parallel.expert=2",
    ]


@contextmanager
def torchrun(arguments: list[str], restarts: int, printed: Path) -> Iterator[subprocess.Popen[bytes]]:
    """All its processes end with the block."""
    with printed.open("wb") as file:
        launcher = subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--monitor-interval=0.2",
                f"--max-restarts={restarts}", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0",
                "-m", "openmoe.launcher.train", *arguments,
            ],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "GLOO_SOCKET_IFNAME": "lo",
                "CUDA_VISIBLE_DEVICES": "",
                "WANDB_ERROR_REPORTING": "false",
            },
            start_new_session=True,
        )  # fmt: skip
    try:
        yield launcher
    finally:
        if launcher.poll() is None:
            launcher.terminate()  # it ends its workers, which are in sessions of their own
            try:
                launcher.wait(40)
            except subprocess.TimeoutExpired:
                launcher.kill()


def wait_for_step(run_dir: Path, step: int, launcher: subprocess.Popen[bytes]) -> None:
    metrics = run_dir / "metrics.jsonl"
    limit = time.monotonic() + SECONDS
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < step:
        assert launcher.poll() is None, "it has ended before"
        assert time.monotonic() < limit
        time.sleep(0.002)


def worker(run_dir: Path, rank: int) -> int:
    """The process of the last start of a rank, from its log."""
    log = (run_dir / "logs" / f"rank_{rank:05d}.log").read_text()
    return int(re.findall(rf"start of rank {rank} on \S+, process (\d+)", log)[-1])


@pytest.mark.distributed
@pytest.mark.timeout(1500)
def test_a_run_that_loses_workers_goes_on_by_itself(corpus: list[str], tmp_path: Path) -> None:
    """Bug: a lock, a port or a store of the life before keeps the new one from starting; a line twice or not
    at all; a checkpoint half written that is resumed from; a W&B run anew at each restart."""
    undisturbed, run_dir, printed = tmp_path / "undisturbed", tmp_path / "run", tmp_path / "printed"
    with torchrun([*corpus, f"run.dir={undisturbed}"], 0, printed) as launcher:
        assert launcher.wait(SECONDS) == 0, printed.read_text()
    with torchrun([*corpus, f"run.dir={run_dir}", "logging.wandb=offline"], 2, printed) as launcher:
        for rank, step in ((1, 6), (0, 17)):
            wait_for_step(run_dir, step, launcher)
            starts = run_dir / "logs" / "rank_00000.log"
            before = starts.read_text().count("start of rank")
            os.kill(worker(run_dir, rank), signal.SIGKILL)
            limit = time.monotonic() + SECONDS
            while starts.read_text().count("start of rank") == before and time.monotonic() < limit:
                assert launcher.poll() is None, printed.read_text()
                time.sleep(0.05)
        assert launcher.wait(SECONDS) == 0, printed.read_text()
    assert lines(run_dir) == lines(undisturbed)
    assert [line["step"] for line in lines(run_dir)] == list(range(1, STEPS + 1))
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        "step_24",
        "step_28",
        "step_30",
    ]
    pages = {path.name.rpartition("-")[2] for path in (run_dir / "wandb").glob("offline-run-*")}
    assert len(pages) == 1
