"""How many processes become one run: they join, find faults together, speak with one voice, and part.

    data = processes.agree(lambda: open_data())    # raises on all processes where it failed on one

Between them lie a store (rendezvous.py), which is there from the start, and after `start` torch's process
group. Errors are collected before anything is written, so that a run leaves one line, and all of it leaves.
"""

import contextlib
import json
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout, new_group

from openmoe.checkpoint.errors import SaveCancelled
from openmoe.checkpoint.together import Peers
from openmoe.launcher.errors import ConfigError, Failure, failure_of
from openmoe.launcher.rank_log import NO_LOG, NoLog, RankLog, quiet_unless
from openmoe.launcher.rendezvous import AgreedFailure, Meeting, Place
from openmoe.launcher.sameness import describe_difference, differences
from openmoe.parallel.watchdog import (
    GRACE_SECONDS,
    NO_WATCHDOG,
    LostContact,
    NoWatchdog,
    Watchdog,
    is_lost_contact,
    reason,
)
from openmoe.train.loop import NonFiniteLoss

Result = TypeVar("Result")

# What is agreed on may be hours of preparation on one rank; one that dies is noticed at once all the same.
_LONGEST_WAIT = timedelta(days=7)
# A rank that lost another one lets that one speak first; where a launcher ends all, it has done so by then.
FOLLOWER_SECONDS = 2.0
# For a process group to close. After a failure it may wait for a rank that is gone.
_CLOSE_SECONDS = 10.0


class Processes:
    """A run of one process, which has nobody to agree with."""

    rank, world_size, local_rank = 0, 1, 0
    restarted = False  # by a launcher that has lost some of them
    log: NoLog = NO_LOG
    peers = Peers()  # for work on a checkpoint; several processes have a group for it after `start`

    def agree(self, work: Callable[[], Result]) -> Result:
        """What `work` returns here. Where it raises on any process, all leave this call with AgreedFailure.

        All processes call it, in the same order; whatever they do between two such calls must not fail for
        a reason that is only theirs. There is no limit on how long `work` may take.
        """
        return work()

    def first_of_node(self, work: Callable[[], Result]) -> Result:
        """`agree`, but the first process of each node does it before the others, which find its results."""
        return work()

    def require_same(self, values: Mapping[str, Any]) -> None:
        """AgreedFailure on all processes, naming key, values and ranks, unless all have the same (JSON)."""

    def start(self, wanted: str) -> torch.device:
        """This process's device, run.device being `wanted`; connects the processes where there are several.

        Raises ConfigError for a device that is not there.
        """
        return pick_device(wanted, None)

    def open_log(self, run_dir: Path, text: str) -> None:
        """From here on `log` is the rank's file, where there are several processes; `text` opens it."""

    def watchdog(self, describe_group: Callable[[str], str]) -> NoWatchdog:
        """To be entered around the training; `agree` pauses it."""
        return NO_WATCHDOG


ALONE = Processes()


class JoinedProcesses(Processes):
    """One of the processes of a run, with the others."""

    def __init__(self, place: Place, start_timeout_seconds: float, timeout_seconds: float) -> None:
        """Returns when all are here; raises as Meeting does.

        `start_timeout_seconds` is for coming together, `timeout_seconds` for each collective.
        """
        self.rank, self.world_size, self.local_rank = place.rank, place.world_size, place.local_rank
        self.log = NO_LOG
        self._meeting = Meeting(place, start_timeout_seconds)
        self.restarted = self._meeting.restarted
        self._start_timeout = timedelta(seconds=start_timeout_seconds)
        self._timeout_seconds = timeout_seconds
        self._group: dist.ProcessGroup | None = None  # for agreeing, once there are groups
        self._watchdog = NO_WATCHDOG

    def agree(self, work: Callable[[], Result]) -> Result:
        result: Result | None = None
        error: BaseException | None = None
        with self._watchdog.pause():
            try:
                result = work()
            except AgreedFailure:
                raise  # of an agreement inside `work`
            except (Exception, KeyboardInterrupt) as raised:
                error = raised
            found = self._exchange("" if error is None else json.dumps(asdict(failure_of(error))))
        failures = [Failure(**json.loads(text)) if text else None for text in found]
        first = next((rank for rank, failure in enumerate(failures) if failure), None)
        if first is None:
            return result  # type: ignore[return-value]
        failure = failures[first]
        assert failure is not None
        all_alike = all(other and other.line == failure.line for other in failures)
        who = "" if all_alike else f"rank {first}: "
        raise AgreedFailure(failure, speaks=self.rank == first, who=who) from error

    def first_of_node(self, work: Callable[[], Result]) -> Result:
        results: list[Result] = []

        def do() -> None:
            with quiet_unless(self.rank == 0):
                results.append(work())

        for first in (True, False):
            self.agree(do if first == (self.local_rank == 0) else _nothing)
        return results[0]

    def require_same(self, values: Mapping[str, Any]) -> None:
        # The first rank's values to all, then from each what it has instead: usually nothing.
        reference = json.loads(self._exchange(json.dumps(values) if self.rank == 0 else "")[0])
        own = differences(json.loads(json.dumps(values)), reference)
        others = [json.loads(text) for text in self._exchange(json.dumps(own))]
        line = describe_difference(reference, others)
        if line is not None:
            raise AgreedFailure(Failure(2, line), speaks=self.rank == 0)

    def start(self, wanted: str) -> torch.device:
        device = self.agree(lambda: pick_device(wanted, self.local_rank))
        self.require_same({"the device of run.device": device.type})
        use_cuda = device.type == "cuda"
        if use_cuda:
            torch.cuda.set_device(device)
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if use_cuda else "gloo",
                store=self._meeting.store("group"),
                rank=self.rank,
                world_size=self.world_size,
                timeout=timedelta(seconds=self._timeout_seconds + GRACE_SECONDS),
                device_id=device if use_cuda else None,
            )
            self._group = new_group(backend="gloo", timeout=self._start_timeout, group_desc="agree")
            # Of its own: a save in the background must not meet what the training agrees on meanwhile.
            saving = new_group(backend="gloo", timeout=self._start_timeout, group_desc="checkpoint")
            self._exchange("")  # a rank that could not connect would only be missed hours later
            for group in (self._group, saving):
                _set_pg_timeout(_LONGEST_WAIT, group)
            self.peers = Peers(saving)
        except RuntimeError as error:
            raise self._lost("while the processes were connected", error) from error
        return device

    def open_log(self, run_dir: Path, text: str) -> None:
        self.log = self.agree(lambda: RankLog(run_dir, self.rank, text))

    def watchdog(self, describe_group: Callable[[str], str]) -> NoWatchdog:
        self._watchdog = Watchdog(self.rank, self._timeout_seconds, describe_group, lambda: self.log.fileno())
        return self._watchdog

    def report(self, error: BaseException) -> int:
        """Says what went wrong unless another process does; returns the exit code."""
        self.log.write("".join(traceback.format_exception(error)).rstrip())  # its cause on this rank included
        if isinstance(error, AgreedFailure):
            if error.speaks:
                _print(error.failure.text(error.who))
            return error.failure.code
        if is_lost_contact(error):
            error = self._lost("", error)
        failure = failure_of(error)
        follows = isinstance(error, LostContact | SaveCancelled)  # from what another process has to say
        if follows:
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(FOLLOWER_SECONDS)
        if self._meeting.is_first_to_report(failure.line, cause=not follows):
            named = self.rank == 0 or isinstance(error, LostContact | NonFiniteLoss)
            _print(failure.text("" if named else f"rank {self.rank}: "))
        return failure.code

    def close(self, well: bool) -> bool:
        """Leaves the others; after a good end (`well`) when all are there. False where the process group
        does not let go: then the process must not wait for it, but end at once (os._exit)."""
        if well:
            with contextlib.suppress(LostContact):  # it has done its part before it went
                self._exchange("")
        closing = threading.Thread(target=_destroy_groups, daemon=True)
        closing.start()
        closing.join(_CLOSE_SECONDS)
        self._group = None
        self._meeting.close()
        self.log.close()
        return not closing.is_alive()

    def _exchange(self, text: str) -> list[str]:
        """Each process's text, by rank. Raises LostContact."""
        if self._group is None:
            return self._meeting.exchange(text)
        found: list[Any] = [None] * self.world_size
        try:
            dist.all_gather_object(found, text, self._group)
        except RuntimeError as error:
            raise self._lost("", error) from error
        return found

    def _lost(self, when: str, error: BaseException) -> LostContact:
        place = f" {when}" if when else ""
        return LostContact(f"rank {self.rank}: lost contact with another process{place}: {reason(error)}")


def pick_device(wanted: str, local_rank: int | None) -> torch.device:
    """`wanted` is run.device; `local_rank` None for a process of its own. Raises ConfigError."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ConfigError("run.device=cuda: no CUDA device here; allowed auto or cpu")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank is None:
        return torch.device("cuda")
    devices = torch.cuda.device_count()
    if local_rank >= devices:
        raise ConfigError(
            f"LOCAL_RANK={local_rank}: allowed below {devices}, the number of CUDA devices this process "
            "sees; each needs its own: start fewer, show all processes of a node all its devices, or "
            "run.device=cpu"
        )
    return torch.device("cuda", local_rank)


def _destroy_groups() -> None:
    if dist.is_initialized():
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def _nothing() -> None:
    pass


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
