"""Distributed cases on processes of this machine, without a start of Python for each.

A case is a function at the top level of a module, `case(*args) -> result`; arguments and results are pickled.
"""

import json
import os
import pickle
import reprlib
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import count
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.device import ON_GPUS
from tests.distributed.nursery import END, FORK, Job, Outcome

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120  # until the nursery has imported what the ranks need
GRACE_SECONDS = 2  # for the other ranks to say what happened to them, once one has failed
LOG_CHARACTERS = 4000  # of what a failed rank printed
MESSAGE_BYTES = 1 << 16
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",  # whatever the host's name resolves to
} | ({} if ON_GPUS else {"CUDA_VISIBLE_DEVICES": ""})


class CaseFailed(Exception):
    """A rank of a case raised, ended or hung; the message says which and where."""


class Pool:
    """Not for several threads. `close` ends all processes; so does the end of this one, in whatever way.

    Args:
        folder: where the processes write what they print.
        environment: variables of theirs.
        imports: a module that takes long to import, which they have from the start.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None, imports: str = "") -> None:
        self._folder = folder
        self._cases = count()
        self._pids: list[int] = []
        self._ranks: list[Connection] = []
        self._control, theirs = socket.socketpair()
        self._control.settimeout(START_SECONDS)
        with theirs, (folder / "nursery.log").open("wb") as log:
            start = f"main({os.getpid()}, {theirs.fileno()}, Path({str(folder)!r}), {imports!r})"
            self._nursery = subprocess.Popen(
                [sys.executable, "-c", f"from tests.distributed.nursery import Path, main; {start}"],
                cwd=ROOT,
                env={**os.environ, **ENVIRONMENT, **(environment or {})},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us, who then end the processes
            )

    def run(
        self,
        function: Callable[..., Any],
        world_size: int,
        *args: object,
        timeout_seconds: float = 60,
    ) -> list[Any]:
        """Results of `function(*args)` by rank, each called in a process of its own with a default process
        group of `world_size`.

        Raises CaseFailed with the traceback of the lowest rank that raised, or where each rank was when the
        time was over.
        """
        __tracebackhide__ = True
        if ON_GPUS and world_size > torch.cuda.device_count():
            pytest.skip(f"needs {world_size} GPUs, there are {torch.cuda.device_count()}")
        call = pickle.dumps((function, args))
        self._fork(world_size)
        try:
            outcomes = self._outcomes(call, timeout_seconds)
            stacks = self._stacks([rank for rank in range(world_size) if rank not in outcomes])
        finally:  # also at Ctrl-C, and at pytest's own time limit
            exit_codes = self._end()
        failure = self._failure(outcomes, exit_codes, timeout_seconds, stacks)
        if failure:
            arguments = ", ".join(map(reprlib.repr, args))
            name = f"{function.__module__}.{function.__qualname__}({arguments})"
            raise CaseFailed(f"{name} on {world_size} ranks: {failure}")
        return [pickle.loads(outcome.result) for outcome in outcomes.values() if outcome.result is not None]

    def close(self) -> None:
        self._control.close()
        try:
            self._nursery.wait(10)
        except subprocess.TimeoutExpired:
            self._nursery.kill()
            self._nursery.wait()

    def _outcomes(self, call: bytes, timeout_seconds: float) -> dict[int, Outcome]:
        """What came of the case, by rank; a rank has none if it hangs."""
        store = str(self._folder / f"store_{next(self._cases)}")
        for rank, connection in enumerate(self._ranks):
            job = Job(call, rank, len(self._ranks), store, timeout_seconds)
            connection.send_bytes(pickle.dumps(job))
        outcomes: dict[int, Outcome] = {}
        limit = time.monotonic() + timeout_seconds
        waiting = {connection: rank for rank, connection in enumerate(self._ranks)}
        while waiting and (ready := wait(list(waiting), max(0.0, limit - time.monotonic()))):
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = waiting.pop(connection)
                try:
                    outcomes[rank] = pickle.loads(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    outcomes[rank] = Outcome()
                if outcomes[rank].result is None:
                    limit = min(limit, time.monotonic() + GRACE_SECONDS)
        return dict(sorted(outcomes.items()))

    def _failure(
        self,
        outcomes: dict[int, Outcome],
        exit_codes: list[int],
        timeout_seconds: float,
        stacks: str,
    ) -> str:
        """What went wrong, empty where nothing did. A process that ended comes first: others miss it."""
        raised = {rank: outcome.traceback for rank, outcome in outcomes.items() if outcome.traceback}
        ended = [rank for rank, outcome in outcomes.items() if outcome == Outcome()]
        hanging = [rank for rank in range(len(exit_codes)) if rank not in outcomes]
        if ended:
            code = exit_codes[ended[0]]
            return f"{_ranks(ended)} ended, exit code {code}\n{self._printed(ended[0])}"
        if raised:
            first = next(iter(raised))
            return f"{_ranks(raised)} raised\n{self._printed(first)}{raised[first]}"
        return f"{_ranks(hanging)} not done after {timeout_seconds} s\n{stacks}" if hanging else ""

    def _printed(self, rank: int) -> str:
        text = (self._folder / f"rank_{rank}.log").read_text(errors="replace")[-LOG_CHARACTERS:]
        return f"--- rank {rank} printed\n{text}---\n" if text else ""

    def _stacks(self, ranks: list[int]) -> str:
        """What these ranks printed and where they are now."""
        for rank in ranks:
            os.kill(self._pids[rank], signal.SIGUSR1)
        if ranks:
            time.sleep(0.5)
        return "".join(map(self._printed, ranks))

    def _fork(self, world_size: int) -> None:
        self._control.send(FORK + bytes([world_size]))
        answer, ends, _, _ = socket.recv_fds(self._control, MESSAGE_BYTES, world_size)
        if not answer:
            log = (self._folder / "nursery.log").read_text(errors="replace")
            raise RuntimeError(f"the processes of the pool did not start:\n{log}")
        self._pids = json.loads(answer)
        self._ranks = [Connection(end) for end in ends]

    def _end(self) -> list[int]:
        """Ends the ranks; their exit codes."""
        for connection in self._ranks:
            connection.close()
        self._ranks = []
        self._control.send(END + b"\0")
        return json.loads(self._control.recv(MESSAGE_BYTES))


def _ranks(ranks: Iterable[int]) -> str:
    return f"rank {', '.join(map(str, ranks))}"
