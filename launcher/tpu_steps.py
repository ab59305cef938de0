"""The shell commands of a job on a TPU pod. What is shown is what is run: each step is one such text.

In the home folder of each host a job leaves openmoe/ (the environment) and openmoe-run/: what is `installed`,
which `job` runs, the number of xla_spawn's process (`pid`), that of the `session` around it, whether somebody
`stopped` the run or it has `saved` before its end, and its `exit` code. The rest is on the share.
"""

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from openmoe.launcher.stopped import STOPPED_FILE
from openmoe.launcher.tpu_host import Slice

PYTHON = "python3.11"
# A fresh machine may still be installing its own updates.
APT = "sudo apt-get -qq -o DPkg::Lock::Timeout=600"


@dataclass(frozen=True)
class Step:
    title: str
    command: str


@dataclass(frozen=True)
class Pod:
    """A TPU VM by its name."""

    name: str
    zone: str
    project: str | None

    def gcloud(self, verb: str, *more: str) -> str:
        project = [] if self.project is None else [f"--project={self.project}"]
        words = ["gcloud", "compute", "tpus", "tpu-vm", verb, self.name, f"--zone={self.zone}", *project]
        return shlex.join([*words, *more, "--quiet"])

    def on(self, worker: str, script: str) -> str:
        """Runs the script on one host or on all."""
        return self.gcloud("ssh", f"--worker={worker}", f"--command={script}")


@dataclass(frozen=True)
class Job:
    """What is trained, and on what."""

    pod: Pod
    slice: Slice
    version: str  # of the machine's image
    spot: bool
    package: str  # a wheel here, or what pip takes after "openmoe @"
    share: str  # SERVER:/FOLDER of a file server that all hosts can mount
    mount: PurePosixPath
    run_dir: PurePosixPath  # below `mount`
    overrides: tuple[str, ...]
    max_restarts: int

    @property
    def wheel(self) -> Path | None:
        is_file = self.package.endswith(".whl") and "://" not in self.package
        return Path(self.package) if is_file else None

    @property
    def digest(self) -> str:
        """Tells this run on the pod from another one; how it began is no difference."""
        keys = [word for word in self.overrides if word.partition("=")[0].lstrip("+") != "checkpoint.resume"]
        return hashlib.sha256("\0".join([str(self.run_dir), *keys]).encode()).hexdigest()[:16]


def create(job: Job) -> Step:
    spot = ["--spot"] if job.spot else []
    kind = [f"--accelerator-type={job.slice.name}", f"--version={job.version}"]
    return Step("create the pod", job.pod.gcloud("create", *kind, *spot))


def describe(pod: Pod) -> Step:
    return Step("is the pod there?", pod.gcloud("describe", "--format=value(state)"))


def install(job: Job) -> list[Step]:
    """The share, Python and the package, on all hosts; to be repeated at will."""
    steps = []
    requirement = shlex.quote(f"openmoe[tpu] @ {job.package}")
    if job.wheel is not None:
        steps.append(Step("copy the wheel", _copy(job.pod, job.wheel)))
        requirement = f'"$HOME"/{shlex.quote(job.wheel.name + "[tpu]")}'
    run_dir = shlex.quote(str(job.run_dir))
    script = f"""set -e
{_mounted(job)}
sudo mkdir -p {run_dir}
sudo chown "$(id -u):$(id -g)" {run_dir}
{PYTHON} -c "import ensurepip" 2>/dev/null || {APT} install -y {PYTHON} {PYTHON}-venv
test -x "$HOME/openmoe/bin/python" || {PYTHON} -m venv "$HOME/openmoe"
"$HOME/openmoe/bin/python" -m pip install -q --no-input {requirement}
"""
    # A step of its own: one that failed on some host is to be repeated on all.
    mark = 'mkdir -p "$HOME/openmoe-run" && touch "$HOME/openmoe-run/installed"'
    steps.append(Step("install, on all hosts", job.pod.on("all", script)))
    return [*steps, Step("mark it as installed, once it is on all hosts", job.pod.on("all", mark))]


def _mounted(job: Job) -> str:
    """A host that was started anew has lost its mount. NFSv4 gives back the locks of a host that is gone."""
    mount = shlex.quote(str(job.mount))
    return f"""mountpoint -q {mount} || {{
  {APT} update
  {APT} install -y nfs-common
  sudo mkdir -p {mount}
  sudo mount -t nfs -o hard,nfsvers=4.1 {shlex.quote(job.share)} {mount}
}}"""


def start(job: Job, again: bool) -> Step:
    """Starts the run and leaves; `again` goes on from the newest checkpoint in run.dir.

    xla_spawn passes signals on; the session around it lives until its exit code is written."""
    overrides = [*job.overrides, *(["checkpoint.resume=auto"] if again else [])]
    arguments = [f"--max-restarts={job.max_restarts}", "--", *overrides]
    run_dir = shlex.quote(str(job.run_dir))
    script = f"""cd "$HOME/openmoe-run" || exit
test -e pid && kill -0 "$(cat session)" 2>/dev/null && exit
{_mounted(job)}
test -d {run_dir} || {{ echo {run_dir}: is not on the share >&2; exit 1; }}
test -O {run_dir} || {{ echo {run_dir}: belongs to another user id than this host has >&2; exit 1; }}
rm -f pid exit stopped saved
echo {job.digest} > job
mkdir -p {run_dir}/logs
log={run_dir}/logs/"$(hostname)".log
ln -sfn "$log" log
cat > watch <<'the end'
echo $$ > session
export {STOPPED_FILE}="$PWD/saved"
"$HOME/openmoe/bin/python" -m openmoe.launcher.xla_spawn {shlex.join(arguments)} &
echo $! > pid
wait $!
echo $? > exit.new
mv exit.new exit
the end
nohup setsid bash watch >> "$log" 2>&1 < /dev/null &
for look in $(seq 100); do test -e pid && exit; sleep 0.1; done; exit 1
"""
    title = "start the run again, from its newest checkpoint" if again else "start the run, on all hosts"
    return Step(title, job.pod.on("all", script))


def look(pod: Pod) -> Step:
    """Prints "openmoe new", "openmoe installed", or "openmoe job DIGEST" and then how that job stands:
    "openmoe running", "openmoe lost", "openmoe saved" (and left before its end, though nobody stopped it by
    `stop`) or "openmoe exit CODE"."""
    script = """cd "$HOME/openmoe-run" 2>/dev/null && test -e installed || { echo openmoe new; exit 0; }
test -e pid || { echo openmoe installed; exit 0; }
echo "openmoe job $(cat job)"
if test "$(cat exit 2>/dev/null)" = 0 && test -e saved && test ! -e stopped; then echo openmoe saved
elif test -e exit; then echo "openmoe exit $(cat exit)"
elif kill -0 "$(cat session)" 2>/dev/null; then echo openmoe running
else echo openmoe lost; fi
"""
    return Step("does the run go on?", pod.on("0", script))


def last_words(pod: Pod) -> Step:
    return Step("the end of its log", pod.on("0", 'tail -n 20 "$HOME/openmoe-run/log" || true'))


def stop(pod: Pod) -> list[Step]:
    """The last one returns when the run has saved and left on all hosts."""
    # On all hosts before the first signal: without it a save on a signal is a loss.
    mark = """cd "$HOME/openmoe-run" 2>/dev/null && test -e pid || exit 0
touch stopped
"""
    script = """cd "$HOME/openmoe-run" 2>/dev/null && test -e pid || exit 0
kill -TERM "$(cat pid)" 2>/dev/null
while kill -0 "$(cat session)" 2>/dev/null; do sleep 1; done
"""
    return [
        Step("say on all hosts that the run is to stop", pod.on("all", mark)),
        Step("stop the run: it saves and leaves", pod.on("all", script)),
    ]


def end(pod: Pod) -> Step:
    """Before another start: what a failure has left on some host would hold its devices."""
    script = """cd "$HOME/openmoe-run" 2>/dev/null && test -e pid || exit 0
pkill -KILL -s "$(cat session)"
rm -f pid exit
"""
    return Step("end what is left of the run", pod.on("all", script))


def delete(pod: Pod) -> Step:
    return Step("delete the pod", pod.gcloud("delete"))


def _copy(pod: Pod, file: Path) -> str:
    place = [f"--zone={pod.zone}", *([] if pod.project is None else [f"--project={pod.project}"])]
    words = ["gcloud", "compute", "tpus", "tpu-vm", "scp", str(file), f"{pod.name}:{file.name}", *place]
    return shlex.join([*words, "--worker=all", "--quiet"])


def rendered(steps: Sequence[Step]) -> str:
    """A page that a shell can run and a person can read."""
    return "\n\n".join(f"# {step.title}\n{step.command}" for step in steps)
