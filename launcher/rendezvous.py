"""How the processes of a run find each other: their places from the environment, and a store they share."""

import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist

from openmoe.launcher.errors import ConfigError, Failure, one_line
from openmoe.parallel.watchdog import LostContact, reason

# Between two looks at the store: short at first, as most waits are.
_LOOK_SECONDS = (0.01, 0.25)
# For the last words of a run: who has failed first, and has everyone read what the store holds?
_LAST_SECONDS = 5.0


class AgreedFailure(Exception):
    """All processes leave for one reason; one of them says it."""

    def __init__(self, failure: Failure, speaks: bool, who: str = "") -> None:
        super().__init__(failure.line)
        self.failure = failure
        self.speaks = speaks  # does this process print it?
        self.who = who  # "rank 3: " where not all failed the same way


@dataclass(frozen=True)
class Place:
    """One process among those of a run, as the launcher of processes has told it."""

    rank: int
    world_size: int
    local_rank: int  # among those of its node
    address: str
    port: int
    store_is_there: bool  # torchrun keeps one at this address; otherwise rank 0 does
    attempt: str = "0"  # starts of this node's processes before this one, as its torchrun counts them

    @property
    def endpoint(self) -> str:
        return f"MASTER_ADDR={self.address} MASTER_PORT={self.port}"


def place_from(environment: Mapping[str, str]) -> Place | None:
    """This process's place; None where nothing says that there are several processes.

    Raises ConfigError with the variable, its value and what is allowed.
    """
    if "WORLD_SIZE" not in environment:
        return None
    world_size = _number(environment, "WORLD_SIZE", 1)
    rank = _number(environment, "RANK", 0, world_size - 1)
    local_rank = _number(environment, "LOCAL_RANK", 0, world_size - 1)
    address = _text(environment, "MASTER_ADDR", "the host of rank 0")
    return Place(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        address=address,
        port=_number(environment, "MASTER_PORT", 1, 65535),
        store_is_there=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=environment.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def _number(environment: Mapping[str, str], name: str, least: int, most: int | None = None) -> int:
    allowed = f"a number from {least}" + ("" if most is None else f" to {most}")
    text = _text(environment, name, allowed)
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else -1
    if number < least or (most is not None and number > most):
        raise ConfigError(f"{name}={text[:80]}: allowed {allowed}")
    return number


def _text(environment: Mapping[str, str], name: str, allowed: str) -> str:
    if not environment.get(name):
        raise ConfigError(
            f"{name}: missing, but WORLD_SIZE={environment['WORLD_SIZE'][:80]} says that this is one of "
            f"several processes; allowed {allowed}"
        )
    return environment[name]


class Meeting:
    """The processes that have met: a store that all can read, for few and small messages.

    It needs no process group, so it serves before there is one and after a collective has failed.

    torchrun starts lost processes again with the same store, each node in its own time and with a count of
    its own. So one start of all of them, a life, has a name that its rank 0 makes up and writes on the store.
    The others sign up for the life that stands there, and for the next one where that is over. When all ranks
    have signed, rank 0 writes who is in: of each rank the process that signed last. One that it does not
    name, as it came to an old life or has been started again meanwhile, waits for a later life.
    """

    def __init__(self, place: Place, seconds: float) -> None:
        """Returns when all processes are here, within `seconds`.

        Raises ConfigError in a process that can't reach the others, AgreedFailure in those that met in vain.
        """
        self.place = place
        self.seconds = seconds
        self.restarted = False  # a life was there before
        self._exchanges = 0
        self._name = uuid.uuid4().hex[:12]  # of this process
        deadline = time.monotonic() + seconds
        self._server, client = _open_store(place, deadline, seconds)
        self._lives = dist.PrefixStore("openmoe", client)
        self._store: dist.Store = self._lives  # from `_sign_up` on, a life's part
        try:
            self._meet(deadline)
        except dist.DistError as error:
            whose = "torchrun" if place.store_is_there else "rank 0"
            raise ConfigError(
                f"{place.endpoint}: {whose}, which opens it, has gone before all were here: {reason(error)}"
            ) from None

    def store(self, name: str) -> dist.Store:
        """A part of the store for others to use."""
        return dist.PrefixStore(name, self._store)

    def exchange(self, message: str) -> list[str]:
        """Each process's message, by rank. Raises LostContact where one is missing after `seconds`."""
        name = f"exchange/{self._exchanges}"
        self._exchanges += 1
        ranks = range(self.place.world_size)
        try:
            self._store.set(f"{name}/{self.place.rank}", message)
            if self._store.add(name, 1) == self.place.world_size:
                self._store.set(f"{name}/all", "")
            if not self._appears(f"{name}/all", time.monotonic() + self.seconds):
                silent = [rank for rank in ranks if not self._store.check([f"{name}/{rank}"])]
                raise LostContact(
                    f"rank {self.place.rank}: nothing came from {rank_list(silent)} within "
                    f"{self.seconds:g} seconds, after all had started"
                )
            return [found.decode() for found in self._store.multi_get([f"{name}/{rank}" for rank in ranks])]
        except dist.DistError as error:
            raise LostContact(
                f"rank {self.place.rank}: lost contact with the store of the run at {self.place.endpoint}: "
                f"{reason(error)}"
            ) from error

    def is_first_to_report(self, line: str, cause: bool) -> bool:
        """Is a failure that was not agreed on to be printed here? One that says the same, or that only
        follows from another's (`cause` False), is printed once. True where the others can't be asked."""
        try:
            if not self._server and not _listens(self.place):
                return True  # asked in vain, the store would print pages
            if self._store.add("failures", 1) == 1:
                self._store.set("failure", line)
                return True
            if not cause:
                return False
            return not (self._appears("failure", _soon()) and self._store.get("failure").decode() == line)
        except dist.DistError:
            return True

    def close(self) -> None:
        """Where the store is rank 0's, it stays until all have read it, or are gone."""
        try:
            if self._server is None:
                if self.place.store_is_there or _listens(self.place):
                    self._store.add("left", 1)
                return
            deadline, others = _soon(), self._store.add("entered", 0) - 1
            while self._store.add("left", 0) < others and time.monotonic() < deadline:
                time.sleep(_LOOK_SECONDS[0])
        except dist.DistError:
            pass

    def _meet(self, deadline: float) -> None:
        """Returns when this process is in a life, whose part of the store `_store` is then."""
        place = self.place
        if place.rank == 0:
            before, own = self._last_life(), f"{place.world_size}-{self._name}"
            self._sign_up(own)
            self._lives.set("life", own)
            self._is_in(own, deadline, before)
            return
        over = ""
        while life := self._await(partial(self._other_life, over), deadline):
            if self._sign_up(life) and self._is_in(life, deadline):
                return
            if not place.store_is_there:  # there is only one life
                raise ConfigError(f"RANK={place.rank}: two processes have it; allowed one")
            over = life
        line = (
            f"WORLD_SIZE={place.world_size}: rank 0 has not come within {self.seconds:g} seconds "
            "(parallel.start_timeout_seconds)"
        )
        speaks = self._lives.add(f"no life after {over}/{place.attempt}", 1) == 1
        raise AgreedFailure(Failure(2, line), speaks)

    def _last_life(self) -> str:
        """Of which a rank 0 has written; "" before the first."""
        return self._lives.get("life").decode() if self._lives.check(["life"]) else ""

    def _other_life(self, life: str) -> str:
        """The last one, "" where that is `life`."""
        last = self._last_life()
        return "" if last == life else last

    def _sign_up(self, life: str) -> bool:
        """False where the life is none for this process."""
        place = self.place
        size = life.partition("-")[0]
        if size != str(place.world_size):
            if place.store_is_there:
                return False
            raise ConfigError(f"WORLD_SIZE={place.world_size}: rank 0 has {size}; allowed the same on all")
        self._store = dist.PrefixStore(life, self._lives)
        if place.store_is_there and self._store.check(["verdict"]):
            return False  # all have met, or failed, before this process came
        self._store.add("entered", 1)
        # torchrun gives each rank once, and may start it again where one that has signed is gone.
        if not place.store_is_there and self._store.add(f"times/{place.rank}", 1) > 1:
            self._decide(failure=f"RANK={place.rank}: two processes have it; allowed one")
        else:
            self._store.set(f"here/{place.rank}", f"{self._name} {place.attempt}")
        return True

    def _is_in(self, life: str, deadline: float, before: str = "") -> bool:
        """Waits until it is decided who is in, which rank 0 does; `before` is the life that it has found.

        False where this process isn't, or where a later life has begun. Raises AgreedFailure.
        """
        size, rank = self.place.world_size, self.place.rank
        here = [f"here/{other}" for other in range(size)]

        def look() -> str:
            if self._store.check(["verdict"]):
                return "decided"
            if rank == 0:
                return "complete" if self._store.check(here) else ""
            return self._other_life(life) and "over"

        match self._await(look, deadline):
            case "over":
                return False
            case "complete":
                signed = [name.decode().split() for name in self._store.multi_get(here)]
                restarted = before != "" or any(attempt != "0" for _, attempt in signed)
                self._decide(members=[name for name, _ in signed], restarted=restarted)
            case "":
                missing = [other for other in range(size) if not self._store.check([here[other]])]
                missing = missing or [0]  # it has signed, and is gone
                self._decide(
                    failure=f"WORLD_SIZE={size}: {size - len(missing)} of {size} processes came within "
                    f"{self.seconds:g} seconds (parallel.start_timeout_seconds); missing: "
                    f"{rank_list(missing)}"
                )
        verdict = json.loads(self._store.get("verdict"))
        if "failure" in verdict:
            self.close()
            raise AgreedFailure(Failure(2, verdict["failure"]), speaks=verdict["by"] == self._name)
        self.restarted = verdict["restarted"]
        return bool(verdict["members"][rank] == self._name)

    def _decide(self, **verdict: Any) -> None:
        """Unless another process has done so already."""
        if self._store.add("verdicts", 1) == 1:
            self._store.set("verdict", json.dumps({"by": self._name, **verdict}))
        else:
            self._appears("verdict", _soon())

    def _appears(self, key: str, deadline: float) -> bool:
        return self._await(lambda: key if self._store.check([key]) else "", deadline) != ""

    def _await(self, look: Callable[[], str], deadline: float) -> str:
        """What `look` finds; "" where it is still nothing at the deadline."""
        pause, longest = _LOOK_SECONDS
        while not (found := look()):
            if time.monotonic() >= deadline:
                return ""
            time.sleep(pause)
            pause = min(2 * pause, longest)
        return found


def rank_list(ranks: list[int]) -> str:
    """[3] -> "rank 3", [0, 1, 5] -> "ranks 0, 1, 5", [0, 1, 2, 7] -> "ranks 0-2, 7"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    parts = [f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(parts)}"


def _soon() -> float:
    return time.monotonic() + _LAST_SECONDS


def _open_store(place: Place, deadline: float, seconds: float) -> tuple[dist.Store | None, dist.Store]:
    """The store itself where it is this process's, and a way to it."""
    limit = timedelta(seconds=max(seconds, _LAST_SECONDS))
    if place.rank == 0 and not place.store_is_there:
        try:
            _check_free(place)
            server = dist.TCPStore(
                place.address, place.port, place.world_size, True, limit, wait_for_workers=False
            )
        except (OSError, dist.DistError) as error:
            raise ConfigError(f"{place.endpoint}: rank 0 can't listen there: {one_line(error)}") from None
        return server, server
    while not _listens(place):
        if time.monotonic() >= deadline:
            raise ConfigError(
                f"{place.endpoint}: no process answered there within {seconds:g} seconds "
                "(parallel.start_timeout_seconds); rank 0 has not come, or is at another address"
            )
        time.sleep(_LOOK_SECONDS[1])
    made: list[dist.Store | Exception] = []

    def connect() -> None:
        try:
            made.append(dist.TCPStore(place.address, place.port, place.world_size, False, limit))
        except Exception as error:
            made.append(error)

    # Something else that listens there may never answer, and torch waits for it without a limit.
    connecting = threading.Thread(target=connect, daemon=True)
    connecting.start()
    connecting.join(max(deadline - time.monotonic(), _LAST_SECONDS))
    if not made or isinstance(made[0], Exception):
        raise ConfigError(f"{place.endpoint}: what listens there is not rank 0 of this run")
    return None, made[0]


def _check_free(place: Place) -> None:
    """Raises OSError where the port is taken; the store would say so in pages."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", place.port))
            probe.listen()
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            raise OSError("the port is in use" if taken else os.strerror(error.errno or 0)) from None


def _listens(place: Place) -> bool:
    try:
        socket.create_connection((place.address, place.port), timeout=_LAST_SECONDS).close()
    except OSError:
        return False
    return True
