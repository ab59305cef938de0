"""A training job on a TPU v3 pod: the commands that create it, install, train and delete, or their execution.

    python -m openmoe.launcher.tpu job [--run] --name NAME --zone ZONE --accelerator-type v3-128 \\
        --package PACKAGE --share SERVER:/FOLDER [...] -- experiment=NAME run.dir=/mnt/openmoe/RUN [...]
    python -m openmoe.launcher.tpu status|stop|delete [--run] --name NAME --zone ZONE

or `openmoe-tpu`. Without --run the commands are printed, exactly as --run executes them.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import PurePosixPath

from openmoe.launcher import tpu_steps as steps
from openmoe.launcher.entry import load_config
from openmoe.launcher.errors import ConfigError, failure_of
from openmoe.launcher.layout import lay_out
from openmoe.launcher.schema import Config
from openmoe.launcher.tpu_host import slice_of
from openmoe.launcher.tpu_job import Follower, JobFailed, NoContact, execute, execute_all
from openmoe.launcher.tpu_steps import Job, Pod, Step, rendered
from openmoe.launcher.xla_spawn import OneLineParser, check_resume, for_engine
from openmoe.model.accounting import count_parameters

ACTIONS = ("job", "status", "stop", "delete")


def main() -> None:
    try:
        code = command(sys.argv[1:])
    except (Exception, KeyboardInterrupt) as error:
        failure = failure_of(error)
        print(failure.text(), file=sys.stderr)
        code = failure.code
    sys.exit(code)


def command(arguments: Sequence[str]) -> int:
    """Prints or executes; the exit code. Raises ConfigError, TopologyError, JobFailed."""
    parser = _parser()
    if arguments[:1] in ([], ["-h"], ["--help"]):
        parser.print_help()
        return 0
    if arguments[0] not in ACTIONS:
        raise ConfigError(f"{arguments[0][:80]}: allowed {', '.join(ACTIONS)} as the first word")
    action, options = arguments[0], parser.parse_args(arguments[1:])
    if options.overrides[:1] == ["--"]:
        del options.overrides[0]
    pod = Pod(
        _matching("--name", options.name, r"[a-z]([a-z0-9-]{0,61}[a-z0-9])?", "letters, digits and dashes"),
        _matching("--zone", options.zone, r"[a-z]+-[a-z]+\d+-[a-z]", "a zone such as europe-west4-a"),
        options.project,
    )
    if options.run and shutil.which("gcloud") is None:
        raise ConfigError(
            "--run: gcloud is not on PATH here; allowed without --run, which prints the commands"
        )
    match action:
        case "job":
            return _job(options, pod)
        case "status":
            todo = [steps.describe(pod), steps.look(pod), steps.last_words(pod)]
        case "stop":
            todo = steps.stop(pod)
        case _:
            todo = [steps.delete(pod)]
    if options.overrides:
        raise ConfigError(f"{options.overrides[0][:80]}: allowed with job")
    if options.run:
        execute_all(todo)
    else:
        print(rendered(todo))
    return 0


def _job(options: argparse.Namespace, pod: Pod) -> int:
    job, about = make_job(options, pod)
    print("\n".join(f"# {line}" for line in about), flush=True)
    if not options.run:
        print()
        print(rendered(all_steps(job, options.max_losses, options.keep)))
        return 0
    try:
        code = Follower(job, options.max_losses, options.poll_seconds).run()
    except KeyboardInterrupt:
        print(
            "the pod and the run go on: the same command follows them again, `stop` ends the run", flush=True
        )
        raise
    except NoContact:
        _end(job, keep=True)
        raise
    except JobFailed:
        _end(job, options.keep)
        raise
    _end(job, options.keep)
    return code


def make_job(options: argparse.Namespace, pod: Pod) -> tuple[Job, list[str]]:
    """The job, and what a user should know of it. Raises ConfigError, TopologyError."""
    for name in ("accelerator_type", "package", "share"):
        if getattr(options, name) is None:
            raise ConfigError(f"--{name.replace('_', '-')}: missing; --help shows what is allowed")
    for name, least in (("max_restarts", 0), ("max_losses", 0), ("poll_seconds", 0)):
        if getattr(options, name) < least:
            raise ConfigError(f"--{name.replace('_', '-')}={getattr(options, name)}: allowed from {least}")
    whole = slice_of("--accelerator-type", options.accelerator_type)
    share = _matching(
        "--share", options.share, r"[^\s:,]+:/\S*", "SERVER:/FOLDER, what all hosts can mount by NFS"
    )
    mount = PurePosixPath(_matching("--mount", options.mount, r"/[^\s]+", "a folder on the hosts"))
    overrides = for_engine(options.overrides, "xla")
    config = load_config(overrides)
    check_resume([f"checkpoint.resume={config.checkpoint.resume}"], "a pod that may be lost")
    if config.run.device != "auto":
        raise ConfigError(f"run.device={config.run.device}: allowed auto; XLA takes the devices of the pod")
    _check_folders(config, mount)
    run_dir = PurePosixPath(config.run.dir)
    job = Job(
        pod, whole, options.version, options.spot, options.package, share, mount, run_dir, tuple(overrides),
        options.max_restarts,
    )  # fmt: skip
    if job.wheel is not None and not job.wheel.is_file():
        raise ConfigError(f"--package={options.package}: no such file; allowed a wheel, or git+https://...")
    return job, _about(config, job)


def _about(config: Config, job: Job) -> list[str]:
    """Raises TopologyError, ConfigError where the run does not fit the pod."""
    topology = lay_out(config, job.slice.cores, alone=False)
    data, expert, model = topology.xla_shape()
    lines = [
        job.slice.describe(),
        f"mesh data {data} x expert {expert} x model {model} (replicate {topology.replicate}, shard "
        f"{topology.shard}, tensor {topology.tensor}, expert {topology.expert}); "
        f"{config.train.global_batch_rows // (data * expert)} rows of a batch for each of {data * expert}",
        f"{count_parameters(config.model).total:,} parameters, {config.train.precision}",
    ]
    if not config.checkpoint.every_steps:
        lines.append("warning: checkpoint.every_steps=0: a run that is lost begins from nothing")
    return lines


def _check_folders(config: Config, mount: PurePosixPath) -> None:
    """All hosts write one checkpoint, by rename and fsync in one folder, and a new pod has nothing else."""
    folders = {
        "run.dir": config.run.dir,
        "data.root": config.data.root,
        "data.tokenizer.path": config.data.tokenizer.path,
        "checkpoint.initialise_from": config.checkpoint.initialise_from,
    }
    for key, folder in folders.items():
        path = PurePosixPath(folder) if folder is not None else None
        if path is not None and (mount not in path.parents or ".." in path.parts):
            raise ConfigError(
                f"{key}={path}: allowed below {mount}, the folder that all hosts share (--mount)"
            )


def all_steps(job: Job, max_losses: int, keep: bool) -> list[Step]:
    """In the order of a job that loses nothing, then those of one that does."""
    pod = job.pod
    found = [steps.create(job), *steps.install(job), steps.start(job, again=False)]
    found += [steps.describe(pod), steps.look(pod)]
    if max_losses:
        lost = [steps.last_words(pod), steps.end(pod), steps.start(job, again=True)]
        found += [Step(f"if it has failed: {step.title}", step.command) for step in lost]
    found += steps.stop(pod)
    return found if keep else [*found, steps.delete(pod)]


def _end(job: Job, keep: bool) -> None:
    if keep:
        print(f"the pod stays, and costs; to delete it:\n{steps.delete(job.pod).command}", flush=True)
    else:
        execute(steps.delete(job.pod))


def _matching(option: str, value: str | None, pattern: str, allowed: str) -> str:
    if value is None or not re.fullmatch(pattern, value):
        raise ConfigError(
            f"{option}: missing" if value is None else f"{option}={value[:80]}: allowed {allowed}"
        )
    return value


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="openmoe-tpu",
        usage=f"openmoe-tpu {{{','.join(ACTIONS)}}} [--run] --name NAME --zone ZONE [...] [-- key=value ...]",
        description="A training job on a TPU v3 pod. Prints the commands; --run executes them.",
        allow_abbrev=False,
    )
    parser.add_argument("--run", action="store_true", help="execute the commands")
    parser.add_argument("--name", help="of the pod")
    parser.add_argument("--zone")
    parser.add_argument("--project", help="(that of gcloud)")
    job = parser.add_argument_group("job")
    job.add_argument("--accelerator-type", metavar="v3-N", help="N cores, from v3-8 to v3-2048")
    job.add_argument("--version", default="tpu-ubuntu2204-base", help="of the machine (tpu-ubuntu2204-base)")
    job.add_argument(
        "--spot", action="store_true", help="may be taken away at any time, and is created again"
    )
    job.add_argument("--package", help="what to install: a wheel of this machine, or git+https://...@COMMIT")
    job.add_argument("--share", metavar="SERVER:/FOLDER", help="a file server (NFS) that all hosts can mount")
    job.add_argument("--mount", default="/mnt/openmoe", help="where; run.dir lies below it (/mnt/openmoe)")
    job.add_argument("--max-restarts", type=int, default=3, metavar="N", help="of a run on its pod (3)")
    job.add_argument(
        "--max-losses", type=int, default=10, metavar="N", help="of the pod or all of a run (10)"
    )
    job.add_argument("--poll-seconds", type=float, default=60.0, metavar="S", help="between two looks (60)")
    job.add_argument("--keep", action="store_true", help="do not delete the pod at the end of the run")
    parser.add_argument("overrides", nargs=argparse.REMAINDER, metavar="key=value", help="of the run")
    return parser


if __name__ == "__main__":
    main()
