"""Runs a job on a pod to its end: creates it, looks, starts again what was lost, deletes it.

What to do next follows from what the pod says, not from what was done before. So the command may be
interrupted and given again, and goes on where it was.
"""

import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from openmoe.launcher import tpu_steps as steps
from openmoe.launcher.errors import ConfigError
from openmoe.launcher.tpu_steps import Job, Pod, Step

# No machines to be had now, or a fault of the cloud: to be tried again.
_PASSING = re.compile(
    r"capacity|ALREADY_EXISTS|RESOURCE_EXHAUSTED|UNAVAILABLE|INTERNAL|DEADLINE|timed? ?out", re.IGNORECASE
)
_NOT_THERE = re.compile(r"NOT_FOUND|not found", re.IGNORECASE)
_MOVING = {"CREATING", "STARTING", "RESTARTING", "REPAIRING", "DELETING", "STOPPING", "UNKNOWN"}
_MOST_SILENCES = 20  # looks in a row that gcloud does not answer


class JobFailed(OSError):
    """A job that can't go on. Exit code 3."""


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    error: str

    @property
    def line(self) -> str:
        lines = [line.strip() for line in (self.error or self.out).splitlines() if line.strip()]
        return next((line for line in reversed(lines) if "ERROR" in line), lines[-1] if lines else "no word")


def execute(step: Step, loud: bool = True) -> Answer:
    """Runs the command as it is shown."""
    if loud:
        print(f"{datetime.now():%Y-%m-%d %H:%M:%S} {step.title}", flush=True)
        print(step.command, flush=True)
    done = subprocess.run(
        ["bash", "-c", step.command], stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if loud:
        sys.stdout.write(done.stdout)
        sys.stderr.write(done.stderr)
    return Answer(done.returncode, done.stdout, done.stderr)


class Follower:
    """Follows one job. `max_losses`: how often a pod or a run may be lost."""

    def __init__(self, job: Job, max_losses: int, poll_seconds: float) -> None:
        self._job = job
        self._max_losses = max_losses
        self._poll_seconds = poll_seconds
        self._losses = 0
        self._created = False  # by this command, so that a pod that is missing has been lost
        self._has_run = False  # something that a new start may go on from
        self._seen = ""

    def run(self) -> int:
        """To the end of the run; its exit code: 0, 2, or that of a signal.

        Raises ConfigError where gcloud refuses what was asked for, JobFailed where too much was lost.
        """
        pod, silences = self._job.pod, 0
        while True:
            state = pod_state(pod)
            silences = silences + 1 if state is None else 0
            if silences > _MOST_SILENCES:
                raise JobFailed(
                    f"{pod.name}: gcloud failed {silences} times in a row; the pod may still be there"
                )
            match state:
                case None:
                    self._wait()
                case "":
                    self._create()
                case "READY":
                    code = self._tend()
                    if code is not None:
                        return code
                case moving if moving in _MOVING:
                    self._tell(f"the pod is {moving}")
                    self._wait()
                case lost:  # PREEMPTED, TERMINATED, STOPPED, ...
                    self._lost(f"the pod is {lost}")
                    execute(steps.delete(pod))
                    self._created = False

    def _create(self) -> None:
        if self._created:
            self._created = False
            self._lost("the pod is gone")
        answer = execute(steps.create(self._job))
        if answer.code == 0:
            self._created = True
        elif _PASSING.search(answer.error):
            self._lost(f"no pod: {answer.line}")
            self._wait()
        else:
            raise ConfigError(f"{self._job.pod.name}: gcloud refuses to create it: {answer.line}")

    def _tend(self) -> int | None:
        """One look at a pod that is there, and what follows; the exit code of a run that has ended."""
        pod = self._job.pod
        status = run_status(pod)
        match status:
            case None:
                self._wait()  # the pod may just be going
            case "new":
                for step in steps.install(self._job):
                    answer = execute(step)
                    if answer.code:
                        self._lost(f"could not install: {answer.line}")
                        self._wait()
                        return None
            case "installed":
                self._start(again=self._has_run)
            case "running":
                self._has_run = True
                self._tell("the run goes on")
                self._wait()
            case "exit 0":
                return 0
            case _ if _is_final(status):
                execute(steps.last_words(pod))
                return int(status.split()[1])
            case _:
                execute(steps.last_words(pod))
                self._lost(f"the run is over: {status}")
                execute(steps.end(pod))
                self._start(again=True)
        return None

    def _start(self, again: bool) -> None:
        self._has_run = True
        answer = execute(steps.start(self._job, again))
        if answer.code:
            self._lost(f"could not start: {answer.line}")
            self._wait()

    def _lost(self, what: str) -> None:
        self._losses += 1
        self._tell(f"{what}; loss {self._losses} of {self._max_losses} (--max-losses)")
        if self._losses > self._max_losses:
            raise JobFailed(f"{self._job.pod.name}: {what}, after --max-losses={self._max_losses}")

    def _tell(self, what: str) -> None:
        """Once, however often it is seen in a row."""
        if what != self._seen:
            print(f"{datetime.now():%Y-%m-%d %H:%M:%S} {what}", flush=True)
        self._seen = what

    def _wait(self) -> None:
        time.sleep(self._poll_seconds)


def pod_state(pod: Pod) -> str | None:
    """As gcloud names it, "" where there is no such pod, None where it can't be told."""
    answer = execute(steps.describe(pod), loud=False)
    if answer.code == 0:
        return answer.out.strip()
    return "" if _NOT_THERE.search(answer.error) else None


def run_status(pod: Pod) -> str | None:
    """What `steps.look` prints, None where host 0 does not answer."""
    answer = execute(steps.look(pod), loud=False)
    found = re.findall(r"^openmoe (.+)$", answer.out, re.MULTILINE)
    return found[-1].strip() if found else None


def _is_final(status: str) -> bool:
    """A fault of the input, or a signal that someone sent."""
    code = re.fullmatch(r"exit (\d+)", status)
    return code is not None and (code[1] == "2" or int(code[1]) > 127)


def execute_all(todo: Sequence[Step]) -> None:
    """Raises JobFailed with the first that fails."""
    for step in todo:
        answer = execute(step)
        if answer.code:
            raise JobFailed(f"{step.title}: {answer.line}")
