"""`openmoe-train` in processes of its own, without paying for the imports each time.

A server imports everything once and forks a child for each command: real processes with real exit codes that
can be killed, about a second each. A command may bring a `prelude`, Python that runs in the child first; the
functions at the end of this file write preludes that kill or signal the process at an exact place.
"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SERVER = """
import json, os, sys, time
import torch._dynamo, torch.distributed.checkpoint
from openmoe.launcher import entry, train
from openmoe.train.throughput import PeakFlops

train.peak_flops = lambda device, dtype: PeakFlops(1e12, "no clock")  # measuring takes half a second
# What Hydra and its parser keep is paid once, as the imports are.
entry.load_config(["run.dir=x", "curriculum=[{until_steps: 1, mix: {a: 1}, objective: ul2}]"])

def wait(pid, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)

for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        print(json.dumps(wait(job["wait"], job["seconds"])), flush=True)
        continue
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(job["environment"])
    os.chdir(job["folder"])
    exec(job["prelude"], {})
    sys.argv = ["openmoe-train", *job["arguments"]]
    train.main()
    sys.exit(0)
"""


@dataclass
class Command:
    """One process; `pid` is also the id of its process group."""

    commands: "Commands"
    pid: int
    folder: Path
    number: int

    def wait(self, seconds: float = 60) -> int:
        """The exit code, or minus the signal that ended it."""
        code = self.commands.ask({"wait": self.pid, "seconds": seconds})
        if code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.commands.ask({"wait": self.pid, "seconds": 10})
            raise TimeoutError(f"the command still ran after {seconds} s:\n{self.stderr}")
        return code

    def kill(self, number: int) -> None:
        """Sends the signal; a process that has ended already is left alone."""
        if not self.exited:
            os.kill(self.pid, number)

    def sleep(self, seconds: float) -> None:
        """Waits so long while the process runs."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.exited:
            time.sleep(0.002)

    @property
    def exited(self) -> bool:
        """Nobody has waited for it yet, so an ended process is still in the table as a zombie."""
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"

    @property
    def stderr(self) -> str:
        return (self.folder / f"stderr{self.number}").read_text()

    @property
    def stdout(self) -> str:
        return (self.folder / f"stdout{self.number}").read_text()


class Commands:
    """Starts commands; `folder` is their working directory and holds what they print."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._number = 0
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "WANDB_ERROR_REPORTING": "false"},
        )

    def ask(self, job: dict[str, Any]) -> Any:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def start(self, *arguments: str, prelude: str = "", **environment: str) -> Command:
        self._number += 1
        files = {name: str(self.folder / f"{name}{self._number}") for name in ("stdout", "stderr")}
        job = {"arguments": arguments, "prelude": prelude, "environment": environment, **files}
        return Command(self, self.ask(job | {"folder": str(self.folder)}), self.folder, self._number)

    def run(self, *arguments: str, prelude: str = "", **environment: str) -> tuple[int, str]:
        """Exit code and stderr."""
        command = self.start(*arguments, prelude=prelude, **environment)
        return command.wait(), command.stderr

    def close(self) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=30)


def wait_for(condition: Any, seconds: float = 30) -> None:
    """Polls `condition` without a pause: some of the moments looked for last a millisecond."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "never came about"


def wrap(target: str, body: str) -> str:
    """A prelude that replaces the function `target` by one that runs `body`, in which `call()` is the
    original and `n` counts the calls from 1."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    return f"""
import os, pkgutil, signal, time
path, _, name = {target!r}.rpartition(".")
owner = pkgutil.resolve_name(path)
original, count = getattr(owner, name), [0]
def wrapped(*args, **kwargs):
    count[0] += 1
    n = count[0]
    call = lambda: original(*args, **kwargs)
{lines}
setattr(owner, name, wrapped)
"""


def signal_before(target: str, n: int, number: int = signal.SIGKILL) -> str:
    """Sends `number` to the process itself just before the nth call of `target`."""
    return wrap(target, f"if n == {n}: os.kill(os.getpid(), {int(number)})\nreturn call()")


def signal_after(target: str, n: int, number: int = signal.SIGKILL) -> str:
    """Sends `number` to the process itself just after the nth call of `target`."""
    return wrap(target, f"result = call()\nif n == {n}: os.kill(os.getpid(), {int(number)})\nreturn result")
