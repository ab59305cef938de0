"""The process of a host: its environment, its supervision, and how the hosts of a pod agree."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from openmoe.launcher import lives, supervisor
from openmoe.launcher.errors import ConfigError, failure_of
from openmoe.launcher.lives import LostHosts
from openmoe.launcher.rendezvous import place_from
from openmoe.launcher.tpu_host import V3_CORES, Slice, count_chips, find_host
from openmoe.launcher.xla_spawn import spawn

# In place of openmoe.launcher.train: writes down what it was given, then does what the test says.
STAND_IN = """
import json, os, pathlib, signal, sys, time
folder, rank = pathlib.Path(os.environ["FOLDER"]), os.environ.get("RANK", "0")
life = len(list(folder.glob(f"start-{rank}-*")))
start = folder / f"start-{rank}-{life}"
start.with_suffix(".new").write_text(json.dumps({"pid": os.getpid(), "argv": sys.argv[1:], **os.environ}))
start.with_suffix(".new").rename(start)
exec(os.environ["SCRIPT"])
"""
SAVES = (
    "def save(*_):\n"
    "    folder.joinpath('saved').touch()\n"
    "    pathlib.Path(os.environ['OPENMOE_STOPPED_FILE']).touch()\n"
    "    sys.exit(0)\n"
    "signal.signal(signal.SIGTERM, save)\n"
)
WAITS = "folder.joinpath(f'ready-{rank}-{life}').touch()\ntime.sleep(30)\n"

Environment = Callable[..., dict[str, str]]


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Environment:
    """The environment of a stand-in that runs this script."""
    (tmp_path / "standin.py").write_text(STAND_IN)
    monkeypatch.setattr(supervisor, "_PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(supervisor, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(supervisor, "_SETTLE_SECONDS", 0.5)
    monkeypatch.setattr(supervisor, "_GRACE_SECONDS", 1.0)

    def of(script: str, **more: str) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(tmp_path),
            "FOLDER": str(tmp_path),
            "SCRIPT": script,
            **more,
        }

    return of


def run(environment: Mapping[str, str], *arguments: str, chips: int = 0) -> int:
    return spawn(arguments, environment, engine="torch", module="standin", chips=chips)


def starts(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob(f"start-{rank}-[0-9]"))]


def once_there(path: Path, act: Callable[[], None]) -> threading.Thread:
    """`act` as soon as the file exists."""

    def wait() -> None:
        limit = time.monotonic() + 30
        while not path.exists() and time.monotonic() < limit:
            time.sleep(0.01)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def signal_me(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


# What a host is


def pod(rank: int, hosts: str = "10.0.0.1,10.0.0.2,10.0.0.3,10.0.0.4", kind: str = "v3-32") -> dict[str, str]:
    return {"TPU_WORKER_ID": str(rank), "TPU_WORKER_HOSTNAMES": hosts, "TPU_ACCELERATOR_TYPE": kind}


def test_virtual_devices() -> None:
    """Bug: a host without TPU that trains on one device though more were asked for, or a device count of the
    environment that is lost."""
    assert find_host({}, 8, 0).variables == {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "8"}
    assert find_host({"CPU_NUM_DEVICES": "4"}, None, 0).variables["CPU_NUM_DEVICES"] == "4"
    assert find_host({}, None, 0).variables["CPU_NUM_DEVICES"] == "1"
    assert find_host({"PJRT_DEVICE": "CPU"}, 2, 4).variables["PJRT_DEVICE"] == "CPU"
    assert find_host({}, 8, 0).hosts == 1


def test_a_tpu_host_alone() -> None:
    """Bug: cores counted as chips; a part of a TPU that XLA does not learn of."""
    v3_8 = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v3-8"}
    for devices in (None, 8):
        assert find_host(v3_8, devices, 4).variables == {"PJRT_DEVICE": "TPU"}
    assert find_host(v3_8, 2, 4).variables == {
        "PJRT_DEVICE": "TPU",
        "TPU_VISIBLE_CHIPS": "0",
        "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1",
        "TPU_PROCESS_BOUNDS": "1,1,1",
    }
    assert "2 of them here" in find_host(v3_8 | {"TPU_VISIBLE_CHIPS": "3"}, None, 4).text


def test_a_pod_by_environment() -> None:
    """Bug: the hosts in another order, or host 0 at the address of this one; ports of XLA's own taken for
    parts of an address."""
    host = find_host(pod(2), None, 4)
    assert (host.rank, host.hosts, host.addresses[0], host.port) == (2, 4, "10.0.0.1", 29500)
    addresses = {"TPU_PROCESS_ADDRESSES": "10.0.0.1:8476,10.0.0.2:8476,10.0.0.3:8476,10.0.0.4:8476"}
    tasks = {"CLOUD_TPU_TASK_ID": "2", "TPU_ACCELERATOR_TYPE": "v3-32"}
    assert find_host({**addresses, **tasks, "MASTER_PORT": "4000"}, 8, 4).addresses == host.addresses


class Metadata(BaseHTTPRequestHandler):
    """Google's metadata server, for the third host of a v3-32."""

    answers = {  # noqa: RUF012
        "tpu-env": "ACCELERATOR_TYPE: 'v3-32'\nNODE_ID: 'pod'\nWORKER_ID: '2'\nTPU_TOPOLOGY: '4x4'\n",
        "agent-worker-number": "2",
        "worker-network-endpoints": ",".join(f"unused:8470:10.0.0.{number}" for number in (1, 2, 3, 4)),
    }

    def do_GET(self) -> None:
        name = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
        found = self.answers.get(name) if self.headers["Metadata-Flavor"] == "Google" else None
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write((found or "").encode())

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def metadata() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_pod_by_metadata(metadata: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: on a Cloud TPU VM, whose environment says nothing, each host trains alone; a proxy is asked for
    the metadata of this machine."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    for key in ("GCE_METADATA_HOST", "GCE_METADATA_IP"):
        host = find_host({key: metadata}, None, 4)
        assert (host.rank, host.addresses) == (2, ("10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4"))
        assert host.text == "v3-32: 4 hosts, 16 chips, 32 cores; host 2 (10.0.0.3) has 8"
    # a worker that is asked to be one by itself is not looked up
    assert find_host({"GCE_METADATA_HOST": metadata, **pod(1)}, None, 4).rank == 1


def test_chips_are_counted_on_the_bus(tmp_path: Path) -> None:
    """Bug: Google's network adapter, or another vendor's device of that number, taken for a TPU."""
    for name, vendor, device in (
        ("a", "0x1ae0", "0x0027"),
        ("b", "0x1ae0", "0x0042"),
        ("c", "0x8086", "0x0027"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(f"{vendor}\n")
        (tmp_path / name / "device").write_text(f"{device}\n")
    assert count_chips(tmp_path) == 1


def test_hosts_of_a_slice() -> None:
    """Bug: v3-N taken for N chips; facts: torch_xla's table of host bounds."""
    assert [Slice(cores).hosts for cores in V3_CORES] == [1, 4, 8, 16, 32, 64, 128, 256]
    assert Slice(128).describe() == "v3-128: 16 hosts, 64 chips, 128 cores"


BAD = {
    "too many": ({}, ["--devices=128"], 0, "--devices=128: allowed a number from 1 to 127"),
    "none": ({}, ["--devices=0"], 0, "--devices=0: allowed a number from 1 to 127"),
    "no number": ({}, ["--devices=all"], 0,
        "argument --devices: invalid int value: 'all'; --help shows what is allowed"),
    "count": ({"CPU_NUM_DEVICES": "x"}, [], 0, "CPU_NUM_DEVICES=x: allowed a number from 1 to 127"),
    "kind": ({"PJRT_DEVICE": "CUDA"}, [], 0, "PJRT_DEVICE=CUDA: allowed TPU or CPU"),
    "no TPU": ({"PJRT_DEVICE": "TPU"}, [], 0,
        "PJRT_DEVICE=TPU: no TPU chip on the PCI bus here; allowed CPU, or unset"),
    "started twice": ({"WORLD_SIZE": "4"}, [], 0,
        "WORLD_SIZE=4: allowed unset; xla_spawn starts the one process of its host by itself, and "
        "finds the other hosts"),
    "cores": (pod(0, "a", "v3-8"), ["--devices=16"], 4,
        "--devices=16: allowed 8, the cores of this TPU or 2 (one chip)"),
    "cores of a pod": (pod(0), ["--devices=2"], 4, "--devices=2: allowed 8, all of each host of a v3-32"),
    "chips of a pod": (pod(0), [], 3, "v3-32: this host shows 3 chips; allowed 4"),
    "type": (pod(0, kind="v3-16"), [], 4,
        "TPU_ACCELERATOR_TYPE=v3-16: allowed v3-8, v3-32, v3-64, v3-128, v3-256, v3-512, v3-1024, "
        "v3-2048"),
    "no type": ({"TPU_WORKER_HOSTNAMES": "a"}, [], 4,
        "TPU_ACCELERATOR_TYPE: missing, but TPU_WORKER_HOSTNAMES is set; allowed v3-8, v3-32, ..."),
    "hosts": (pod(0, "a,b"), [], 4,
        "TPU_ACCELERATOR_TYPE=v3-32: has 4 hosts of 8 cores, but 2 are named: a, b"),
    "a host twice": (pod(0, "a,b,c,a"), [], 4,
        "TPU_WORKER_HOSTNAMES=a,b,c,a: allowed the hosts of the slice, each once; XLA has one "
        "process on each"),
    "number": (pod(4), [], 4, "TPU_WORKER_ID=4: allowed a number from 0 to 3"),
    "no host number": (pod(0) | {"TPU_WORKER_ID": ""}, [], 4,
        "TPU_WORKER_ID: missing, but several hosts are named; allowed this host's number"),
    "two numbers": (pod(0) | {"CLOUD_TPU_TASK_ID": "1"}, [], 4,
        "TPU_WORKER_ID=0: allowed CLOUD_TPU_TASK_ID=1, or one of the two"),
    "port": (pod(0) | {"MASTER_PORT": "0"}, [], 4, "MASTER_PORT=0: allowed a number from 1 to 65535"),
    "no metadata": ({"GCE_METADATA_HOST": "127.0.0.1:9"}, [], 4,
        "metadata server 127.0.0.1:9: gives no tpu-env (<urlopen error [Errno 111] Connection "
        "refused>); where there is none, set TPU_WORKER_ID, TPU_WORKER_HOSTNAMES and "
        "TPU_ACCELERATOR_TYPE"),
    "option": ({}, ["--cores=8", "experiment=tiny"], 0,
        "unrecognized arguments: --cores=8; --help shows what is allowed"),
    "restarts": ({}, ["--max-restarts=-1"], 0, "--max-restarts=-1: allowed 0 to 1000"),
    "engine": ({}, ["parallel.engine=deepspeed"], 0,
        "parallel.engine=deepspeed: allowed torch, or to leave it out"),
    "path": ({}, ["--max-restarts=2", "checkpoint.resume=/a/b"], 0,
        "checkpoint.resume=/a/b: allowed none or auto with --max-restarts=2; each new start goes on "
        "from the newest checkpoint in run.dir"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, environment: Environment, tmp_path: Path) -> None:
    """Bug: a run on fewer devices than asked for, hosts that wait for each other in vain, or a traceback."""
    variables, arguments, chips, line = BAD[case]
    with pytest.raises(ConfigError) as error:
        run(environment("", **variables), *arguments, chips=chips)
    assert failure_of(error.value).text() == f"error: {line}"
    assert not starts(tmp_path)


def test_without_torch_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a user without the extra reads a traceback of another process."""
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(
        ConfigError, match=r"^torch_xla: is not installed here; allowed `pip install 'openmoe\[tpu\]'`"
    ):
        spawn(["experiment=tiny"], {}, chips=0)


# The supervision of one process


def test_what_the_run_is_given(environment: Environment, tmp_path: Path) -> None:
    """Bug: an override that loses its quotes, an option of the launcher that reaches the run, or one of the
    run's that does not; a process that believes it is one of several."""
    overrides = ["curriculum=[{mix: {alpha: 1}, until_steps: 4}]", "run.dir=a b", "--cfg", "job"]
    assert run(environment(""), "--devices=8", *overrides) == 0
    assert run(environment(""), "--devices", "2", "--", "--cfg", "job", "parallel.engine=torch") == 0
    first, second = starts(tmp_path)
    assert first["argv"] == [*overrides, "parallel.engine=torch"]
    assert second["argv"] == ["--cfg", "job", "parallel.engine=torch"]
    assert (first["PJRT_DEVICE"], first["CPU_NUM_DEVICES"], second["CPU_NUM_DEVICES"]) == ("CPU", "8", "2")
    assert place_from(first) is None


@pytest.mark.parametrize(
    ("script", "restarts", "code", "lives"),
    [
        ("sys.exit(0)", 3, 0, 1),
        ("sys.exit(2)", 3, 2, 1),
        ("sys.exit(3)", 0, 3, 1),
        ("sys.exit(3)", 2, 3, 3),
        ("sys.exit(3 * (life < 2))", 5, 0, 3),
        ("life or os.kill(os.getpid(), signal.SIGKILL)", 1, 0, 2),
        ("os.abort()", 1, 3, 2),
        ("sys.exit(3 - life)", 5, 2, 2),
    ],
)
def test_codes_and_restarts(
    script: str, restarts: int, code: int, lives: int, environment: Environment, tmp_path: Path
) -> None:
    """Bug: a fault of the input tried again and again; a killed run that is not; one start too many; a
    restart that begins from nothing, or a first start that goes on from what it finds."""
    assert run(environment(script), f"--max-restarts={restarts}", "run.dir=x") == code
    found = starts(tmp_path)
    assert len(found) == lives
    for life, start in enumerate(found):
        assert start["argv"] == [
            "run.dir=x",
            "parallel.engine=torch",
            *["checkpoint.resume=auto"] * (life > 0),
        ]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_the_run_save(number: int, environment: Environment, tmp_path: Path) -> None:
    """Bug: the launcher goes and leaves its process, kills it before it has saved, or starts it again."""
    sender = once_there(tmp_path / "ready-0-0", signal_me(number))
    assert run(environment(SAVES + WAITS), "--max-restarts=3") == 0
    sender.join()
    assert (tmp_path / "saved").exists()
    assert len(starts(tmp_path)) == 1


def test_a_signal_before_there_is_anything_to_save(
    environment: Environment, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Bug: a run that is stopped in its first seconds counts as failed and is started again."""
    sender = once_there(tmp_path / "ready-0-0", signal_me(signal.SIGTERM))
    assert run(environment(WAITS), "--max-restarts=3") == 128 + signal.SIGTERM
    sender.join()
    assert len(starts(tmp_path)) == 1
    assert "start 2" not in capfd.readouterr().err


def test_ctrl_c_twice(environment: Environment, tmp_path: Path) -> None:
    """Bug: Ctrl-C of a terminal counts twice, and the run is cut off before it has saved; a second one that
    does not reach it."""
    counts = (
        "def stop(*_):\n"
        "    folder.joinpath('saving').touch()\n"
        "    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))\n"
        "signal.signal(signal.SIGINT, stop)\n"
    )
    wait_twice = "folder.joinpath('ready-0-0').touch()\nfor _ in range(300): time.sleep(0.1)\n"
    first = once_there(tmp_path / "ready-0-0", signal_me(signal.SIGINT))
    second = once_there(tmp_path / "saving", signal_me(signal.SIGINT))
    assert run(environment(counts + wait_twice), "--max-restarts=3") == 130
    first.join()
    second.join()
    (start,) = starts(tmp_path)
    assert start["pid"] != os.getpid()


def test_in_a_group_of_its_own(environment: Environment, tmp_path: Path) -> None:
    """Bug: a terminal sends Ctrl-C to the launcher's group, so the run gets it twice and stops unsaved."""
    assert run(environment("folder.joinpath('group').write_text(str(os.getpgrp()))")) == 0
    assert int((tmp_path / "group").read_text()) == starts(tmp_path)[0]["pid"]


def test_a_killed_launcher_takes_its_run_along(environment: Environment, tmp_path: Path) -> None:
    """Bug: a run that nobody watches over holds the devices for days."""
    launcher = fork(environment(SAVES + WAITS))
    once_there(tmp_path / "ready-0-0", lambda: os.kill(launcher.pid or 0, signal.SIGKILL)).join()
    launcher.join(30)
    once_there(tmp_path / "saved", lambda: None).join()
    assert (tmp_path / "saved").exists()


# Hosts together


def fork(environment: dict[str, str], *arguments: str, chips: int = 0) -> Any:
    def main() -> None:
        try:
            code = run(environment, *arguments, chips=chips)
        except (ConfigError, LostHosts) as error:
            print(failure_of(error).text(), file=sys.stderr)
            code = failure_of(error).code
        sys.stderr.flush()
        os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    return process


HOSTS = 4


@pytest.fixture
def four(environment: Environment, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[Any]]]:
    """Starts the four hosts of a v3-32, or some of them, with a script for each."""
    monkeypatch.setattr(lives, "_LOOK_SECONDS", 0.02)
    started: list[Any] = []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    names = ",".join(f"127.0.0.{number + 1}" for number in range(HOSTS))

    def start(scripts: str | dict[int, str], *arguments: str, ranks: range = range(HOSTS)) -> list[Any]:
        for rank in ranks:
            script = scripts if isinstance(scripts, str) else scripts.get(rank, scripts[-1])
            started.append(
                fork(environment(script, **pod(rank, names), MASTER_PORT=port), *arguments, chips=4)
            )
        return started

    yield start
    for process in started:
        if process.is_alive():
            process.terminate()
            process.join(5)
            process.kill()


def codes(hosts: list[Any]) -> list[int]:
    for host in hosts:
        host.join(60)
    return [host.exitcode for host in hosts]


def test_hosts_of_a_pod_get_their_places(four: Callable[..., list[Any]], tmp_path: Path) -> None:
    """Bug: hosts that do not find each other, all be rank 0, or restart counts that train does not see."""
    assert codes(four("sys.exit(0)")) == [0] * HOSTS
    for rank in range(HOSTS):
        (start,) = starts(tmp_path, rank)
        place = place_from(start)
        assert place is not None
        assert (place.rank, place.world_size, place.local_rank, place.address) == (
            rank,
            HOSTS,
            0,
            "127.0.0.1",
        )
        assert place.store_is_there
        assert start["PJRT_DEVICE"] == "TPU"


def test_one_failed_host_restarts_all(four: Callable[..., list[Any]], tmp_path: Path) -> None:
    """Bug: the processes of other hosts wait for a dead one until their timeout; one failure that counts once
    a host, or hosts in different lives."""
    fails = "life or sys.exit(3)\n"
    hosts = four({2: fails, -1: "life or time.sleep(60)\n"}, "--max-restarts=1", "run.dir=x")
    assert codes(hosts) == [0] * HOSTS
    for rank in range(HOSTS):
        first, second = starts(tmp_path, rank)
        assert [first["TORCHELASTIC_RESTART_COUNT"], second["TORCHELASTIC_RESTART_COUNT"]] == ["0", "1"]
        assert "checkpoint.resume=auto" not in first["argv"]
        assert second["argv"][-1] == "checkpoint.resume=auto"


def test_no_start_left_ends_all(four: Callable[..., list[Any]], tmp_path: Path) -> None:
    """Bug: one host gives up and the others go on waiting, or say that all is well."""
    hosts = four({1: "sys.exit(3)", -1: "time.sleep(60)"}, "--max-restarts=1")
    assert codes(hosts) == [3] * HOSTS
    assert [len(starts(tmp_path, rank)) for rank in range(HOSTS)] == [2] * HOSTS


def test_a_fault_of_the_input_ends_all(
    four: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Bug: the other hosts take the exit of one that found a fault for a failure, and start again; or lose
    contact with host 0, which did not wait until they had read the end."""
    monkeypatch.setattr(supervisor, "_LOOK_SECONDS", 0.7)
    hosts = four({1: "sys.exit(2)", -1: "time.sleep(60)"}, "--max-restarts=3")
    assert codes(hosts) == [2] * HOSTS
    assert [len(starts(tmp_path, rank)) for rank in range(HOSTS)] == [1] * HOSTS


def test_a_fault_that_only_follows_from_a_failure(four: Callable[..., list[Any]], tmp_path: Path) -> None:
    """Bug: a process that finds another one gone at the start says exit code 2, and the run is given up."""
    killed = "life or (time.sleep(0.3), os.kill(os.getpid(), signal.SIGKILL))"
    hosts = four({0: killed, -1: "life or sys.exit(2)"}, "--max-restarts=1")
    assert codes(hosts) == [0] * HOSTS


def test_a_signal_to_one_host_stops_all(four: Callable[..., list[Any]], tmp_path: Path) -> None:
    """Bug: a host that is stopped before anything can be saved is restarted by the others."""
    hosts = four(WAITS, "--max-restarts=3")
    for rank in range(HOSTS):
        once_there(tmp_path / f"ready-{rank}-0", lambda: None).join()
    os.kill(hosts[3].pid, signal.SIGTERM)
    assert codes(hosts) == [128 + signal.SIGTERM] * HOSTS
    assert [len(starts(tmp_path, rank)) for rank in range(HOSTS)] == [1] * HOSTS


@pytest.mark.distributed
def test_a_signal_while_hosts_come_together(four: Callable[..., list[Any]], tmp_path: Path) -> None:
    """Bug: a run that is stopped before it has begun: the other hosts wait for ten minutes."""
    hosts = four("", ranks=range(3))
    time.sleep(1.0)
    os.kill(hosts[1].pid, signal.SIGTERM)
    assert codes(hosts) == [128 + signal.SIGTERM] * 3
    assert not any(starts(tmp_path, rank) for rank in range(3))


@pytest.mark.distributed
def test_a_host_that_does_not_come(
    four: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Bug: a missing host is taken for a fault of the input, which no launcher tries again."""
    monkeypatch.setattr(lives, "_GATHER_SECONDS", 1.0)
    assert codes(four("", ranks=range(2))) == [3, 3]
    assert not starts(tmp_path)


# As the processes of a run do: a signal to one of them is a vote, all save and leave with 0.
VOTES = (
    "signal.signal(signal.SIGTERM, lambda *_: folder.joinpath('voted').touch())\n"
    "folder.joinpath(f'ready-{rank}-{life}').touch()\n"
    "for _ in range(400 * (life == 0)):\n"
    "    time.sleep(0.05)\n"
    "    if folder.joinpath('voted').exists():\n"
    "        time.sleep(0.3 * int(rank))\n"
    "        pathlib.Path(os.environ['OPENMOE_STOPPED_FILE']).touch()\n"
    "        sys.exit(0)\n"
)


@pytest.mark.distributed
def test_a_save_that_nobody_asked_for(four: Callable[..., list[Any]], tmp_path: Path) -> None:
    """Bug: the supervisor of one host is killed, its process votes, all save, and the launchers of the others
    say that the run has reached its end."""
    hosts = four(VOTES, "run.dir=x")
    for rank in range(HOSTS):
        once_there(tmp_path / f"ready-{rank}-0", lambda: None).join()
    os.kill(hosts[3].pid, signal.SIGKILL)
    assert codes(hosts) == [3, 3, 3, -signal.SIGKILL]
    assert [len(starts(tmp_path, rank)) for rank in range(3)] == [1] * 3


def test_a_save_that_one_host_was_asked_for(four: Callable[..., list[Any]], tmp_path: Path) -> None:
    """Bug: the hosts that got no signal themselves take the save for a failure."""
    hosts = four(VOTES, "run.dir=x")
    for rank in range(HOSTS):
        once_there(tmp_path / f"ready-{rank}-0", lambda: None).join()
    os.kill(hosts[3].pid, signal.SIGTERM)
    assert codes(hosts) == [0] * HOSTS
    assert [len(starts(tmp_path, rank)) for rank in range(HOSTS)] == [1] * HOSTS


def test_a_signal_to_the_process_itself(environment: Environment, tmp_path: Path) -> None:
    """Bug: a run that someone else told to save and leave counts as finished, though starts are left."""

    def act() -> None:
        os.kill(starts(tmp_path)[0]["pid"], signal.SIGTERM)

    sender = once_there(tmp_path / "ready-0-0", act)
    assert run(environment(SAVES + "life and sys.exit(0)\n" + WAITS), "--max-restarts=3") == 0
    sender.join()
    assert len(starts(tmp_path)) == 2


@pytest.mark.distributed
def test_two_signals_while_hosts_come_together(
    four: Callable[..., list[Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Bug: the second signal ends the launcher with a traceback while it tells the others of the first."""
    hosts = four("", ranks=range(3))
    time.sleep(1.5)
    for _ in range(2):
        os.kill(hosts[0].pid, signal.SIGTERM)
        time.sleep(0.3)
    assert codes(hosts) == [128 + signal.SIGTERM] * 3
    assert "Traceback" not in capfd.readouterr().err


def test_host_0_gone(four: Callable[..., list[Any]], tmp_path: Path) -> None:
    """Bug: the others' processes are killed while they save with host 0's, or watched over no more."""
    hosts = four({0: SAVES + WAITS, -1: WAITS.replace("30", "2")}, ranks=range(HOSTS))
    for rank in range(HOSTS):
        once_there(tmp_path / f"ready-{rank}-0", lambda: None).join()
    os.kill(hosts[0].pid, signal.SIGKILL)
    assert codes(hosts) == [-signal.SIGKILL, 0, 0, 0]
    once_there(tmp_path / "saved", lambda: None).join()
    assert (tmp_path / "saved").exists()


def test_the_port_of_host_0_is_taken(
    four: Callable[..., list[Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    """Bug: pages of the store's own words about a port in use."""
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        host = fork({**pod(0, "127.0.0.1,a,b,c"), "MASTER_PORT": str(port), "PATH": ""}, chips=4)
        assert codes([host]) == [2]
    line = f"error: MASTER_PORT={port}: Address already in use; allowed a free port, the same on all hosts"
    assert capfd.readouterr().err.splitlines()[-1] == line
