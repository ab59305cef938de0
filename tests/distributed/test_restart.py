"""torchrun starts a run again that has lost a worker, and the run goes on as if nothing had been."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.launcher.conftest import SMALL, lines, made_up_documents, write_source
from tests.launcher.test_processes import free_port

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


ONE_NODE = ("--nproc-per-node=2", "--rdzv-endpoint=localhost:0", "--max-restarts=2")


@contextmanager
def torchrun(
    options: Sequence[str], arguments: list[str], printed: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """All its processes end with the block."""
    with printed.open("wb") as file:
        launcher = subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run",
                "--monitor-interval=0.2", "--rdzv-backend=c10d", *options,
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
                "LOGLEVEL": "INFO",  # torchrun's, which says then how it counts
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


@contextmanager
def two_nodes(
    nodes: str, arguments: list[str], folder: Path, environments: Sequence[str] = ("", "")
) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The torchrun of each of two nodes with one worker. The second keeps what they meet by."""
    endpoint = f"--rdzv-endpoint=127.0.0.1:{free_port()}"
    # A lost node is given up after 2 seconds in place of 15, and no further ones are waited for as long.
    patience = "last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=2,read_timeout=60"
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                torchrun(
                    [
                        f"--nnodes={nodes}", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-id=a-run",
                        # The rank of a node goes by its address.
                        f"--local-addr=127.0.0.{node + 1}", endpoint,
                        f"--rdzv-conf={patience},is_host={node}",
                    ],
                    arguments,
                    folder / f"printed_{node}",
                )
            )
            for node in (0, 1)
        ]  # fmt: skip


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


def lose(run_dir: Path, rank: int, launcher: subprocess.Popen[bytes], step: int) -> None:
    """Kills a worker of `launcher` after `step`; returns when the processes have started again."""
    wait_for_step(run_dir, step, launcher)
    starts = run_dir / "logs" / "rank_00000.log"
    before = starts.read_text().count("start of rank")
    os.kill(worker(run_dir, rank), signal.SIGKILL)
    limit = time.monotonic() + SECONDS
    while starts.read_text().count("start of rank") == before:
        assert launcher.poll() is None, "it has ended"
        assert time.monotonic() < limit, "it has not started again"
        time.sleep(0.05)


def lose_at_the_start(launcher: subprocess.Popen[bytes]) -> None:
    """Kills the worker of `launcher` while it still imports."""
    limit = time.monotonic() + SECONDS
    while True:
        for child in Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split():
            if b"openmoe.launcher.train" in Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(int(child), signal.SIGKILL)
                return
        assert launcher.poll() is None, "it has ended"
        assert time.monotonic() < limit, "it has started no worker"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The lines of a run of two processes that nothing happens to."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with torchrun(ONE_NODE, [*corpus, f"run.dir={folder / 'run'}"], folder / "printed") as launcher:
        assert launcher.wait(SECONDS) == 0, (folder / "printed").read_text()
    return lines(folder / "run")


@pytest.mark.distributed
@pytest.mark.timeout(1500)
def test_a_run_that_loses_workers_goes_on_by_itself(
    corpus: list[str], undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Bug: a lock, a port or a store of the life before keeps the new one from starting; a line twice or not
    at all; a checkpoint half written that is resumed from; a W&B run anew at each restart."""
    run_dir, printed = tmp_path / "run", tmp_path / "printed"
    with torchrun(ONE_NODE, [*corpus, f"run.dir={run_dir}", "logging.wandb=offline"], printed) as launcher:
        lose(run_dir, 1, launcher, 6)
        lose(run_dir, 0, launcher, 17)
        assert launcher.wait(SECONDS) == 0, printed.read_text()
    assert lines(run_dir) == undisturbed
    assert [line["step"] for line in lines(run_dir)] == list(range(1, STEPS + 1))
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == [
        "step_24",
        "step_28",
        "step_30",
    ]
    pages = {path.name.rpartition("-")[2] for path in (run_dir / "wandb").glob("offline-run-*")}
    assert len(pages) == 1


@pytest.mark.distributed
@pytest.mark.timeout(1500)
def test_two_nodes_lose_workers(corpus: list[str], undisturbed: list[dict[str, Any]], tmp_path: Path) -> None:
    """Bug: the node that lost a worker counts a restart and the other one doesn't, so that their processes
    wait for each other in two lives."""
    run_dir = tmp_path / "run"
    # So late that nobody is helped by it.
    arguments = [*corpus, f"run.dir={run_dir}", f"parallel.start_timeout_seconds={2 * SECONDS}"]
    with two_nodes("2", arguments, tmp_path) as nodes:
        lose_at_the_start(nodes[1])  # the other node's worker has nobody to lose yet, and is only ended
        lose(run_dir, 1, nodes[1], 6)
        lose(run_dir, 0, nodes[0], 15)
        for node in (0, 1):
            assert nodes[node].wait(SECONDS) == 0, (tmp_path / f"printed_{node}").read_text()
    assert lines(run_dir) == undisturbed
    counts = [
        re.findall(r"restart_count=(\d)", (tmp_path / f"printed_{node}").read_text()) for node in (0, 1)
    ]
    assert [of_node[1] for of_node in counts] == ["0", "1"], counts


@pytest.mark.distributed
@pytest.mark.timeout(1500)
def test_a_lost_node_is_done_without(corpus: list[str], tmp_path: Path) -> None:
    """Bug: the node that is left looks for the store, the lock or the processes of the one that is gone."""
    undisturbed, run_dir = tmp_path / "undisturbed", tmp_path / "run"
    exact = [*corpus, "parallel.expert=1", "train.precision=fp64", "parallel.start_timeout_seconds=100"]
    with torchrun(ONE_NODE, [*exact, f"run.dir={undisturbed}"], tmp_path / "printed") as launcher:
        assert launcher.wait(SECONDS) == 0, (tmp_path / "printed").read_text()
    with two_nodes("1:2", [*exact, f"run.dir={run_dir}"], tmp_path) as nodes:
        wait_for_step(run_dir, 10, nodes[0])
        victim = worker(run_dir, 0)
        nodes[0].kill()  # its worker notices nothing of that
        os.kill(victim, signal.SIGKILL)
        assert nodes[1].wait(SECONDS) == 0, (tmp_path / "printed_1").read_text()
    assert [line["step"] for line in lines(run_dir)] == list(range(1, STEPS + 1))
    for line, expected in zip(lines(run_dir), lines(undisturbed), strict=True):
        assert line["loss"] == pytest.approx(expected["loss"], abs=1e-10)
    last = (run_dir / "logs" / "rank_00000.log").read_text().rpartition("start of rank 0")[2]
    assert "shard 0/1" in last
