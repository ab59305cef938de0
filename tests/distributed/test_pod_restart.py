"""The hosts of a pod, each with its xla_spawn: one loses its process, the run goes on as if nothing had been.
The runs are real, of the torch engine: XLA has no several hosts without a TPU."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.distributed.test_restart import wait_for_step, worker
from tests.launcher.conftest import SMALL, lines, made_up_documents, write_source

HOSTS, STEPS, SECONDS = 4, 16, 400
SPAWN = (
    "import os, sys\n"
    "from openmoe.launcher.xla_spawn import spawn\n"
    "sys.exit(spawn(sys.argv[1:], os.environ, engine='torch', chips=4))\n"
)


@contextmanager
def pod(arguments: list[str], printed: Path) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The supervisors of a v3-32; all ends with the block."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "TPU_WORKER_HOSTNAMES": ",".join(f"127.0.0.{number + 1}" for number in range(HOSTS)),
        "TPU_ACCELERATOR_TYPE": "v3-32",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
        "WANDB_ERROR_REPORTING": "false",
    }
    hosts = []
    with printed.open("ab") as file:
        for rank in range(HOSTS):
            hosts.append(
                subprocess.Popen(
                    [sys.executable, "-c", SPAWN, "--max-restarts=2", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    env={**environment, "TPU_WORKER_ID": str(rank)},
                )
            )
    try:
        yield hosts
    finally:
        for host in hosts:
            host.terminate()
        for host in hosts:
            try:
                host.wait(40)
            except subprocess.TimeoutExpired:
                host.kill()


@pytest.mark.distributed
@pytest.mark.timeout(1500)
def test_a_pod_that_loses_a_process_goes_on_by_itself(tmp_path: Path) -> None:
    """Bug: hosts that meet in different lives, or in the store of the one before; the processes of the others
    left waiting until a timeout; a line twice or not at all."""
    write_source(tmp_path / "root" / "alpha", made_up_documents(1, 60, 80))
    write_source(tmp_path / "root" / "beta", made_up_documents(2, 20, 300))
    undisturbed, run_dir, printed = tmp_path / "undisturbed", tmp_path / "run", tmp_path / "printed"
    small = [*SMALL, f"data.root={tmp_path / 'root'}", f"data.cache_dir={tmp_path / 'cache'}"]
    small += [f"train.steps={STEPS}", "checkpoint.every_steps=4", "parallel.expert=2"]
    with pod([*small, f"run.dir={undisturbed}"], printed) as hosts:
        assert [host.wait(SECONDS) for host in hosts] == [0] * HOSTS, printed.read_text()
    with pod([*small, f"run.dir={run_dir}"], printed) as hosts:
        for rank, step in ((2, 6), (0, 11)):
            wait_for_step(run_dir, step, hosts[0])
            log = run_dir / "logs" / "rank_00000.log"
            before = log.read_text().count("start of rank")
            os.kill(worker(run_dir, rank), signal.SIGKILL)
            limit = time.monotonic() + SECONDS
            while log.read_text().count("start of rank") == before and time.monotonic() < limit:
                assert hosts[0].poll() is None, printed.read_text()
                time.sleep(0.05)
        assert [host.wait(SECONDS) for host in hosts] == [0] * HOSTS, printed.read_text()
    assert lines(run_dir) == lines(undisturbed)
    assert [line["step"] for line in lines(run_dir)] == list(range(1, STEPS + 1))
    text = printed.read_text()
    assert text.count("was ended by SIGKILL; start 2 of 3") == 1
    assert text.count("was ended by SIGKILL; start 3 of 3") == 1
