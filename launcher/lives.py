"""In which life the processes of a run are, one process a host: the supervisors of all hosts agree on it.

They share a store that the supervisor of host 0 holds as long as it lives. In it stands the number of the
life that all are in, or the end of the run with its exit code. So a process that fails on one host ends those
of the others at once, and all start the next life together.
"""

import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch.distributed as dist

from openmoe.launcher.errors import ConfigError, one_line
from openmoe.launcher.rendezvous import rank_list
from openmoe.launcher.tpu_host import Host

_LOOK_SECONDS = 0.2
# All hosts of a pod are started by one command, which may take minutes over ssh.
_GATHER_SECONDS = 600.0
_LEAVE_SECONDS = 10.0


class LostHosts(OSError):
    """Other hosts of a run have not come, or are gone. Exit code 3: it says nothing about the input."""


class OneHost:
    """Decides alone: the state is the number of the life, or "end CODE"."""

    def __init__(self) -> None:
        self._state = "0"
        self._told = False

    def state(self) -> str:
        return self._state

    def change(self, old: str, new: str) -> None:
        """`old` becomes `new`, unless another host was faster."""
        if self._state == old:
            self._state = new

    def tell_stop(self) -> None:
        """A supervisor passes a signal on to its process: all processes will save and leave."""
        self._told = True

    def told_to_stop(self) -> bool:
        """Whether any supervisor has told so."""
        return self._told

    def gather(self, life: str) -> None:
        """Returns when all hosts are in this life, or the state is another one."""

    def leave(self) -> None:
        """Where others read the state here, they have done so."""


class ManyHosts(OneHost):
    """Decides with the others. All methods raise LostHosts where host 0 is gone."""

    def __init__(self, host: Host) -> None:
        """Raises ConfigError where this is host 0 and can't listen, LostHosts where host 0 does not come."""
        super().__init__()
        self._host = host
        self._endpoint = f"MASTER_ADDR={host.addresses[0]} MASTER_PORT={host.port}"
        is_first = host.rank == 0
        _check_free(host.port) if is_first else self._wait_for_first()
        with self._contact():
            store = dist.TCPStore(
                host.addresses[0],
                host.port,
                None,
                is_first,
                timedelta(seconds=_GATHER_SECONDS),
                wait_for_workers=False,
            )
            self._store = dist.PrefixStore("supervisors", store)
            if is_first:
                self._store.set("state", "0")

    def state(self) -> str:
        with self._contact():
            return str(self._store.get("state").decode())

    def change(self, old: str, new: str) -> None:
        with self._contact():
            self._store.compare_set("state", old, new)

    def tell_stop(self) -> None:
        if not self._told:
            with self._contact():
                self._store.set("stop", "")
            self._told = True

    def told_to_stop(self) -> bool:
        with self._contact():
            return bool(self._store.check(["stop"]))

    def gather(self, life: str) -> None:
        """Raises LostHosts where some do not come."""
        limit = time.monotonic() + _GATHER_SECONDS
        ranks = range(self._host.hosts)
        with self._contact():
            self._store.set(f"{life}/{self._host.rank}", "")
            while self._store.get("state").decode() == life:
                missing = [rank for rank in ranks if not self._store.check([f"{life}/{rank}"])]
                if not missing:
                    return
                if time.monotonic() >= limit:
                    raise LostHosts(
                        f"{rank_list(missing).replace('rank', 'host')} of {self._host.hosts} did not come "
                        f"within {_GATHER_SECONDS:g} s"
                    )
                time.sleep(_LOOK_SECONDS)

    def leave(self) -> None:
        limit = time.monotonic() + _LEAVE_SECONDS
        with suppress(LostHosts), self._contact():
            left = self._store.add("left", 1)
            while self._host.rank == 0 and left < self._host.hosts and time.monotonic() < limit:
                time.sleep(_LOOK_SECONDS)
                left = self._store.add("left", 0)

    def _wait_for_first(self) -> None:
        limit = time.monotonic() + _GATHER_SECONDS
        while True:
            try:
                socket.create_connection((self._host.addresses[0], self._host.port), timeout=5.0).close()
                return
            except OSError as error:
                if time.monotonic() >= limit:
                    raise LostHosts(
                        f"{self._endpoint}: host 0 did not answer within {_GATHER_SECONDS:g} s: {error}"
                    ) from None
            time.sleep(_LOOK_SECONDS)

    @contextmanager
    def _contact(self) -> Iterator[None]:
        try:
            yield
        except dist.DistError as error:
            raise LostHosts(f"{self._endpoint}: lost contact with host 0: {one_line(error)[:200]}") from None


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError as error:
            raise ConfigError(
                f"MASTER_PORT={port}: {error.strerror}; allowed a free port, the same on all hosts"
            ) from None
