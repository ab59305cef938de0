"""The parent of the ranks that `pool.Pool` runs cases on: it imports torch once and forks them.

The pool starts `main` in a process of its own and writes commands into the socket `control`, two bytes each:
FORK and a number makes so many ranks and answers with their process ids and an end of a socket to each, END
kills them and answers with their exit codes. When the other end of `control` closes, everything ends.

Each case has fresh processes, as a run has: torch keeps meshes in caches (of DTensor's operations) that
outlive the process groups they name, and a later case with an equal mesh would be given the old one.
"""

import ctypes
import faulthandler
import importlib
import json
import os
import pickle
import signal
import socket
import sys
import traceback
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path

FORK, END = b"F", b"E"
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Job:
    """What one rank is asked to do. `call` is a pickled (function, arguments)."""

    call: bytes
    rank: int
    world_size: int
    store: str  # a file that does not exist yet, where the ranks find each other
    timeout_seconds: float


@dataclass(frozen=True)
class Outcome:
    """What became of it: a pickled result, or the traceback, or neither where the process has ended."""

    result: bytes | None = None
    traceback: str | None = None


def main(parent: int, control_fd: int, folder: Path, imports: str = "") -> None:
    die_with_parent(parent)
    import_once()
    if imports:
        importlib.import_module(imports)
    control = socket.socket(fileno=control_fd)
    children: list[int] = []
    while command := control.recv(2):
        if command[:1] == FORK:
            children, ends = fork_ranks(folder, command[1], control)
            socket.send_fds(control, [json.dumps(children).encode()], [end.fileno() for end in ends])
            for end in ends:
                end.close()
        else:
            control.sendall(json.dumps(end_ranks(children)).encode())
            children = []
    end_ranks(children)


def die_with_parent(parent: int) -> None:
    """The kernel kills this process when `parent`, the one that made it, ends in whatever way (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the line above
        os._exit(1)


def import_once() -> None:
    """Everything that takes long to import, or would be imported late; the ranks inherit it."""
    import pytest  # noqa: F401
    import torch._dynamo  # FSDP's first call needs it
    import torch.distributed.fsdp
    import torch.distributed.tensor

    import openmoe.optim.build
    import openmoe.parallel.build
    import openmoe.parallel.meshes
    import openmoe.train.record
    import openmoe.train.step  # noqa: F401

    torch.set_num_threads(1)


def fork_ranks(folder: Path, count: int, control: socket.socket) -> tuple[list[int], list[socket.socket]]:
    """Process ids, and our ends of the sockets to them."""
    children: list[int] = []
    ends: list[socket.socket] = []
    parent = os.getpid()
    for rank in range(count):
        ours, theirs = socket.socketpair()
        child = os.fork()
        if child == 0:
            try:
                die_with_parent(parent)
                for other in (control, ours, *ends):  # or they would stay open when their owner ends
                    other.close()
                serve(Connection(theirs.detach()), folder / f"rank_{rank}.log")
            finally:
                os._exit(1)
        theirs.close()
        children.append(child)
        ends.append(ours)
    return children, ends


def end_ranks(children: list[int]) -> list[int]:
    """Exit codes; a process that had ended before keeps its own."""
    for child in children:
        os.kill(child, signal.SIGKILL)  # not reaped yet, so the id is still its own
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def serve(pool: Connection, log: Path) -> None:
    """One rank, for one job. What is printed goes to `log`."""
    printed = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND, 0o600)
    os.dup2(printed, 1)
    os.dup2(printed, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    faulthandler.register(signal.SIGUSR1, file=printed)  # the pool asks where a rank hangs
    job: Job = pickle.loads(pool.recv_bytes())
    pool.send_bytes(pickle.dumps(attempt(job)))
    # To leave would close connections: it would break off what a slower rank is about to read, and hide the
    # error of this one behind errors of the others.
    pool.recv_bytes()


def attempt(job: Job) -> Outcome:
    try:
        enter_world(job)
        function, arguments = pickle.loads(job.call)
        return Outcome(result=pickle.dumps(function(*arguments)))
    except BaseException:  # sys.exit too
        return Outcome(traceback=traceback.format_exc())


def enter_world(job: Job) -> None:
    """The default process group."""
    import torch
    import torch.distributed as dist

    from tests.distributed.device import BACKEND, gpu

    torch.manual_seed(0)
    device = gpu(job.rank)
    if device is not None:
        torch.cuda.set_device(device)
    dist.init_process_group(
        BACKEND,
        # Clients of a TCPStore wait for five seconds now and then before they connect.
        store=dist.FileStore(job.store, job.world_size),
        rank=job.rank,
        world_size=job.world_size,
        timeout=timedelta(seconds=job.timeout_seconds + 60),  # the pool is earlier
        device_id=device,
    )
