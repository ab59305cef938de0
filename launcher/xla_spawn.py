"""Train on the XLA devices of this host, or as this host's part of a TPU pod:

    python -m openmoe.launcher.xla_spawn [--devices N] [--max-restarts N] [--] experiment=NAME [key=value ...]

or `openmoe-xla-spawn`. XLA partitions one program over all devices, so a host has one process, whatever the
number of its devices. Options stand before the first key of the run, or before `--`.
"""

import argparse
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from openmoe.launcher.errors import ConfigError, failure_of
from openmoe.launcher.supervisor import Supervisor
from openmoe.launcher.tpu_host import count_chips, find_host

TRAIN = "openmoe.launcher.train"
MOST_RESTARTS = 1000


def main() -> None:
    try:
        code = spawn(sys.argv[1:], os.environ)
    except (Exception, KeyboardInterrupt) as error:
        failure = failure_of(error)
        print(failure.text(), file=sys.stderr)
        code = failure.code
    sys.exit(code)


def spawn(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    engine: str = "xla",
    module: str = TRAIN,
    chips: int | None = None,
) -> int:
    """Starts `module` with these arguments and watches over it; the exit code.

    `chips` of a TPU are plugged in; None: look. Raises ConfigError, LostHosts.
    """
    options = parse(arguments)
    overrides = for_engine(options.overrides, engine)
    if options.max_restarts:
        check_resume(overrides, f"--max-restarts={options.max_restarts}")
    host = find_host(environment, options.devices, count_chips() if chips is None else chips)
    if engine == "xla" and importlib.util.find_spec("torch_xla") is None:
        raise ConfigError(
            "torch_xla: is not installed here; allowed `pip install 'openmoe[tpu]'`, which brings torch 2.9 "
            "and torch_xla 2.9, or the environment of `make test-xla`"
        )
    print(f"xla_spawn: {host.text}", file=sys.stderr, flush=True)

    def command(life: int) -> list[str]:
        again = ["checkpoint.resume=auto"] if life else []
        return [sys.executable, "-m", module, *overrides, *again]

    return Supervisor(host, command, environment, options.max_restarts).run()


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong as all commands do."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; --help shows what is allowed")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Options, and as `overrides` all that is the run's. Raises ConfigError."""
    parser = OneLineParser(
        prog="openmoe-xla-spawn",
        description="Train on the XLA devices of this host, or as this host's part of a TPU pod.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="without a TPU: virtual devices of the CPU (1); with one: all of its cores, or 2 (one chip)",
    )
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="start a run that fails (not one with a fault in its input) again so often, from its newest "
        "checkpoint (0)",
    )
    parser.add_argument("overrides", nargs=argparse.REMAINDER, metavar="key=value", help="of the run")
    options = parser.parse_args(arguments)
    if not 0 <= options.max_restarts <= MOST_RESTARTS:
        raise ConfigError(f"--max-restarts={options.max_restarts}: allowed 0 to {MOST_RESTARTS}")
    if options.overrides[:1] == ["--"]:
        del options.overrides[0]
    return options


def for_engine(overrides: Sequence[str], engine: str) -> list[str]:
    """The overrides of a run with parallel.engine. Raises ConfigError where they name another engine."""
    wanted = value_of("parallel.engine", overrides)
    if wanted not in (None, engine):
        raise ConfigError(f"parallel.engine={wanted}: allowed {engine}, or to leave it out")
    return [*overrides, *([] if wanted else [f"parallel.engine={engine}"])]


def check_resume(overrides: Sequence[str], because: str) -> None:
    """A start after a failure goes on from the newest checkpoint in run.dir. Where that run began at a path,
    it would begin from nothing instead, if there is none yet: ConfigError."""
    resume = value_of("checkpoint.resume", overrides)
    if resume not in (None, "none", "auto"):
        raise ConfigError(
            f"checkpoint.resume={resume}: allowed none or auto with {because}; each new start goes on from "
            "the newest checkpoint in run.dir"
        )


def value_of(key: str, overrides: Sequence[str]) -> str | None:
    """What the last of the overrides says about the key."""
    found = None
    for override in overrides:
        name, equals, value = override.partition("=")
        if equals and name.lstrip("+~") == key:
            found = value.strip("'\" ")
    return found


if __name__ == "__main__":
    main()
