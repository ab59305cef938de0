"""Processes that torchrun starts again on several nodes: who meets whom on the store that outlives them.

Threads stand for processes: all that they have in common is the store.
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch.distributed as dist

from openmoe.launcher.errors import ConfigError
from openmoe.launcher.rendezvous import AgreedFailure, Meeting, Place

from .test_processes import free_port

SECONDS = 20.0
Come = Callable[..., "Future[Meeting]"]


@pytest.fixture
def agent() -> dist.TCPStore:
    """The store that torchrun keeps."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def come(agent: dist.TCPStore) -> Iterator[Come]:
    """come(rank, world_size=2, attempt="0", seconds=SECONDS) -> its meeting, once it has met."""
    pool = ThreadPoolExecutor(8)

    def start(rank: int, world_size: int = 2, attempt: str = "0", seconds: float = SECONDS) -> Any:
        place = Place(rank, world_size, 0, "127.0.0.1", agent.port, store_is_there=True, attempt=attempt)
        return pool.submit(Meeting, place, seconds)

    yield start
    pool.shutdown()


def together(*meetings: "Future[Meeting]") -> list[Meeting]:
    """The meetings, after it is seen that they are one."""
    met = [future.result(SECONDS) for future in meetings]
    said: list[list[str]] = [[] for _ in met]

    def say(number: int) -> None:
        said[number] = met[number].exchange(f"{id(met[0])} {met[number].place.rank}")

    threads = [threading.Thread(target=say, args=(number,)) for number in range(len(met))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    for heard in said:
        assert heard == [f"{id(met[0])} {rank}" for rank in range(len(met))]
    return met


def signed(agent: dist.TCPStore, rank: int, other_than: str = "") -> str:
    """Waits until a process of this rank has signed for the last life."""
    lives = dist.PrefixStore("openmoe", agent)
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        if lives.check(["life"]):
            life = dist.PrefixStore(lives.get("life").decode(), lives)
            if life.check([f"here/{rank}"]) and (name := life.get(f"here/{rank}").decode()) != other_than:
                return name
        time.sleep(0.01)
    raise TimeoutError


def test_nodes_that_count_differently_meet(come: Come) -> None:
    """Bug: a node whose torchrun has counted a restart waits for those whose has not, until all give up."""
    first = together(come(0), come(1))
    assert not any(meeting.restarted for meeting in first)
    second = together(come(0, attempt="0"), come(1, attempt="1"))
    third = together(come(0), come(1))  # a node came or went: nobody counts it
    assert all(meeting.restarted for meeting in second + third)


def test_a_life_that_is_over_does_not_mislead(come: Come) -> None:
    """Bug: who is started again before rank 0 is finds the old life complete, and begins to train alone."""
    together(come(0), come(1))
    early = come(1, attempt="1")
    time.sleep(0.5)
    assert not early.done()
    together(come(0, attempt="1"), early)


def test_a_life_that_never_met_does_not_mislead(agent: dist.TCPStore, come: Come) -> None:
    """Bug: rank 0 was killed before all had come; the next one's processes sign up with the dead."""
    lives = dist.PrefixStore("openmoe", agent)
    lives.set("life", "2-dead")
    dist.PrefixStore("2-dead", lives).set("here/0", "dead 0")
    early = come(1)
    signed(agent, 1)
    together(come(0), early)


def test_a_failed_life_does_not_mislead(come: Come) -> None:
    """Bug: after a start that failed for want of a rank, the next start fails with the same words."""
    with pytest.raises(AgreedFailure, match="missing: rank 1"):
        come(0, seconds=0.3).result(SECONDS)
    early = come(1, attempt="1")
    time.sleep(0.3)
    together(come(0, attempt="1"), early)


def test_of_two_starts_of_a_rank_the_last_is_in(agent: dist.TCPStore, come: Come) -> None:
    """Bug: a worker that died while it waited is counted as there, and the others train without it; or both
    starts of it are in."""
    zero = come(0, 3)
    signed(agent, 0)
    dying = come(1, 3, seconds=2.0)
    name = signed(agent, 1)
    again = come(1, 3, attempt="1")
    assert signed(agent, 1, other_than=name).endswith(" 1")
    together(zero, again, come(2, 3))
    with pytest.raises(AgreedFailure, match="rank 0 has not come within 2 seconds"):
        dying.result(SECONDS)


def test_fewer_nodes_than_before(agent: dist.TCPStore, come: Come) -> None:
    """Bug: a rank of a run of two joins the life of three that it finds."""
    before = come(0, 3, seconds=2.0)
    signed(agent, 0)
    one = come(1, 2)
    time.sleep(0.2)
    together(come(0, 2), one)
    with pytest.raises(AgreedFailure, match="1 of 3 processes came"):
        before.result(SECONDS)


def test_rank_0_does_not_come(come: Come) -> None:
    """Bug: each of 511 ranks says so, or none does, or the second time none does."""
    for attempt in ("0", "1"):
        waiting = [come(rank, 3, attempt=attempt, seconds=0.3) for rank in (1, 2)]
        failures = [future.exception(SECONDS) for future in waiting]
        assert all(isinstance(failure, AgreedFailure) for failure in failures), failures
        assert sorted(failure.speaks for failure in failures) == [False, True]
        assert str(failures[0]).startswith("WORLD_SIZE=3: rank 0 has not come within 0.3 seconds")


def test_without_torchrun_sizes_differ() -> None:
    """Bug: a wrong WORLD_SIZE in a job script shows as a rank that is missing."""
    place = Place(0, 2, 0, "127.0.0.1", free_port(), store_is_there=False)
    with ThreadPoolExecutor(2) as pool:
        zero = pool.submit(Meeting, place, 1.0)
        with pytest.raises(ConfigError, match=r"^WORLD_SIZE=3: rank 0 has 2; allowed the same on all$"):
            Meeting(replace(place, rank=1, world_size=3), 1.0)
        with pytest.raises(AgreedFailure, match="missing: rank 1"):
            zero.result(SECONDS)


def test_nodes_that_count_differently_meet_at_rank_0_too() -> None:
    """Bug: where torchrun keeps no store for its workers (TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1), its counts
    part them all the same; or rank 0 does not wait for the lock, as its own node has lost nobody."""
    place = Place(0, 2, 0, "127.0.0.1", free_port(), store_is_there=False)
    with ThreadPoolExecutor(2) as pool:
        zero = pool.submit(Meeting, place, SECONDS)
        met = together(zero, pool.submit(Meeting, replace(place, rank=1, attempt="1"), SECONDS))
    assert all(meeting.restarted for meeting in met)
