"""The commands of a job on a pod, executed against a `gcloud` that plays the cloud: its ssh runs them for
real, in a home folder for each host, where the Python that they make plays the run."""

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from openmoe.launcher import tpu, tpu_job
from openmoe.launcher.errors import ConfigError, failure_of
from openmoe.launcher.tpu_job import JobFailed
from openmoe.parallel.topology import TopologyError

# Writes each call into `calls`. The folder `pod` holds its state and a home for each host. `plan.json` says
# what goes wrong: errors of the next creations, and states that the pod takes after so many looks at the run.
GCLOUD = """
import json, os, pathlib, shutil, subprocess, sys
root = pathlib.Path(os.environ["CLOUD"])
verb, name = sys.argv[4], sys.argv[5]
with (root / "calls").open("a") as calls:
    calls.write(json.dumps(sys.argv[1:]) + "\\n")
plan = json.loads((root / "plan.json").read_text())
pod = root / "pod"

def fail(text):
    sys.exit(f"ERROR: (gcloud.compute.tpus.tpu-vm.{verb}) {text}")

if verb == "create":
    if plan["create"]:
        error = plan["create"].pop(0)
        (root / "plan.json").write_text(json.dumps(plan))
        fail(error)
    for host in range(2):
        (pod / str(host)).mkdir(parents=True)
    (pod / "state").write_text("READY")
elif verb == "describe":
    if plan["silent"]:
        plan["silent"] -= 1
        (root / "plan.json").write_text(json.dumps(plan))
        fail("There was a problem refreshing your current auth tokens")
    if not pod.exists():
        fail("NOT_FOUND: no such node")
    print((pod / "state").read_text())
elif verb == "delete":
    if not pod.exists():
        fail("NOT_FOUND: no such node")
    shutil.rmtree(pod)
elif not pod.exists():
    fail("NOT_FOUND: no such node")
elif verb == "scp":
    for host in pod.glob("?"):
        shutil.copy(sys.argv[5], host / sys.argv[6].split(":")[1])
elif verb == "ssh":
    options = dict(word.split("=", 1) for word in sys.argv[6:] if "=" in word)
    looks = "openmoe running" in options["--command"]
    if looks and plan["states"] and (pod / "0" / "started").exists():
        looks_left, state = plan["states"][0]
        plan["states"][0][0] -= 1
        if looks_left == 0:
            del plan["states"][0]
            (pod / "state").write_text(state) if state else shutil.rmtree(pod)
        (root / "plan.json").write_text(json.dumps(plan))
        if looks_left == 0:
            fail("connection lost")
    worker, status = options["--worker"], 0
    for host in sorted(pod.glob("?")) if worker == "all" else [pod / worker]:
        environment = {**os.environ, "HOME": str(host)}
        status |= subprocess.run(["bash", "-c", options["--command"]], env=environment, cwd=host).returncode
    sys.exit(status)
"""

# What a host's shell finds as python3.11, and in the environment that it makes. As a run it writes down its
# arguments and does what `ends` says: one word a start, a code, "wait" for a signal, "saved" as after one.
PYTHON = """
import json, os, pathlib, shutil, signal, sys, time
home = pathlib.Path(os.environ["HOME"])
root = pathlib.Path(os.environ["CLOUD"])
with (root / "python").open("a") as calls:
    calls.write(json.dumps([home.name, *sys.argv[1:]]) + "\\n")
if sys.argv[1:3] == ["-m", "venv"]:
    target = pathlib.Path(sys.argv[3]) / "bin"
    target.mkdir(parents=True)
    shutil.copy(sys.argv[0], target / "python")
elif sys.argv[1:3] == ["-m", "openmoe.launcher.xla_spawn"]:
    def save(*_):
        time.sleep(1)
        (root / f"saved-{home.name}").touch()
        pathlib.Path(os.environ["OPENMOE_STOPPED_FILE"]).touch()
        sys.exit(0)

    signal.signal(signal.SIGTERM, save)
    (home / "started").touch()
    starts = [line for line in (root / "python").read_text().splitlines() if "xla_spawn" in line]
    number = sum(json.loads(line)[0] == home.name for line in starts) - 1
    ends = json.loads((root / "plan.json").read_text())["ends"]
    print("the words of a run", flush=True)
    if ends[number] == "wait":
        time.sleep(30)
    else:
        time.sleep(0.3)
        if ends[number] == "saved":
            save()
        sys.exit(int(ends[number]))
"""

CURRICULUM = "curriculum=[{until_steps: 4, mix: {code: 1, manual: 2}, objective: ul2}]"


class Cloud:
    """What a test sees of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.mount = folder / "mount"
        self.mount.mkdir()
        self.run_dir = self.mount / "a run"
        self.plan()

    def patch(self, command: str, old: str, new: str) -> None:
        """Changes what one of the commands does."""
        path = self.folder / "bin" / command
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))

    def fails_once(self, mark: str) -> None:
        """The next ssh whose script has this mark."""
        once = f'("{mark}" in options["--command"] and not (root / "once").exists())'
        error = '(root / "once").touch()\n        fail("connection timed out")'
        begin = '    worker, status = options["--worker"], 0'
        self.patch("gcloud", begin, f"    if {once}:\n        {error}\n{begin}")

    def plan(self, **more: Any) -> None:
        plan = {"create": [], "silent": 0, "states": [], "ends": ["0"]} | more
        (self.folder / "plan.json").write_text(json.dumps(plan))

    @property
    def calls(self) -> list[list[str]]:
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]

    @property
    def verbs(self) -> list[str]:
        """Of the calls that change something."""
        found = []
        for call in self.calls:
            verb = call[3]
            if verb == "ssh":
                script = next(word for word in call if word.startswith("--command="))
                marks = {"pip": "install", "nohup": "start", "TERM": "stop", "KILL": "end", "tail": "tail"}
                verb = next((name for mark, name in marks.items() if mark in script), "look")
            if verb not in ("describe", "look"):
                found.append(verb)
        return found

    @property
    def runs(self) -> list[list[str]]:
        """The arguments of each start on host 0, and that the others had the same."""
        calls = [json.loads(line) for line in (self.folder / "python").read_text().splitlines()]
        starts = {
            host: [call[3:] for call in calls if call[0] == host and "xla_spawn" in call[2]] for host in "01"
        }
        assert starts["0"] == starts["1"]
        return starts["0"]

    def job(self, *more: str, run: bool = True, overrides: tuple[str, ...] = ()) -> list[str]:
        options = ["job", *(["--run"] if run else []), "--name=pod-a", "--zone=europe-west4-a"]
        options += ["--accelerator-type=v3-8", "--package=git+https://example.org/openmoe@1a2b"]
        options += ["--share=10.0.0.2:/vol", f"--mount={self.mount}", "--poll-seconds=0.05", *more]
        run_dir = f"run.dir={self.run_dir}"
        return [*options, "--", "experiment=tiny", "model.dispatch=einsum", run_dir, CURRICULUM, *overrides]


@pytest.fixture
def cloud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    folder = tmp_path / "cloud"
    (folder / "bin").mkdir(parents=True)
    commands = {
        "gcloud": f"#!{sys.executable}\n{GCLOUD}",
        "python3.11": f"#!{sys.executable}\n{PYTHON}",
        "sudo": '#!/bin/bash\nexec "$@"\n',
        "apt-get": "#!/bin/bash\n",
        "mountpoint": "#!/bin/bash\nexit 1\n",
        "mount": "#!/bin/bash\n",
    }
    for name, text in commands.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("CLOUD", str(folder))
    yield Cloud(folder)
    for home in (folder / "pod").glob("?"):
        if (session := home / "openmoe-run" / "session").exists():
            subprocess.run(["pkill", "-KILL", "-s", session.read_text().strip()], check=False)


def shown(text: str) -> list[str]:
    """The commands of a rendered page."""
    blocks = [block.split("\n", 1) for block in text.strip().split("\n\n") if block.startswith("# ")]
    return [block[1] for block in blocks if len(block) == 2 and not block[1].startswith("#")]


def test_what_is_shown_is_what_runs(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a page of commands that a shell does not take, or that --run does otherwise."""
    assert tpu.command(cloud.job(run=False)) == 0
    page = capsys.readouterr().out
    assert subprocess.run(["bash", "-n"], input=page, text=True, check=False).returncode == 0
    assert not (cloud.folder / "calls").exists()
    assert tpu.command(cloud.job()) == 0
    commands = [shlex.split(command) for command in shown(page)]
    assert all(["gcloud", *call] in commands for call in cloud.calls)
    assert cloud.verbs == ["create", "install", "start", "delete"]
    assert "v3-8: 1 host, 4 chips, 8 cores" in page
    assert "mesh data 8 x expert 1 x model 1" in page


def test_what_the_run_is_given(cloud: Cloud) -> None:
    """Bug: a list of phases, a space or a quote that one of the shells on the way takes for its own; a run
    that is started without its launcher's options."""
    odd = 'logging.project="it\'s $HOME `id` & ; * !"'
    assert tpu.command(cloud.job("--max-restarts=5", overrides=(odd,))) == 0
    (given,) = cloud.runs
    assert given == [
        "--max-restarts=5", "--", "experiment=tiny", "model.dispatch=einsum", f"run.dir={cloud.run_dir}",
        CURRICULUM, odd, "parallel.engine=xla",
    ]  # fmt: skip
    (log,) = (cloud.run_dir / "logs").glob("*.log")
    assert "the words of a run" in log.read_text()


def test_a_wheel_is_copied(cloud: Cloud, tmp_path: Path) -> None:
    """Bug: pip on a host is given a file that is here."""
    wheel = tmp_path / "openmoe-0.1.0-py3-none-any.whl"
    wheel.touch()
    cloud.plan(ends=["wait"])
    follow_until(cloud, "start", f"--package={wheel}")
    assert cloud.verbs[:3] == ["create", "scp", "install"]
    assert (cloud.folder / "pod" / "1" / wheel.name).exists()
    pip = [call for call in (cloud.folder / "python").read_text().splitlines() if '"pip"' in call]
    assert json.loads(pip[1])[-1] == f"{cloud.folder / 'pod' / '1'}/{wheel.name}[tpu]"


def follow_until(
    cloud: Cloud, verb: str, *more: str, overrides: tuple[str, ...] = (), times: int = 1
) -> None:
    """Follows the job and is interrupted after this verb came so often."""

    def interrupt() -> None:
        limit = time.monotonic() + 30
        while time.monotonic() < limit:
            if (cloud.folder / "calls").exists() and cloud.verbs.count(verb) >= times:
                break
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        tpu.command(cloud.job(*more, overrides=overrides))
    thread.join()


def test_a_pod_that_is_not_to_be_had(cloud: Cloud) -> None:
    """Bug: the first lack of machines ends the job; a run that never began goes on from what it finds."""
    lack = "Code 8: There is no more capacity in the zone"
    cloud.plan(create=[lack, "ALREADY_EXISTS: it is just being deleted"])
    assert tpu.command(cloud.job()) == 0
    assert cloud.verbs == ["create", "create", "create", "install", "start", "delete"]
    assert "checkpoint.resume=auto" not in cloud.runs[0]


def test_a_pod_that_is_refused(cloud: Cloud) -> None:
    """Bug: a zone that does not exist is asked for again and again."""
    cloud.plan(create=["INVALID_ARGUMENT: no such accelerator type in this zone, for an internal IP"])
    with pytest.raises(ConfigError, match=r"^pod-a: gcloud refuses to create it: ERROR: .*INVALID_ARGUMENT"):
        tpu.command(cloud.job())
    assert cloud.verbs == ["create"]


@pytest.mark.parametrize("state", ["PREEMPTED", "TERMINATED", ""])
def test_a_pod_that_is_taken_away(state: str, cloud: Cloud) -> None:
    """Bug: a spot pod that is preempted, or gone, ends the job, or begins its run from nothing; one that has
    its name still is created a second time."""
    cloud.plan(states=[[1, state]], ends=["wait", "0"])
    assert tpu.command(cloud.job("--spot")) == 0
    delete = ["delete"] if state else []
    assert cloud.verbs == ["create", "install", "start", *delete, "create", "install", "start", "delete"]
    first, second = cloud.runs
    assert "checkpoint.resume=auto" not in first
    assert second == [*first, "checkpoint.resume=auto"]
    assert "--spot" in cloud.calls[1]


def test_a_run_that_fails(cloud: Cloud) -> None:
    """Bug: a pod that is there is given up for a run that can go on; or what is left holds the devices."""
    cloud.plan(ends=["3", "3", "0"])
    assert tpu.command(cloud.job()) == 0
    again = ["tail", "end", "start"]
    assert cloud.verbs == ["create", "install", "start", *again, *again, "delete"]
    assert [run[-1] for run in cloud.runs][1:] == ["checkpoint.resume=auto"] * 2


def test_too_many_losses(cloud: Cloud) -> None:
    """Bug: a run that fails for good holds a pod for ever, or leaves it behind."""
    cloud.plan(ends=["3"] * 5)
    with pytest.raises(JobFailed, match=r"^pod-a: the run is over: exit 3, after --max-losses=1") as error:
        tpu.command(cloud.job("--max-losses=1"))
    assert failure_of(error.value).code == 3
    assert len(cloud.runs) == 2
    assert cloud.verbs[-1] == "delete"


def test_a_fault_of_the_input(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a bad override is tried on pod after pod; nobody reads what was wrong; a pod is left behind."""
    cloud.plan(ends=["2"])
    assert tpu.command(cloud.job()) == 2
    assert cloud.verbs == ["create", "install", "start", "tail", "delete"]
    assert "the words of a run" in capsys.readouterr().out


def test_a_pod_to_keep(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: --keep that does not; a pod that stays without a word."""
    assert tpu.command(cloud.job("--keep")) == 0
    assert "delete" not in cloud.verbs
    assert capsys.readouterr().out.splitlines()[-1].startswith("gcloud compute tpus tpu-vm delete pod-a")


def test_gcloud_that_fails_for_a_while(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a network that is away for a minute counts as a lost pod, which is created again beside the first;
    or one that stays away is asked for ever."""
    cloud.plan(silent=3)
    assert tpu.command(cloud.job("--max-losses=0")) == 0
    cloud.plan(ends=["wait"] * 2)
    follow_until(cloud, "start", times=2)
    monkeypatch.setattr(tpu_job, "_MOST_SILENCES", 2)
    cloud.plan(silent=9)
    with pytest.raises(JobFailed, match="gcloud failed, 3 times in a row"):
        tpu.command(cloud.job())
    # the run there may be in the best of health
    assert (cloud.folder / "pod").exists()


def test_ssh_that_never_works(
    cloud: Cloud, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: a pod that nobody can log in to is waited for without a word and without end, while it costs."""
    monkeypatch.setattr(tpu_job, "_MOST_SILENCES", 2)
    cloud.patch("gcloud", 'elif verb == "ssh":', 'elif verb == "ssh" and fail("Permission denied"):')
    with pytest.raises(JobFailed, match=r"host 0 did not answer \(.*Permission denied\), 3 times in a row"):
        tpu.command(cloud.job())
    said = capsys.readouterr().out
    assert "Permission denied); 2 times in a row" in said
    assert said.splitlines()[-1].startswith("gcloud compute tpus tpu-vm delete pod-a")


def test_a_save_that_nobody_asked_for(cloud: Cloud) -> None:
    """Bug: a machine that is maintained tells its run to save; the job counts as done, in mid-training, and
    the pod is deleted."""
    cloud.plan(ends=["saved", "0"])
    assert tpu.command(cloud.job()) == 0
    assert cloud.verbs == ["create", "install", "start", "end", "start", "delete"]
    assert cloud.runs[1][-1] == "checkpoint.resume=auto"


def test_an_install_that_fails_on_one_host(cloud: Cloud) -> None:
    """Bug: host 0 counts for all, and the run waits for a host that has nothing to run."""
    run = 'elif sys.argv[1:3] == ["-m", "openmoe.launcher.xla_spawn"]:'
    fails = 'elif "pip" in sys.argv and home.name == "1" and not (root / "failed").exists():'
    cloud.patch("python3.11", run, f'{fails}\n    (root / "failed").touch()\n    sys.exit(1)\n{run}')
    assert tpu.command(cloud.job("--max-losses=1")) == 0
    assert cloud.verbs == ["create", "install", "install", "start", "delete"]


def test_a_host_that_was_started_anew(cloud: Cloud) -> None:
    """Bug: the share is mounted at the installation only, and each start after a reboot fails."""
    cloud.plan(ends=["wait", "0"])
    follow_until(cloud, "start")
    for home in (cloud.folder / "pod").glob("?"):
        session = (home / "openmoe-run" / "session").read_text().strip()
        subprocess.run(["pkill", "-KILL", "-s", session], check=True)
    cloud.run_dir.rename(cloud.folder / "unmounted")
    mount = f'cd "$CLOUD"; test ! -e unmounted || mv unmounted "{cloud.run_dir}"\n'
    (cloud.folder / "bin" / "mount").write_text(f"#!/bin/bash\n{mount}")
    assert tpu.command(cloud.job("--max-losses=1")) == 0
    assert len(cloud.runs) == 2


def test_another_job_on_a_kept_pod(cloud: Cloud) -> None:
    """Bug: what an earlier job has left on the pod is taken for the end of this one, which never runs; or a
    corrected one is told the old fault."""
    cloud.plan(ends=["2", "0", "wait"])
    assert tpu.command(cloud.job("--keep")) == 2
    assert tpu.command(cloud.job("--keep")) == 2
    assert len(cloud.runs) == 1
    assert tpu.command(cloud.job("--keep", overrides=("train.steps=3",))) == 0
    other = (f"run.dir={cloud.mount / 'another run'}",)
    (cloud.mount / "another run").mkdir()
    follow_until(cloud, "start", overrides=other, times=3)
    assert "checkpoint.resume=auto" not in cloud.runs[2]
    with pytest.raises(ConfigError, match=r"^pod-a: trains another job; allowed the same run.dir and keys"):
        tpu.command(cloud.job())
    assert len(cloud.runs) == 3
    # how it begins makes no other job of it
    follow_until(cloud, "start", overrides=(*other, "checkpoint.resume=auto"), times=3)
    assert len(cloud.runs) == 3


def test_a_delete_that_fails(cloud: Cloud) -> None:
    """Bug: one lost pod counts as many, within seconds."""
    tries = "(root / f\"try-{len(list(root.glob('try-*')))}\").touch()"
    refuse = (
        f'elif verb == "delete" and len(list(root.glob("try-*"))) < 3:\n    {tries}\n    fail("UNAVAILABLE")'
    )
    cloud.patch("gcloud", 'elif verb == "delete":', f'{refuse}\nelif verb == "delete":')
    cloud.plan(states=[[1, "PREEMPTED"]], ends=["wait", "0"])
    assert tpu.command(cloud.job("--max-losses=1")) == 0
    assert cloud.verbs.count("delete") == 5


def test_a_launcher_out_of_memory(cloud: Cloud) -> None:
    """Bug: SIGKILL, which the kernel sent, is taken for somebody's wish to end the job."""
    cloud.plan(ends=["137", "0"])
    assert tpu.command(cloud.job()) == 0


def test_a_first_start_that_was_none(cloud: Cloud) -> None:
    """Bug: the start never reached the pod, and the next one goes on from an old run in that folder."""
    cloud.fails_once("nohup")
    assert tpu.command(cloud.job()) == 0
    (run,) = cloud.runs
    assert "checkpoint.resume=auto" not in run


def test_what_is_left_and_can_not_be_ended(cloud: Cloud) -> None:
    """Bug: a run is started beside what the last one has left."""
    cloud.plan(ends=["3", "0"])
    cloud.fails_once("KILL")
    assert tpu.command(cloud.job()) == 0
    assert cloud.verbs[3:] == ["tail", "end", "tail", "end", "start", "delete"]


def test_status_before_a_run(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a pod that is only created has no log yet, and `status` fails."""
    (cloud.folder / "pod" / "0").mkdir(parents=True)
    (cloud.folder / "pod" / "state").write_text("READY")
    assert tpu.command(["status", "--run", "--name=pod-a", "--zone=europe-west4-a"]) == 0
    assert "openmoe new" in capsys.readouterr().out


def test_a_wheel_elsewhere(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: the address of a wheel is looked for among the files here."""
    address = "https://example.org/openmoe-0.1.0-py3-none-any.whl"
    assert tpu.command(cloud.job(f"--package={address}", run=False)) == 0
    assert f"openmoe[tpu] @ {address}" in capsys.readouterr().out


def test_follow_and_stop(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: a follower that is interrupted takes the run along; one that comes back starts a second run; a
    stop that does not wait for the save, or reaches one host only; a stopped run is started again."""
    cloud.plan(ends=["wait"])
    follow_until(cloud, "start")
    assert "the same command follows them again" in capsys.readouterr().out
    follow_until(cloud, "start")
    assert cloud.verbs == ["create", "install", "start"]
    pod = ["--run", "--name=pod-a", "--zone=europe-west4-a"]
    assert tpu.command(["status", *pod]) == 0
    out = capsys.readouterr().out
    assert "READY" in out
    assert "openmoe running" in out
    assert "the words of a run" in out
    assert tpu.command(["stop", *pod]) == 0
    assert all((cloud.folder / f"saved-{host}").exists() for host in "01")
    assert tpu.command(cloud.job()) == 0
    assert cloud.verbs == ["create", "install", "start", "tail", "stop", "delete"]
    assert len(cloud.runs) == 1


def test_a_second_start_is_none(cloud: Cloud) -> None:
    """Bug: two followers, or a lost answer of ssh, start two runs on the same devices."""
    cloud.plan(ends=["wait"])
    follow_until(cloud, "start")
    (start,) = (call for call in cloud.calls if "nohup" in call[-2])
    assert subprocess.run(["gcloud", *start], check=False).returncode == 0
    assert len(cloud.runs) == 1


def test_a_signal_that_someone_sent(cloud: Cloud) -> None:
    """Bug: a run that was stopped before it could save is started again."""
    cloud.plan(ends=["143"])
    assert tpu.command(cloud.job()) == 143
    assert len(cloud.runs) == 1


BAD: dict[str, tuple[list[str], str]] = {
    "nothing to do": (["train"], "train: allowed job, status, stop, delete as the first word"),
    "name": (["--name=Pod_A"], "--name=Pod_A: allowed letters, digits and dashes"),
    "zone": (["--zone=mars"], "--zone=mars: allowed a zone such as europe-west4-a"),
    "type": (
        ["--accelerator-type=v3-16"],
        "--accelerator-type=v3-16: allowed v3-8, v3-32, v3-64, v3-128, v3-256, v3-512, v3-1024, v3-2048",
    ),
    "share": (["--share=/vol"], "--share=/vol: allowed SERVER:/FOLDER, what all hosts can mount by NFS"),
    "mount": (["--mount=mnt"], "--mount=mnt: allowed a folder on the hosts"),
    "wheel": (["--package=a.whl"], "--package=a.whl: no such file; allowed a wheel, or git+https://..."),
    "option": (["--cores=8"], "unrecognized arguments: --cores=8; --help shows what is allowed"),
    "losses": (["--max-losses=-1"], "--max-losses=-1: allowed from 0"),
    "poll": (
        ["--poll-seconds=x"],
        "argument --poll-seconds: invalid float value: 'x'; --help shows what is allowed",
    ),
    "folder": (
        ["--mount=/mnt/b"],
        "run.dir={run_dir}: allowed below /mnt/b, the folder that all hosts share (--mount)",
    ),
    "up": (
        ["run.dir={mount}/../x"],
        "run.dir={mount}/../x: allowed below {mount}, the folder that all hosts share (--mount)",
    ),
    "data": (
        ["data.root=/data"],
        "data.root=/data: allowed below {mount}, the folder that all hosts share (--mount)",
    ),
    "resume": (
        ["checkpoint.resume=/a"],
        "checkpoint.resume=/a: allowed none or auto with a pod that may be lost; each new start goes on from "
        "the newest checkpoint in run.dir",
    ),
    "resume by section": (
        ["checkpoint={{resume: /a}}"],
        "checkpoint.resume=/a: allowed none or auto with a pod that may be lost; each new start goes on from "
        "the newest checkpoint in run.dir",
    ),
    "device": (["run.device=cpu"], "run.device=cpu: allowed auto; XLA takes the devices of the pod"),
    "engine": (["parallel.engine=torch"], "parallel.engine=torch: allowed xla, or to leave it out"),
    "layout": (
        ["parallel.tensor=3"],
        "parallel.replicate=1 x parallel.tensor=3 is 3: allowed a divisor of the 8 processes of this run",
    ),
    "rows": (
        ["train.global_batch_rows=12"],
        "train.global_batch_rows=12: allowed a multiple of parallel.replicate x parallel.shard = 8",
    ),
    "key": (
        ["train.stepz=1"],
        "Could not override 'train.stepz'.",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case: str, cloud: Cloud) -> None:
    """Bug: what is wrong shows on a pod that has been paid for, or in a traceback."""
    arguments, line = BAD[case]
    places = {"mount": cloud.mount, "run_dir": cloud.run_dir}
    words = [word.format(**places) for word in arguments]
    if words[0].startswith("-"):
        command = cloud.job(*words)
    elif "=" in words[0]:
        command = cloud.job(overrides=tuple(words))
    else:
        command = words
    with pytest.raises((ConfigError, TopologyError)) as error:
        tpu.command(command)
    assert failure_of(error.value).text().splitlines()[0].startswith(f"error: {line.format(**places)}")
    assert not (cloud.folder / "calls").exists()


def test_missing(cloud: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: an option that is needed and not given is None in a command; no gcloud, and a traceback."""
    for option in ("--accelerator-type", "--package", "--share", "--name", "--zone"):
        words = [word for word in cloud.job() if not word.startswith(f"{option}=")]
        with pytest.raises(ConfigError, match=f"^{option}: missing"):
            tpu.command(words)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"^--run: gcloud is not on PATH here"):
        tpu.command(cloud.job())


def test_a_layout_of_many_hosts(cloud: Cloud, capsys: pytest.CaptureFixture[str]) -> None:
    """Bug: devices counted as chips or hosts."""
    layout = ("train.global_batch_rows=128", "parallel.expert=8", "parallel.tensor=2")
    big = (*layout, "checkpoint.every_steps=0")
    assert tpu.command(cloud.job("--accelerator-type=v3-128", run=False, overrides=big)) == 0
    about = capsys.readouterr().out
    assert "v3-128: 16 hosts, 64 chips, 128 cores" in about
    assert "mesh data 8 x expert 8 x model 2" in about
    assert "warning: checkpoint.every_steps=0" in about
