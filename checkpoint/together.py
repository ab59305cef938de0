"""Work on one checkpoint by all processes of a run: what one of them finds or fails at, all of them know."""

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch.distributed as dist

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class _Outcome(Generic[Result]):
    result: Result | None = None
    error: BaseException | None = None


@dataclass(frozen=True)
class Peers:
    """The processes of a run. All of them call the same methods, in the same order, but for `is_first`.

    Without a process group the only process does all of it and nothing is sent. A process waits for as long
    as the others work, which may take minutes where they write or read: no longer than `group` allows.
    """

    group: dist.ProcessGroup | None = None  # one of all processes for tensors on the host; None: the default

    @property
    def are_several(self) -> bool:
        """Also true of the one process of a group."""
        return dist.is_initialized()

    @property
    def is_first(self) -> bool:
        """Is this the process that does what only one may do?"""
        return not self.are_several or dist.get_rank() == 0

    def on_first(self, work: Callable[[], Result]) -> Result:
        """What `work` returns on the first process, for all; raises on all what it raises there."""
        if not self.are_several:
            return work()
        own = _attempt(work) if self.is_first else _Outcome[Result]()
        sent: list[Any] = [_sendable(own)]
        dist.broadcast_object_list(sent, src=0, group=self.group)
        return _take(sent[0], own)

    def on_every(self, work: Callable[[], Result]) -> list[Result]:
        """What `work` returns on each process, by rank; raises on all what it raises on the first that
        fails."""
        if not self.are_several:
            return [work()]
        own = _attempt(work)
        sent: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(sent, _sendable(own), self.group)
        return [_take(outcome, own) for outcome in sent]

    def dealt(self, items: Sequence[Item]) -> Sequence[Item]:
        """Those that fall to this process; each falls to one."""
        return items[dist.get_rank() :: dist.get_world_size()] if self.are_several else items


ALL = Peers()


def _attempt(work: Callable[[], Result]) -> _Outcome[Result]:
    try:
        return _Outcome(work())
    except (Exception, KeyboardInterrupt) as error:
        return _Outcome(error=error)


def _sendable(outcome: _Outcome[Result]) -> _Outcome[Result]:
    """An error that can't be sent, or not be made again there, would leave the others waiting."""
    try:
        pickle.loads(pickle.dumps(outcome.error))
    except Exception:
        return _Outcome(error=RuntimeError(f"{type(outcome.error).__name__}: {outcome.error}"))
    return outcome


def _take(outcome: _Outcome[Result], own: _Outcome[Result]) -> Result:
    if outcome.error is not None:
        raise outcome.error from own.error
    return cast(Result, outcome.result)
