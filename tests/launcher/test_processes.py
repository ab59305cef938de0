"""Many processes are one run: they start together, fail together, with one line, and end together.

Each test starts real processes joined by gloo. What they do in place of a training is `body`, with the
config and the processes at hand.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from openmoe.launcher.entry import load_config
from openmoe.launcher.errors import ConfigError
from openmoe.launcher.processes import ALONE, pick_device
from openmoe.launcher.rendezvous import place_from, rank_list
from openmoe.launcher.sameness import describe_difference, differences, shared_keys, source_digest

from .commands import Commands, wait_for

TASK = """
import os, signal, sys, time
import torch, torch.distributed as dist
from openmoe.launcher import entry, train
rank = int(os.environ["RANK"])
{before}
def task(config, processes):
{body}
    print("trained", flush=True)
train.main = lambda: entry.run_joined(task, "config")
"""
START = 'processes.start("cpu")\n'
WATCHED = """
with processes.watchdog(lambda name: "ranks 0 1 2") as watchdog:
    for step in range(1, 100):
        watchdog.step(step)
        watchdog.enter("world", "all_reduce", 4)
        if step == 17 and rank == 1:
            {fault}
        dist.all_reduce(torch.ones(1))
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def program(body: str, before: str = "") -> str:
    return TASK.format(before=before, body=textwrap.indent(textwrap.dedent(body).strip() or "pass", "    "))


@dataclass
class Ended:
    codes: list[int]
    stderr: list[str]  # by rank
    stdout: list[str]
    seconds: float

    @property
    def errors(self) -> list[str]:
        """The lines that report one, of all ranks."""
        return [line for text in self.stderr for line in text.splitlines() if "error:" in line]

    @property
    def trained(self) -> list[bool]:
        return ["trained" in text for text in self.stdout]


Together = Callable[..., Ended]


@pytest.fixture
def together(commands: Commands, tmp_path: Path) -> Together:
    """together(ranks, body, ...) -> how they ended; the processes of a run of `world` with these ranks."""

    def run(
        ranks: int | list[int],
        body: str,
        *arguments: str,
        before: str = "",
        world: int | None = None,
        port: int | None = None,
        own: dict[int, list[str]] | None = None,  # arguments of one rank
        interfere: Callable[[list], None] | None = None,
        **environment: str,
    ) -> Ended:
        ranks = list(range(ranks)) if isinstance(ranks, int) else ranks
        common = {
            "WORLD_SIZE": str(world or len(ranks)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port or free_port()),
            "GLOO_SOCKET_IFNAME": "lo",
            "CUDA_VISIBLE_DEVICES": "",
        }
        start = time.monotonic()
        started = [
            commands.start(
                "experiment=tiny",
                f"run.dir={tmp_path / 'run'}",
                *arguments,
                *(own or {}).get(rank, []),
                prelude=program(body, before),
                **(common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} | environment),
            )
            for rank in ranks
        ]
        try:
            if interfere:
                interfere(started)
            codes = [command.wait(60) for command in started]
        finally:
            for command in started:
                if Path(f"/proc/{command.pid}").exists():
                    os.kill(command.pid, signal.SIGKILL)
        seconds = time.monotonic() - start
        return Ended(codes, [c.stderr for c in started], [c.stdout for c in started], seconds)

    return run


def wait_for_work(started: list) -> None:
    files = [command.folder / f"stdout{command.number}" for command in started]
    wait_for(lambda: all(file.exists() and "at work" in file.read_text() for file in files))


def check_refused(ended: Ended, *fragments: str, code: int = 2) -> str:
    """One line of the whole run, and all ranks gone with one code before they trained."""
    assert ended.codes == [code] * len(ended.codes), ended
    assert not any(ended.trained)
    assert len(ended.errors) == 1, ended.stderr
    assert "Traceback" not in "".join(ended.stderr)
    for fragment in fragments:
        assert fragment in ended.errors[0]
    return ended.errors[0]


def test_a_good_run(together: Together, tmp_path: Path) -> None:
    """Bug: processes that don't find each other, print over rank 0, hang or complain at the end."""
    body = """
        assert processes.start("cpu") == torch.device("cpu")
        assert dist.get_backend() == "gloo"
        processes.open_log(__import__("pathlib").Path(config.run.dir), "cpu, data rank %d" % rank)
        assert processes.agree(lambda: rank + 1) == rank + 1
        x = torch.tensor(2.0 ** rank)
        dist.all_reduce(x)
        assert x.item() == 7
        import warnings
        warnings.warn("mind this")
        processes.log.write("a word")
    """
    ended = together(3, body)
    assert ended.codes == [0, 0, 0], ended.stderr
    assert all(ended.trained)
    assert "mind this" in ended.stderr[0]
    assert ended.stderr[1:] == ["", ""]
    for rank in range(3):
        start, warning, *_, word = (tmp_path / f"run/logs/rank_{rank:05d}.log").read_text().splitlines()
        assert re.match(rf"\d{{4}}-.*\.\d{{3}} start of rank {rank} on .*: cpu, data rank {rank}$", start)
        assert "WARNING py.warnings: " in warning
        assert word.endswith("a word")


def test_one_process_of_one_has_a_group(together: Together) -> None:
    """Bug: the only GPU of a machine can't test what many do, since torchrun -n 1 counts as none."""
    ended = together(1, START + "assert dist.get_world_size() == 1")
    assert ended.codes == [0], ended.stderr


def test_without_a_launcher_there_is_no_group(commands: Commands, tmp_path: Path) -> None:
    """Bug: a plain run opens ports, or needs variables that nobody set."""
    body = START + "assert not dist.is_initialized() and processes.world_size == 1"
    prelude = program(body).replace('int(os.environ["RANK"])', "0")
    code, stderr = commands.run("experiment=tiny", f"run.dir={tmp_path}/run", prelude=prelude)
    assert (code, stderr) == (0, "")
    assert ALONE.first_of_node(lambda: 3) == ALONE.agree(lambda: 3) == 3


@pytest.mark.parametrize("start", ["", START], ids=["before the group", "with the group"])
def test_a_fault_of_one_rank_is_told_once(together: Together, start: str) -> None:
    """Bug: the other ranks go on, or wait; or each of 512 prints its own line."""
    fault = 'raise entry.ConfigError("run.dir=x: not writable") if rank in (1, 2) else KeyError'
    body = f"""
    def work():
        if rank: {fault}
    {start.strip() or "pass"}
    processes.agree(work)
    """
    line = check_refused(together(3, body))
    assert line == "error: rank 1: run.dir=x: not writable"


def test_a_fault_of_all_ranks_has_no_rank(together: Together) -> None:
    """Bug: a reader looks for what is wrong with rank 0."""
    line = check_refused(together(2, "", "train.steps=0"))
    assert line == "error: train.steps=0: input should be greater than 0"


def test_an_unforeseen_error_shows_its_traceback_once(together: Together) -> None:
    """Bug: a page from each rank, or none from any."""
    ended = together(2, START + "processes.agree(lambda: 1 // (1 - rank))")
    assert ended.codes == [3, 3]
    assert ended.stderr[0] == ""
    assert ended.stderr[1].startswith("rank 1: Traceback")
    assert ended.stderr[1].rstrip().endswith("ZeroDivisionError: integer division or modulo by zero")


def test_ranks_with_other_configs(together: Together) -> None:
    """Bug: ranks with other shapes wait for each other, or train on nonsense."""
    ended = together(3, START, "train.seq_len=256", own={2: ["train.seq_len=128", "run.seed=2"]})
    line = check_refused(ended)
    assert line == (
        "error: run.seed is 0 on ranks 0, 1 and 2 on rank 2; allowed the same on all (and 1 more differ)"
    )
    ended = together(3, START, own={1: ["train.seq_len=128"]})
    assert check_refused(ended).startswith("error: train.seq_len is 256 on ranks 0, 2 and 128 on rank 1;")


def test_ranks_may_keep_data_in_other_places(together: Together) -> None:
    """Bug: a node's own scratch disk as a cache is refused."""
    ended = together(2, "", own={1: ["data.cache_dir=/elsewhere"]})
    assert ended.codes == [0, 0], ended.stderr


def test_ranks_with_other_versions(together: Together) -> None:
    """Bug: a node with an old installation reads a key or a row otherwise; or its unknown keys are reported
    where the installation is to blame."""
    before = """
if rank == 1:
    right = entry.versions
    entry.versions = lambda: right() | {"the version of torch": "2.4.0"}
    sys.argv.append("+train.new_key=1")
"""
    line = check_refused(together(2, "", before=before))
    assert line.startswith(
        f"error: the version of torch is {torch.__version__} on rank 0 and 2.4.0 on rank 1"
    )


def test_a_missing_rank(together: Together) -> None:
    """Bug: the others wait for ever, or each complains, or nobody says who is missing."""
    ended = together([0, 2], "", "parallel.start_timeout_seconds=1.5", world=4)
    line = check_refused(ended, "WORLD_SIZE=4")
    assert line.startswith("error: WORLD_SIZE=4: 2 of 4 processes came within 1.5 seconds")
    assert line.endswith("missing: ranks 1, 3")
    assert ended.seconds < 10


def test_rank_0_is_missing(together: Together) -> None:
    """Bug: pages of the store's retries; the address that was tried stays unknown."""
    port = free_port()
    ended = together([1], "", "parallel.start_timeout_seconds=1", world=2, port=port)
    line = check_refused(ended, f"MASTER_ADDR=127.0.0.1 MASTER_PORT={port}", "within 1 seconds", "rank 0")
    assert line.startswith("error: rank 1: ")
    assert ended.stderr[0].count("\n") == 1


def test_a_port_in_use(together: Together) -> None:
    """Bug: torch's pages; or a rank that waits for ever for an answer of what else listens there."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        ended = together(2, "", "parallel.start_timeout_seconds=1", port=port)
    where = f"MASTER_ADDR=127.0.0.1 MASTER_PORT={port}"
    assert ended.codes == [2, 2]
    assert ended.stderr[0] == f"error: {where}: rank 0 can't listen there: the port is in use\n"
    # Rank 1 has nobody to agree with; a launcher has ended it before.
    assert ended.stderr[1] == f"error: rank 1: {where}: what listens there is not rank 0 of this run\n"


def test_two_processes_with_one_rank(together: Together) -> None:
    """Bug: a wrong variable in a job script shows as a rank that is missing."""
    ended = together([0, 1, 1], "", world=3)
    check_refused(ended, "RANK=1: two processes have it")


def test_what_is_prepared_first(together: Together, tmp_path: Path) -> None:
    """Bug: every rank tokenises the corpus; or the others give up meanwhile, or print about it too."""
    body = f"""
        processes.start("cpu")
        def work():
            print("preparing", file=sys.stderr)
            if processes.local_rank == 0:
                time.sleep(2)
                open({str(tmp_path / "cache")!r} + str(rank // 2), "x").close()
            return os.path.exists({str(tmp_path / "cache")!r} + str(rank // 2))
        assert processes.first_of_node(work) is True
    """
    two_nodes = 'os.environ["LOCAL_RANK"] = str(rank % 2)'
    ended = together(4, body, "parallel.timeout_seconds=0.5", before=two_nodes)
    assert ended.codes == [0] * 4, ended.stderr
    assert ended.stderr == ["preparing\n", "", "", ""]


def test_a_fault_while_preparing_is_not_waited_for(together: Together) -> None:
    """Bug: a bad corpus is found by the first rank, and the others look for its results for days."""
    body = """
        processes.start("cpu")
        def work():
            if rank == 0:
                raise entry.ConfigError("data.root=/nowhere: no such folder")
            open("/tmp/never", "r")
        processes.first_of_node(work)
    """
    line = check_refused(together(2, body))
    assert line == "error: rank 0: data.root=/nowhere: no such folder"


def test_a_rank_that_dies_while_others_wait(together: Together) -> None:
    """Bug: the days that a preparation may take are waited for a process that the kernel has killed."""
    body = START + "processes.agree(lambda: os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else None)"
    ended = together(3, body)
    assert ended.codes == [3, -signal.SIGKILL, 3], ended
    assert len(ended.errors) == 1, ended.stderr
    assert re.match(r"error: rank [02]: lost contact with another process: ", ended.errors[0])


def test_a_full_disk_of_one_rank(together: Together, tmp_path: Path) -> None:
    """Bug: the others' complaints hide what happened; one of them waits for the dead."""
    log = 'processes.open_log(__import__("pathlib").Path(config.run.dir), "")\n'
    fault = 'raise OSError(28, "No space left on device")'
    ended = together(3, START + log + WATCHED.format(fault=fault))
    line = check_refused(ended, code=3)
    assert line == "error: rank 1: [Errno 28] No space left on device"
    for rank in (0, 2):
        log_text = (tmp_path / f"run/logs/rank_{rank:05d}.log").read_text()
        assert f"rank {rank}: lost contact with another process at step 17 in group world" in log_text
        assert "Traceback" in log_text
    own_log = (tmp_path / "run/logs/rank_00001.log").read_text()
    assert "Traceback" in own_log
    assert own_log.endswith("No space left on device\n")


def test_the_cause_is_told_before_what_follows(together: Together) -> None:
    """Bug: the line is of a rank that lost contact, because the one that failed takes its time."""
    fault = 'dist.destroy_process_group(); time.sleep(0.5); raise OSError(28, "No space left on device")'
    ended = together(3, START + WATCHED.format(fault=fault))
    assert check_refused(ended, code=3) == "error: rank 1: [Errno 28] No space left on device"


def test_a_rank_that_is_killed(together: Together) -> None:
    """Bug: a traceback of gloo from every rank, without rank, step and group."""
    ended = together(3, START + WATCHED.format(fault="os.kill(os.getpid(), signal.SIGKILL)"))
    assert ended.codes == [3, -signal.SIGKILL, 3], ended
    assert len(ended.errors) == 1, ended.stderr
    line = (
        r"error: rank [02]: lost contact with another process at step 17 in group world \(ranks 0 1 2\): \w"
    )
    assert re.match(line, ended.errors[0])
    assert "Traceback" not in "".join(ended.stderr)


def test_rank_0_is_killed(together: Together) -> None:
    """Bug: the store died with rank 0, and the others print pages or hang when they ask it."""
    watched = WATCHED.format(fault="pass").replace("rank == 1:\n            pass", "rank == 0: os._exit(9)")
    assert "rank == 0" in watched
    ended = together(3, START + watched)
    assert ended.codes == [9, 3, 3], ended
    assert 1 <= len(ended.errors) <= 2  # they have no way to agree any more
    assert "".join(ended.stderr).count("\n") == len(ended.errors), ended.stderr


def test_what_all_ranks_find_is_told_once(together: Together) -> None:
    """Bug: a loss that is NaN is reported by each of 512 ranks; or a process that has failed stays, as
    something of it still goes on."""
    late = "time.sleep(0 if rank == 1 else 1)\nfrom openmoe.train.loop import NonFiniteLoss\n"
    late += "import threading; threading.Thread(target=time.sleep, args=(100,)).start()\n"
    body = START + late + 'raise NonFiniteLoss("loss=nan at step 3")'
    ended = together(3, body)
    assert check_refused(ended, code=3) == "error: loss=nan at step 3"


def test_a_rank_that_hangs(together: Together, tmp_path: Path) -> None:
    """Bug: the watchdog of a run is not the one of its config, has no log, or takes long work for a hang."""
    begin, loop = WATCHED.format(fault="time.sleep(60)").split("as watchdog:\n")
    patient = """
    processes.agree(lambda: time.sleep(2 * rank))
    processes.open_log(__import__("pathlib").Path(config.run.dir), "")
"""
    body = f"{START}{begin}as watchdog:{patient}{loop}"
    ended = together(3, body, "parallel.timeout_seconds=1")
    assert ended.codes == [3, 3, 3]
    assert ended.seconds < 30
    assert len(ended.errors) == 3
    for rank, line in enumerate(ended.errors):
        assert line.startswith(
            f"error: rank {rank}: nothing has moved for 1 s at step 17 after all_reduce in"
        )
        log = (tmp_path / f"run/logs/rank_{rank:05d}.log").read_text()
        assert line in log
        assert "Thread" in log


def test_ctrl_c(together: Together) -> None:
    """Bug: Ctrl-C leaves processes behind, or a traceback of each."""

    def interrupt(started: list) -> None:
        wait_for_work(started)
        for command in started:
            command.kill(signal.SIGINT)

    body = START + 'print("at work", flush=True)\nwhile True: dist.all_reduce(torch.ones(1))'
    ended = together(2, body, interfere=interrupt)
    assert all(code in (130, 3) for code in ended.codes), ended
    assert 130 in ended.codes
    assert "Traceback" not in "".join(ended.stderr)


@pytest.mark.parametrize("asked", [[1], [0, 1, 2]], ids=["one", "all"])
def test_sigterm_to_some_ranks_ends_all_after_the_same_step(together: Together, asked: list[int]) -> None:
    """Bug: ranks leave after different steps and the last ones wait for the first; exit codes differ."""
    body = START + textwrap.dedent("""
    from openmoe.train.signals import StopSignals
    with StopSignals() as stop:
        print("at work", flush=True)
        step, left = 0, None
        while left is None:
            step += 1
            sums = torch.tensor([stop.vote(), 1.0])
            time.sleep(0.01 * rank)
            dist.all_reduce(sums)
            left = stop.agreed(sums[0].item())
        print("left after", step, flush=True)
    """)

    def terminate(started: list) -> None:
        wait_for_work(started)
        for rank in asked:
            started[rank].kill(signal.SIGTERM)

    ended = together(3, body, interfere=terminate)
    assert ended.codes == [0, 0, 0], ended.stderr
    assert ended.stdout[0] == ended.stdout[1] == ended.stdout[2]
    assert ended.stderr == ["", "", ""]


GOOD = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1", "MASTER_ADDR": "host", "MASTER_PORT": "29500"}
BAD = [
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: allowed a number from 1"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: allowed a number from 1"),
    ({"WORLD_SIZE": ""}, "WORLD_SIZE: missing"),
    ({"WORLD_SIZE": "²"}, "WORLD_SIZE=²: allowed"),
    ({"RANK": "4"}, "RANK=4: allowed a number from 0 to 3"),
    ({"RANK": "-1"}, "RANK=-1: allowed"),
    ({"RANK": ""}, "RANK: missing, but WORLD_SIZE=4 says"),
    ({"LOCAL_RANK": "x"}, "LOCAL_RANK=x: allowed"),
    ({"MASTER_ADDR": ""}, "MASTER_ADDR: missing"),
    ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536: allowed a number from 1 to 65535"),
    ({"MASTER_PORT": "29500.0"}, "MASTER_PORT=29500.0: allowed"),
]


@pytest.mark.parametrize(("changed", "line"), BAD, ids=[line for _, line in BAD])
def test_places_that_cannot_be(changed: dict[str, str], line: str) -> None:
    """Bug: a traceback of int(), or a wait for a rank that can't come."""
    with pytest.raises(ConfigError, match=f"^{re.escape(line)}"):
        place_from(GOOD | changed)


def test_places() -> None:
    """Bug: a variable read for another; a run without a launcher that looks for one."""
    place = place_from(GOOD)
    assert place is not None
    assert (place.rank, place.world_size, place.local_rank, place.port) == (3, 4, 1, 29500)
    assert not place.store_is_there
    assert place_from({name: text for name, text in GOOD.items() if name != "WORLD_SIZE"}) is None


@pytest.mark.parametrize(
    ("ranks", "text"),
    [([3], "rank 3"), ([0, 1], "ranks 0, 1"), ([0, 1, 2, 5, 8, 9], "ranks 0-2, 5, 8, 9")],
)
def test_rank_lists(ranks: list[int], text: str) -> None:
    """Bug: 511 numbers in a line."""
    assert rank_list(ranks) == text


def test_differences() -> None:
    """Bug: a key that only some ranks have passes for equal; 1 passes for True."""
    reference = {"a": 1, "b": "x", "c": None}
    others = [differences(own, reference) for own in (reference, {"a": 1, "b": "x"}, reference | {"d": 2})]
    assert describe_difference(reference, others) == (
        "c is null on ranks 0, 2 and not set on rank 1; allowed the same on all (and 1 more differ)"
    )
    assert describe_difference(reference, [{}, {}]) is None
    assert differences({"a": True}, {"a": 1}) == {"a": True}


def test_shared_keys_are_all_but_a_nodes_own() -> None:
    """Bug: a section that is left out, so ranks may differ in it."""
    keys = shared_keys(load_config([]))
    assert keys["train.seq_len"] == 256
    assert keys["curriculum[0].objective"] == "ul2"
    assert keys["parallel.timeout_seconds"] == 600
    assert "data.cache_dir" not in keys


def test_the_digest_is_of_the_rooms_source(tmp_path: Path) -> None:
    """Bug: an edited file, or a renamed one, that the digest does not see; a run's output that it does."""
    for room in ("model", "tests"):
        (tmp_path / room).mkdir()
        (tmp_path / room / "__init__.py").touch()
    file = tmp_path / "model/layer.py"
    file.write_text("x = 1\n")
    first = source_digest(tmp_path)
    (tmp_path / "tests/test_x.py").write_text("y")
    (tmp_path / "model/layer.pyc").write_text("y")
    assert source_digest(tmp_path) == first
    file.rename(tmp_path / "model/other.py")
    renamed = source_digest(tmp_path)
    (tmp_path / "model/other.py").write_text("x = 2\n")
    assert len({first, renamed, source_digest(tmp_path)}) == 3


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: two processes on one GPU, or an error of CUDA where there are too few."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto", 1) == torch.device("cuda", 1)
    assert pick_device("cpu", 5) == torch.device("cpu")
    assert pick_device("auto", None) == torch.device("cuda")
    with pytest.raises(ConfigError, match=r"^LOCAL_RANK=2: allowed below 2"):
        pick_device("cuda", 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto", 5) == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"^run\.device=cuda: no CUDA device here"):
        pick_device("cuda", 0)


TORCHRUN = {
    "a rank that never comes": (
        "if rank == 1: time.sleep(60)",
        ["parallel.start_timeout_seconds=1"],
        "error: WORLD_SIZE=2: 1 of 2 processes came within 1 seconds (parallel.start_timeout_seconds); "
        "missing: rank 1",
    ),
    "no number of processes": (
        'os.environ["WORLD_SIZE"] = "two"',
        [],
        "error: WORLD_SIZE=two: allowed a number",
    ),
}


def test_with_the_store_of_torchrun(together: Together) -> None:
    """Bug: what holds where rank 0 keeps the store does not where torchrun does, and keeps it from start to
    start."""
    agent = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    kept = {"port": agent.port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    line = check_refused(together(2, START, "train.steps=0", **kept))
    assert line == "error: train.steps=0: input should be greater than 0"
    ended = together(2, START, own={1: ["train.seq_len=128"]}, **kept)
    assert check_refused(ended).startswith("error: train.seq_len is 256 on rank 0 and 128 on rank 1")
    ended = together(2, START, **kept)
    assert ended.codes == [0, 0], ended.stderr


@pytest.mark.slow
@pytest.mark.parametrize("case", TORCHRUN)
def test_under_torchrun(case: str, tmp_path: Path) -> None:
    """Bug: what holds for processes started by hand does not for those of torchrun, which keeps the store."""
    before, arguments, line = TORCHRUN[case]
    script = tmp_path / "train.py"
    script.write_text(program(START, before) + "\ntrain.main()\n")
    ended = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
            "--master-port", str(free_port()), script,
            "experiment=tiny", f"run.dir={tmp_path}/run", *arguments,
        ],
        timeout=90, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert ended.returncode != 0
    assert "trained" not in ended.stdout
    lines = [text for text in ended.stderr.splitlines() if text.startswith("error:")]
    assert len(lines) == 1, ended.stderr
    assert lines[0].startswith(line)
    assert "exitcode  : 2" in ended.stderr  # torchrun's own report
    assert not (tmp_path / "run").exists()
