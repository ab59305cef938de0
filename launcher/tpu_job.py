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
    r"more capacity|\b(ALREADY_EXISTS|RESOURCE_EXHAUSTED|UNAVAILABLE|INTERNAL|ABORTED|DEADLINE_EXCEEDED)\b"
    r"|[Tt]imed? ?out"
)
_NOT_THERE = re.compile(r"NOT_FOUND|not found", re.IGNORECASE)
_MOVING = {"CREATING", "STARTING", "RESTARTING", "REPAIRING", "DELETING", "STOPPING", "UNKNOWN"}
_MOST_SILENCES = 20  # looks in a row that gcloud or ssh does not answer


class JobFailed(OSError):
    """A job that can't go on. Exit code 3."""


class NoContact(JobFailed):
    """The pod can't be reached from here. Its run may be in the best of health."""


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
        self._going = False  # it is lost and counted, but not deleted yet
        self._has_run = False  # something that a new start may go on from
        self._silences = 0  # looks in a row without an answer
        self._seen = ""

    def run(self) -> int:
        """To the end of the run; its exit code: 0, 2, or that of a signal.

        Raises ConfigError where gcloud refuses what was asked for, or another job is on the pod, JobFailed
        where too much was lost, NoContact.
        """
        pod = self._job.pod
        while True:
            state = pod_state(pod)
            if state not in (None, "READY"):
                self._silences = 0
            match state:
                case None:
                    self._silent("gcloud failed")
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
                    if not self._going:
                        self._lost(f"the pod is {lost}")
                    self._going, self._created = True, False
                    if execute(steps.delete(pod)).code:
                        self._wait()

    def _create(self) -> None:
        if self._created:
            self._created = False
            self._lost("the pod is gone")
        self._going = False
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
        answer = execute(steps.look(pod), loud=False)
        words = re.findall(r"^openmoe (.+)$", answer.out, re.MULTILINE)
        if not words:  # the pod may just be going
            self._silent(f"host 0 did not answer ({answer.line})")
            return None
        self._silences = 0
        status = words[-1].strip()
        if len(words) > 1 and words[0] != f"job {self._job.digest}":
            if status == "running":
                raise ConfigError(
                    f"{pod.name}: trains another job; allowed the same run.dir and keys, or another --name"
                )
            self._end("what another job has left", again=False)
            return None
        match status:
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
            case "saved":
                self._lost("the run has saved and left before its end, on a signal that `stop` did not send")
                self._end("the run", again=True)
            case _ if _is_final(status):
                execute(steps.last_words(pod))
                return int(status.split()[1])
            case _:
                execute(steps.last_words(pod))
                self._lost(f"the run is over: {status}")
                self._end("the run", again=True)
        return None

    def _end(self, what: str, again: bool) -> None:
        """On all hosts, before another start. `again`: it has run, and a new start goes on from there."""
        self._has_run = again
        answer = execute(steps.end(self._job.pod))
        if answer.code:
            self._lost(f"could not end {what}: {answer.line}")
            self._wait()
        else:
            self._start(again)

    def _start(self, again: bool) -> None:
        answer = execute(steps.start(self._job, again))
        if answer.code:
            self._lost(f"could not start: {answer.line}")
            self._wait()

    def _silent(self, what: str) -> None:
        self._silences += 1
        if self._silences > _MOST_SILENCES:
            raise NoContact(
                f"{self._job.pod.name}: {what}, {self._silences} times in a row; pod and run may be there"
            )
        self._tell(f"{what}; {self._silences} times in a row")
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


def _is_final(status: str) -> bool:
    """A fault of the input, or SIGINT, SIGHUP or SIGTERM; SIGKILL is what a machine out of memory sends."""
    return status in ("exit 2", "exit 129", "exit 130", "exit 143")


def execute_all(todo: Sequence[Step]) -> None:
    """Raises JobFailed with the first that fails."""
    for step in todo:
        answer = execute(step)
        if answer.code:
            raise JobFailed(f"{step.title}: {answer.line}")
