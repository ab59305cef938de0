"""Whole runs of several processes: every line of a run is the same under any layout, after any resume."""

import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .commands import Command, Commands, signal_before, wrap
from .conftest import STEPS, Small, lines

FP64 = ("train.precision=fp64", "train.validate_every_steps=4")
LAYOUTS = {
    "2 ranks: expert 2": ["parallel.expert=2"],
    "4 ranks: tensor 2, expert 4": ["parallel.tensor=2", "parallel.expert=4"],
    "4 ranks: replicate 2, expert 2": [
        "parallel.replicate=2",
        "parallel.expert=2",
        "parallel.recompute=full",
    ],
}


def start_run(
    commands: Commands,
    ranks: int,
    arguments: list[str],
    prelude: str = "",
    prelude_of: Callable[[int], str] | None = None,
) -> list[Command]:
    """`prelude` runs in the last rank, or `prelude_of(rank)` in each."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    common = {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "GLOO_SOCKET_IFNAME": "lo",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return [
        commands.start(
            *arguments,
            prelude=prelude_of(rank) if prelude_of else prelude if rank == ranks - 1 else "",
            **common,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
        )
        for rank in range(ranks)
    ]


def run(commands: Commands, ranks: int, arguments: list[str], prelude: str = "") -> list[Command]:
    """Runs to the end, which must be a good one; 0 ranks are one process without a launcher."""
    started = start_run(commands, ranks, arguments, prelude) if ranks else [commands.start(*arguments)]
    codes = [command.wait(120) for command in started]
    assert codes == [0] * len(codes), "".join(command.stderr for command in started)
    return started


def check_equal(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected)
    for line, wanted in zip(found, expected, strict=True):
        assert line.keys() == wanted.keys()
        for name, value in wanted.items():
            near = pytest.approx(value, rel=1e-10, abs=1e-10) if name != "objective" else value
            assert line[name] == near, (wanted["step"], name)


@pytest.fixture(scope="module")
def alone(small: Small, commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The lines of one process."""
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    run(commands, 0, small(run_dir, *FP64))
    return lines(run_dir)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_line_is_that_of_one_process(
    layout: str, small: Small, commands: Commands, tmp_path: Path, alone: list[dict[str, Any]]
) -> None:
    """Bug: a metric of one rank in place of all ranks' sum or mean, rows or held-back rows read twice or
    left out, a switch on another step, losses by local counts."""
    run_dir = tmp_path / "run"
    ranks = int(layout[0])
    started = run(commands, ranks, small(run_dir, *FP64, *LAYOUTS[layout]))
    check_equal(lines(run_dir), alone)
    assert sorted(path.name for path in (run_dir / "logs").iterdir()) == [
        f"rank_{rank:05d}.log" for rank in range(ranks)
    ]
    assert all(command.stderr == "" for command in started[1:])


def test_a_run_goes_on_under_other_layouts(
    small: Small, commands: Commands, tmp_path: Path, alone: list[dict[str, Any]]
) -> None:
    """Bug: a place in the data, optimizer statistics or counters that belong to a rank; a signal that stops
    one rank only, or ranks after different steps. The switch comes after step 6."""
    arguments = small(tmp_path / "run", *FP64, "checkpoint.resume=auto", "checkpoint.every_steps=0")
    for ranks, layout, step in ((4, LAYOUTS["4 ranks: tensor 2, expert 4"], 3), (2, [], 6), (0, [], 8)):
        if ranks:  # the last rank alone gets the signal, and steps are counted from this start
            done = len(lines(tmp_path / "run")) if (tmp_path / "run").exists() else 0
            stop = signal_before("openmoe.train.loop.train_step", step - done, signal.SIGTERM)
            started = run(commands, ranks, [*arguments, *layout], stop)
            assert "stopped by" in started[0].stderr
        else:
            run(commands, 0, [*arguments, f"train.steps={step}"])
        check_equal(lines(tmp_path / "run"), alone[:step])
    run(commands, 2, [*arguments, f"train.steps={STEPS}", "parallel.tensor=2"])
    check_equal(lines(tmp_path / "run"), alone)


def test_a_hang_between_copies_of_the_model(small: Small, commands: Commands, tmp_path: Path) -> None:
    """Bug: FSDP's own sum is reported under the group of the collective before it, so that nobody can tell
    which rank is late. Validation, in which these ranks send nothing, must not count as a hang."""
    arguments = small(tmp_path / "run", "parallel.replicate=2", "parallel.timeout_seconds=5")
    late = wrap("openmoe.train.loop.train_step", "if n == 3: time.sleep(60)\nreturn call()")
    started = start_run(commands, 2, arguments, late)
    assert [command.wait(60) for command in started] == [3, 3]
    assert "at step 3 after all_reduce in group replicate (ranks 0 1)" in started[0].stderr
    assert "at step 3 before" in started[1].stderr or "at step 3 after" in started[1].stderr
    assert "group replicate" not in started[1].stderr
