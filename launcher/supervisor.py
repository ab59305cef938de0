"""Keeps one process a host running: passes signals on, starts it again when it fails, ends with its code."""

import ctypes
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from openmoe.launcher.lives import LostHosts, ManyHosts, OneHost
from openmoe.launcher.stopped import STOPPED_FILE
from openmoe.launcher.tpu_host import Host

_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_OK, _INPUT, _FAILED, _INTERRUPTED = 0, 2, 3, 130
# In place of 0: the process has saved and left in mid-run on a signal that no launcher passed on.
_LEFT = 1000
_LOOK_SECONDS = 0.2
# For a process to find out by itself that another host's has gone, and to say so; then it is killed.
_GRACE_SECONDS = 15.0
# Where host 0's supervisor is gone, its process has been told to save, which all do together.
_LOST_SECONDS = 1200.0
# A fault of the input may only follow from another host's failure, and an early end from a signal to another
# host; that one's supervisor tells at once.
_SETTLE_SECONDS = 2.0
_PAUSE_SECONDS = 1.0  # before a start
_PR_SET_PDEATHSIG = 1


class _Stopped(BaseException):
    """A signal came while there was no process to pass it on to."""


class Supervisor:
    """Runs `command(life)`, which gives what to start in the life of that number; 0 is the first."""

    def __init__(
        self,
        host: Host,
        command: Callable[[int], Sequence[str]],
        environment: Mapping[str, str],
        max_restarts: int,
    ) -> None:
        self._host = host
        self._command = command
        self._environment = {**environment, **host.variables}
        self._max_restarts = max_restarts
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped_by: int | None = None
        self._stopped_file = Path(environment.get(STOPPED_FILE, ""))

    def run(self) -> int:
        """The exit code of the last life: 0 at the end of the run or after a save on a signal that came here
        or to another host's supervisor, 2 for a fault of the input, 3 for a failure, 130 for a second
        Ctrl-C, 128 + the signal where one came while nothing could be saved yet.

        Raises LostHosts where the other hosts of the run are gone or don't come, ConfigError where host 0
        can't listen.
        """
        with self._signals(), tempfile.TemporaryDirectory(prefix="xla_spawn-") as folder:
            if STOPPED_FILE not in self._environment:
                self._stopped_file = Path(folder) / "stopped"
            hosts: OneHost | None = None
            try:
                hosts = ManyHosts(self._host) if self._host.hosts > 1 else OneHost()
                return self._live(hosts)
            except _Stopped:
                code = 128 + (self._stopped_by or 0)
                if hosts is not None:
                    with suppress(LostHosts):
                        self._finish(hosts, code)
                return code
            except LostHosts:
                # The process notices by itself, and may be saving.
                left = self._process is not None and self._wait(_LOST_SECONDS) == _OK
                if left and (self._stopped_by is not None or not self._stopped_file.exists()):
                    return _OK
                raise
            finally:
                self._wait(0.0)
                if hosts is not None:
                    hosts.leave()

    def _live(self, hosts: OneHost) -> int:
        while True:
            state = hosts.state()
            if state.startswith("end"):
                return int(state.split()[1])
            hosts.gather(state)
            if hosts.state() != state:
                continue
            code = self._one_life(hosts, state)
            if self._stopped_by is not None:
                hosts.tell_stop()
            elif code == _OK and self._stopped_file.exists():
                code = _LEFT
            if code in (_INPUT, _LEFT) and self._host.hosts > 1:
                time.sleep(_SETTLE_SECONDS)
            if code == _LEFT and hosts.told_to_stop():
                code = _OK
            another_failed = hosts.state() not in (state, "end 0")
            if code in (_OK, _INTERRUPTED) or self._stopped_by is not None:
                self._finish(hosts, code if code >= 0 else 128 - code)
            elif another_failed:
                self._pause()
            elif code == _INPUT:
                self._finish(hosts, code)
            elif int(state) == self._max_restarts:
                self._say(f"{_how(code)}; no start left (--max-restarts={self._max_restarts})")
                self._finish(hosts, _FAILED)
            else:
                self._say(f"{_how(code)}; start {int(state) + 2} of {self._max_restarts + 1}")
                hosts.change(state, str(int(state) + 1))
                self._pause()

    def _finish(self, hosts: OneHost, code: int) -> None:
        """The first end that is told holds for all hosts."""
        while not (state := hosts.state()).startswith("end"):
            hosts.change(state, f"end {code}")

    def _one_life(self, hosts: OneHost, life: str) -> int:
        """The exit code of the process, or minus the signal that ended it."""
        self._start(int(life))
        assert self._process is not None
        while (code := self._process.poll()) is None:
            time.sleep(_LOOK_SECONDS)
            if self._stopped_by is not None:
                hosts.tell_stop()
            if hosts.state() not in (life, "end 0"):
                return self._wait(_GRACE_SECONDS)
        return code

    def _start(self, life: int) -> None:
        several = {}
        if self._host.hosts > 1:
            several = {
                "RANK": str(self._host.rank),
                "WORLD_SIZE": str(self._host.hosts),
                "LOCAL_RANK": "0",
                "MASTER_ADDR": self._host.addresses[0],
                "MASTER_PORT": str(self._host.port),
                # The store outlives a process, as torchrun's does.
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "TORCHELASTIC_RESTART_COUNT": str(life),
            }
        libc = ctypes.CDLL(None) if sys.platform == "linux" else None

        def before() -> None:
            # If this supervisor is killed, the run saves and leaves rather than hold the devices unseen.
            if libc is not None:
                libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)

        self._stopped_file.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            self._command(life),
            stdin=subprocess.DEVNULL,
            env={**self._environment, **several, STOPPED_FILE: str(self._stopped_file)},
            # A group of its own: a terminal's Ctrl-C comes from here alone, or it would count twice.
            process_group=0,
            preexec_fn=before,
        )
        if self._stopped_by is not None:
            self._process.send_signal(self._stopped_by)

    def _wait(self, seconds: float) -> int:
        """The process's exit code; after so long it is killed."""
        if self._process is None:
            return _OK
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _pause(self) -> None:
        """Nothing runs meanwhile, so that a signal ends it."""
        self._process = None
        if self._stopped_by is not None:
            raise _Stopped
        time.sleep(_PAUSE_SECONDS)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        # Under nohup a closed terminal is no reason to stop.
        numbers = [number for number in _STOPS if signal.getsignal(number) != signal.SIG_IGN]
        previous = {number: signal.signal(number, self._pass_on) for number in numbers}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        # A closed terminal is a reason to save; the run knows SIGTERM and SIGINT.
        number = signal.SIGTERM if number == signal.SIGHUP else number
        is_first = self._stopped_by is None
        self._stopped_by = number
        if self._process is not None:
            self._process.send_signal(number)
        elif is_first:  # a later one would cut off the words to the other hosts
            raise _Stopped

    def _say(self, text: str) -> None:
        host = f"host {self._host.rank}: " if self._host.hosts > 1 else ""
        print(f"xla_spawn: {host}{text}", file=sys.stderr, flush=True)


def _how(code: int) -> str:
    if code == _LEFT:
        return "the process has saved on a signal from elsewhere"
    if code < 0:
        return f"the process was ended by {signal.Signals(-code).name}"
    return f"the process ended with exit code {code}"
