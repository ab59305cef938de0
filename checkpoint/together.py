"""Work on one checkpoint by all processes of a run: what one of them finds or fails at, all of them know.

With a process group every process calls these functions, in the same order. Without one the process does
all of it and nothing is sent.
"""

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


def is_first() -> bool:
    """Is this the process that does what only one may do?"""
    return not dist.is_initialized() or dist.get_rank() == 0


def on_first(work: Callable[[], Result]) -> Result:
    """What `work` returns on the first process, for all; raises on all what it raises there."""
    if not dist.is_initialized():
        return work()
    own = _attempt(work) if is_first() else _Outcome[Result]()
    sent: list[Any] = [_sendable(own)]
    dist.broadcast_object_list(sent, src=0)
    return _take(sent[0], own)


def on_every(work: Callable[[], Result]) -> list[Result]:
    """What `work` returns on each process, by rank; raises on all what it raises on the first that fails."""
    if not dist.is_initialized():
        return [work()]
    own = _attempt(work)
    sent: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(sent, _sendable(own))
    return [_take(outcome, own) for outcome in sent]


def dealt(items: Sequence[Item]) -> Sequence[Item]:
    """Those that fall to this process; each falls to one."""
    return items[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else items


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
