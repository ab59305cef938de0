"""A hang ends with a line that names rank, step and group; nothing else does.

Run as a script this file is the parent of real gloo processes, which import torch once for all.
"""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from openmoe.parallel.watchdog import NO_WATCHDOG, LostContact, Watchdog, is_lost_contact

RANKS = 3
TIMEOUT = 1.5


def test_only_gloo_itself_complains_of_lost_contact() -> None:
    """Bug: a loss that is not finite is told as lost contact, as its message names a source `igloo`."""

    class NonFinite(RuntimeError):
        pass

    assert not is_lost_contact(NonFinite("loss=nan at step 3 (tokens: igloo 5)"))
    assert is_lost_contact(RuntimeError("[gloo/transport/tcp/pair.cc:538] Connection closed by peer"))


def describe(group: str) -> str:
    return {"world": "ranks 0 1 2", "data": "ranks 0 2"}[group]


def run(case: str, folder: Path) -> tuple[list[int], str, float]:
    """Exit codes by rank, what they wrote to stderr, and the seconds that the last one took to end."""
    ended = subprocess.run(
        [sys.executable, __file__, case, str(folder)],
        timeout=100, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    return found["codes"], ended.stderr, found["seconds"]


def test_a_rank_that_stops_is_reported_by_the_others(tmp_path: Path) -> None:
    """Bug: a run waits for ever for a rank that hangs; or ends without saying where it was."""
    codes, stderr, seconds = run("stop", tmp_path)
    assert codes == [3, -signal.SIGKILL, 3]  # the parent kills the stopped one
    assert TIMEOUT <= seconds < TIMEOUT + 8
    place = "at step 3 after all_reduce in group world (ranks 0 1 2), collective 2 of the step"
    lines = sorted(line for line in stderr.splitlines() if line.startswith("error: "))
    assert len(lines) == 2, stderr
    for rank, line in zip((0, 2), lines, strict=True):
        assert line == f"error: rank {rank}: nothing has moved for {TIMEOUT:.0f} s {place}"
        log = (tmp_path / f"log_{rank}").read_text()
        assert log.startswith(line)
        assert "all_reduce" in log.partition("\n")[2]  # the stack that hangs
    assert "Traceback" not in stderr


def test_a_rank_that_dies_is_lost_contact_at_once(tmp_path: Path) -> None:
    """Bug: gloo's own words, without rank, step and group; or the time of a hang is waited for first."""
    codes, stderr, seconds = run("die", tmp_path)
    assert codes == [5, 9, 5], stderr
    assert seconds < TIMEOUT
    for rank in (0, 2):
        text = (tmp_path / f"lost_{rank}").read_text()
        start = f"rank {rank}: lost contact with another process at step 3 in group world (ranks 0 1 2): "
        assert text.startswith(start)
        assert "[/" not in text
        assert "typically" not in text


def test_slow_work_that_is_announced_is_no_hang(tmp_path: Path) -> None:
    """Bug: a long save of one rank, which the others wait for, ends the run."""
    codes, stderr, _ = run("pause", tmp_path)
    assert codes == [0, 0, 0], stderr
    assert stderr == ""


def test_a_process_that_was_stopped_as_a_whole_goes_on(tmp_path: Path) -> None:
    """Bug: a scheduler that suspends a job and lets it go on finds it dead: the clock went on."""
    script = f"""
import os, time
from openmoe.parallel.watchdog import Watchdog
with Watchdog(0, {TIMEOUT}, str):
    print("ready", flush=True)
    for _ in range(8):
        time.sleep(0.1)
print("alive", flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGSTOP)
    time.sleep(2 * TIMEOUT)
    os.kill(process.pid, signal.SIGCONT)
    assert process.communicate(timeout=30)[0] == "alive\n"


@pytest.mark.parametrize("beat", ["enter", "step"])
def test_whatever_begins_is_no_hang(beat: str) -> None:
    """Bug: a sign of life that the watchdog does not see, in a run of slow steps. It would end pytest."""
    with Watchdog(0, 0.4, describe) as watchdog:
        for number in range(8):
            time.sleep(0.1)
            watchdog.enter("world") if beat == "enter" else watchdog.step(number)


def test_other_errors_stay_what_they_are() -> None:
    """Bug: a full disk or a bad value is reported as another process's fault."""
    for error in (OSError(28, "No space left on device"), RuntimeError("shapes differ"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, Watchdog(0, 60, describe):
            raise error
        assert caught.value is error
    line = r"^rank 0: lost contact .* before the first step: x$"
    with pytest.raises(LostContact, match=line), Watchdog(0, 60, describe):
        raise dist.DistNetworkError("x")


def test_no_watchdog_takes_the_same_calls() -> None:
    """Bug: one process needs other code than many."""
    with NO_WATCHDOG as watchdog, watchdog.pause():
        watchdog.step(1)
        watchdog.enter("world", "all_reduce", 8)


def one_rank(case: str, folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=60)
    store = (folder / "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=limit)
    log = os.open(folder / f"log_{rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    with Watchdog(rank, TIMEOUT, describe, lambda: log) as watchdog:
        for step in range(1, 5):
            watchdog.step(step)
            for number in range(3):
                watchdog.enter("world", "all_reduce", 4)
                if step == 3 and number == 1:
                    with watchdog.pause() if case == "pause" else nullcontext():
                        if rank == 1:
                            hinder(case)
                        dist.all_reduce(torch.ones(1))
                else:
                    dist.all_reduce(torch.ones(1))
    dist.destroy_process_group()


def hinder(case: str) -> None:
    if case == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif case == "die":
        os._exit(9)
    else:
        time.sleep(2 * TIMEOUT)


def guarded(case: str, folder: Path, rank: int) -> None:
    try:
        one_rank(case, folder, rank)
    except LostContact as error:
        (folder / f"lost_{rank}").write_text(str(error))
        os._exit(5)


if __name__ == "__main__":
    context = multiprocessing.get_context("fork")
    arguments = (sys.argv[1], Path(sys.argv[2]))
    ranks = [context.Process(target=guarded, args=(*arguments, rank), daemon=True) for rank in range(RANKS)]
    start = time.monotonic()
    for process in ranks:
        process.start()
    for number in (0, 2):
        ranks[number].join(60)
    seconds = time.monotonic() - start
    if sys.argv[1] == "stop":
        ranks[1].kill()
    ranks[1].join(10)
    print(json.dumps({"codes": [process.exitcode for process in ranks], "seconds": seconds}))
