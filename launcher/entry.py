"""The way from a command line to a validated Config and to an exit code; the only file that imports Hydra."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from openmoe.launcher.errors import ConfigError, failure_of, one_line
from openmoe.launcher.processes import ALONE, FOLLOWER_SECONDS, JoinedProcesses, Processes
from openmoe.launcher.rank_log import quiet_unless
from openmoe.launcher.rendezvous import AgreedFailure, Place, place_from
from openmoe.launcher.sameness import shared_keys, versions
from openmoe.launcher.schema import Config, Page, validate
from openmoe.parallel.config import ParallelConfig

CONFIGS = "pkg://openmoe.conf"


def run_command(task: Callable[[Page], None], page: type[Page], name: str) -> None:
    """Compose the page conf/`name`.yaml with the overrides of sys.argv, validate it, run `task`, exit.

    Exit code 0 on success, 2 with one line for a configuration that can't be run, 3 with one line for
    a failure on the way, 130 where Ctrl-C cut it short.
    """
    try:
        composed = _compose(page, name)
        if composed is not None:
            task(composed)
    except (Exception, KeyboardInterrupt) as error:
        _stop(error)


def run_joined(task: Callable[[Config, Processes], None], name: str) -> None:
    """`run_command` for a task that several processes may do together, where the environment says so.

    Faults of the input end all processes with the same exit code and one line, before any of them writes.
    """
    try:
        place = place_from(os.environ)
        if place is not None:
            sys.argv[:] = without_local_rank(sys.argv, place.local_rank)
    except ConfigError as error:
        # If it is the same for all, one voice is enough: a launcher ends the others meanwhile.
        rank = os.environ.get("RANK", "0")
        time.sleep(0.0 if rank == "0" else FOLLOWER_SECONDS)
        _stop(error, "" if rank == "0" else f"rank {rank[:20]}: ")
    if place is None:
        run_command(lambda config: task(config, ALONE), Config, name)
    else:
        _run_with_others(task, name, place)


def without_local_rank(arguments: Sequence[str], local_rank: int) -> list[str]:
    """Without the --local_rank=N that the deepspeed launcher appends, which is no key of ours.

    Raises ConfigError where it is not the LOCAL_RANK of the environment.
    """
    kept = []
    for argument in arguments:
        option, _, value = argument.partition("=")
        if option not in ("--local_rank", "--local-rank"):
            kept.append(argument)
        elif value != str(local_rank):
            raise ConfigError(f"{argument[:80]}: allowed LOCAL_RANK={local_rank}, or to leave it out")
    return kept


def _run_with_others(task: Callable[[Config, Processes], None], name: str, place: Place) -> NoReturn:
    config: Config | None = None
    fault: Exception | None = None
    try:
        with quiet_unless(place.rank == 0):
            config = _compose(Config, name)
        if config is None:
            sys.exit(0)
    except Exception as error:
        fault = error
    timeouts = config.parallel if config else ParallelConfig()
    try:
        processes = JoinedProcesses(place, timeouts.start_timeout_seconds, timeouts.timeout_seconds)
    except AgreedFailure as error:
        if error.speaks:
            print(error.failure.text(), file=sys.stderr, flush=True)
        _leave(error.failure.code)
    except (Exception, KeyboardInterrupt) as error:
        time.sleep(0.0 if place.rank == 0 else FOLLOWER_SECONDS)
        failure = failure_of(error)
        print(failure.text(f"rank {place.rank}: " if place.rank else ""), file=sys.stderr, flush=True)
        _leave(failure.code)

    def composed() -> Config:
        if config is None:
            assert fault is not None
            raise fault
        return config

    code = 0
    try:
        processes.require_same(versions())
        agreed = processes.agree(composed)
        processes.require_same(shared_keys(agreed))
        task(agreed, processes)
    except (Exception, KeyboardInterrupt) as error:
        code = processes.report(error)
    if processes.close(well=code == 0) and code == 0:
        sys.exit(0)
    _leave(code)  # what a failure has left behind, such as a save that hangs, is not waited for


def _leave(code: int) -> NoReturn:
    """At once, whatever threads still wait for."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def load_config(overrides: Sequence[str]) -> Config:
    """The Config of these command-line overrides; raises ConfigError."""
    return load_page(Config, "config", overrides)


def load_page(page: type[Page], name: str, overrides: Sequence[str]) -> Page:
    """The page conf/`name`.yaml with these overrides; raises ConfigError."""
    try:
        with hydra.initialize_config_module("openmoe.conf", version_base="1.3"):
            return to_page(hydra.compose(name, list(overrides)), page)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_hydra_line(error)) from None


def to_page(composed: DictConfig, page: type[Page]) -> Page:
    values = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    assert isinstance(values, dict)
    values.pop("hydra", None)
    return validate({str(key): value for key, value in values.items()}, page)


def write_config(config: Config, path: Path) -> None:
    """All that was composed, as the run's own record."""
    fresh = path.with_suffix(".new")
    fresh.write_text(OmegaConf.to_yaml(OmegaConf.create(config.model_dump())))
    os.replace(fresh, path)


def read_config(path: Path) -> Config:
    """The Config that `write_config` wrote; raises ConfigError."""
    try:
        composed = OmegaConf.load(path)
        assert isinstance(composed, DictConfig)
        return to_page(composed, Config)
    except (OSError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path}: {_hydra_line(error)}") from None


def _compose(page: type[Page], name: str) -> Page | None:
    """The page with the overrides of sys.argv; None where Hydra only had to print. Raises ConfigError."""
    if not any(argument.startswith("-") for argument in sys.argv[1:]):
        return load_page(page, name, sys.argv[1:])  # `hydra.main` would compose the same, twice
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands us its errors and leaves the printing to us
    compositions: list[DictConfig] = []  # none for --cfg and --help
    try:
        hydra.main(version_base="1.3", config_path=CONFIGS, config_name=name)(compositions.append)()
        # outside of Hydra, which adds a line to each error of a task
        return to_page(compositions[0], page) if compositions else None
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_hydra_line(error)) from None


def _stop(error: BaseException, who: str = "") -> NoReturn:
    failure = failure_of(error)
    print(failure.text(who), file=sys.stderr)
    sys.exit(failure.code)


def _hydra_line(error: BaseException) -> str:
    text = one_line(error)
    return f"{error.override}: {text}" if isinstance(error, OverrideParseException) else text
