"""The pool itself: what a failing case tells, and that nothing of it is left."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests.distributed.pool import ROOT, CaseFailed, Pool


def total(addend: float) -> float:
    x = torch.tensor(2.0 ** dist.get_rank() + addend)
    dist.all_reduce(x)
    return x.item()


def one_rank_raises(guilty: int) -> float:
    if dist.get_rank() == guilty:
        print("about to raise")
        raise ValueError("this one is wrong")
    return total(0)  # waits for the guilty rank


def all_raise() -> None:
    time.sleep(0.1 * (dist.get_world_size() - dist.get_rank()))  # the lowest rank comes last
    raise ValueError(f"wrong on rank {dist.get_rank()}")


def one_rank_hangs(guilty: int) -> float:
    if dist.get_rank() == guilty:
        stuck_here()
    return total(0)


def stuck_here() -> None:
    time.sleep(3600)


def one_rank_exits(guilty: int) -> None:
    if dist.get_rank() == guilty:
        sys.exit(7)


def one_rank_is_killed(guilty: int) -> float:
    if dist.get_rank() == guilty:
        os.kill(os.getpid(), signal.SIGKILL)
    return total(0)


def one_rank_ends(guilty: int) -> None:
    if dist.get_rank() == guilty:
        os._exit(5)


def one_rank_returns_what_cannot_be_sent() -> object:
    return (lambda: 0) if dist.get_rank() == 1 else 0


def whole_over_mesh(groups_before: int) -> list[float]:
    """Gathers a sharded tensor over a mesh whose groups have other names with each number of earlier ones;
    leaves all of them behind."""
    for _ in range(groups_before):
        dist.new_group([0, 1])
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("a", "b"))
    x = distribute_tensor(torch.arange(8.0) + groups_before, mesh["b"], [Shard(0)])
    return (x + x).full_tensor().tolist()


@contextmanager
def within(seconds: float) -> Iterator[None]:
    start = time.monotonic()
    yield
    assert time.monotonic() - start < seconds


def fails(pool: Pool, case: Callable, *args: object, world_size: int = 4, timeout_seconds: float = 60) -> str:
    """The message of a case that must fail, in time, and after which the pool works."""
    with within(30), pytest.raises(CaseFailed) as caught:
        pool.run(case, world_size, *args, timeout_seconds=timeout_seconds)
    assert pool.run(total, 8, 1) == [263] * 8
    return str(caught.value)


def test_cases_of_any_size(pool: Pool) -> None:
    """Catches a group with the ranks of an earlier case, and results in another order than that of the
    ranks."""
    for world_size in (8, 2, 4, 1, 8):
        assert pool.run(total, world_size, 0.5) == [2**world_size - 1 + world_size / 2] * world_size
    assert pool.run(dist.get_rank, 8) == list(range(8))


def test_a_rank_that_raises(pool: Pool) -> None:
    """Catches a test that waits for the other ranks until its time is over, and then blames them."""
    message = fails(pool, one_rank_raises, 2)
    assert "one_rank_raises(2) on 4 ranks: rank 2 raised\n" in message
    assert "ValueError: this one is wrong" in message
    assert "about to raise" in message


def test_the_lowest_rank_speaks(pool: Pool) -> None:
    """Catches a message that is another one each time."""
    message = fails(pool, all_raise)
    assert "rank 0, 1, 2, 3 raised" in message
    assert "wrong on rank 0" in message
    assert "wrong on rank 1" not in message


def test_a_rank_that_hangs(pool: Pool) -> None:
    """Catches a hang that takes the whole session with it, or leaves no trace of where it was."""
    message = fails(pool, one_rank_hangs, 1, timeout_seconds=2)
    assert "one_rank_hangs(1) on 4 ranks: rank 0, 1, 2, 3 not done after 2 s" in message
    assert "in stuck_here" in message


@pytest.mark.parametrize(
    ("case", "word"),
    [
        (one_rank_exits, "SystemExit: 7"),
        (one_rank_ends, "rank 3 ended, exit code 5"),
        (one_rank_is_killed, "rank 3 ended, exit code -9"),
    ],
)
def test_a_rank_that_ends(pool: Pool, case: Callable, word: str) -> None:
    """Catches a rank that is waited for though its process is gone."""
    assert word in fails(pool, case, 3)


def test_a_result_that_cannot_be_sent(pool: Pool) -> None:
    """Catches an error of pickle that ends a process of the pool instead of the case."""
    assert "rank 1 raised" in fails(pool, one_rank_returns_what_cannot_be_sent)


def test_groups_that_a_case_leaves(pool: Pool) -> None:
    """Catches groups of an earlier case under the names of new ones, which torch reuses: a gather over ranks
    that are not there."""
    for world_size, groups in ((8, 0), (8, 3), (4, 1), (4, 0), (8, 1)):
        expected = [2 * (value + groups) for value in range(8)]
        assert pool.run(whole_over_mesh, world_size, groups) == [expected] * world_size


SESSION = """
import signal, sys, time
from pathlib import Path
from tests.distributed.pool import Pool

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
Pool(Path(sys.argv[1])).run(time.sleep, 8, 3600)
"""


@pytest.mark.parametrize(
    ("victim", "by"),
    [("session", signal.SIGKILL), ("session", signal.SIGINT), ("nursery", signal.SIGKILL)],
)
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a rank that hangs outlives a killed nursery")
def test_nothing_outlives_the_session(tmp_path: Path, victim: str, by: signal.Signals) -> None:
    """Catches processes that spin for ever after a session, or their parent, was killed while a case hung."""
    command = [sys.executable, "-c", SESSION, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL) as session:
        limit = time.monotonic() + 60
        parent = psutil.Process(session.pid)
        processes: list[psutil.Process] = []
        while len(processes) < 9 and time.monotonic() < limit:
            time.sleep(0.1)
            processes = parent.children(recursive=True)
        assert len(processes) == 9
        (parent if victim == "session" else parent.children()[0]).send_signal(by)
        _, alive = psutil.wait_procs([parent, *processes], timeout=20)
        for process in alive:
            process.kill()
    assert not alive


def test_closing_ends_all_processes(tmp_path: Path) -> None:
    """Catches processes that pile up where a session has several pools."""
    pool = Pool(tmp_path)
    ids = {*pool.run(os.getpid, 2), *pool.run(os.getppid, 2)}
    assert len(ids) == 3
    pool.close()
    assert not any(map(psutil.pid_exists, ids))
