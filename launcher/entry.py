"""The way from a command line to a validated Config and to an exit code; the only file that imports Hydra."""

import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import hydra
import torch
from hydra.errors import HydraException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from openmoe.checkpoint.errors import CheckpointError
from openmoe.data.errors import DataError
from openmoe.launcher.errors import ConfigError
from openmoe.launcher.schema import Config, Page, validate
from openmoe.parallel.topology import TopologyError
from openmoe.train.loop import NonFiniteLoss

CONFIGS = "pkg://openmoe.conf"
USER_ERRORS = (ConfigError, DataError, CheckpointError, TopologyError)


def run_command(task: Callable[[Page], None], page: type[Page], name: str) -> None:
    """Compose the page conf/`name`.yaml with the overrides of sys.argv, validate it, run `task`, exit.

    Exit code 0 on success, 2 with one line for a configuration that can't be run, 3 with one line for
    a failure on the way, 130 where Ctrl-C cut it short.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra hands us its errors and leaves the printing to us

    compositions: list[DictConfig] = []  # none for --cfg and --help
    compose = hydra.main(version_base="1.3", config_path=CONFIGS, config_name=name)(compositions.append)
    try:
        compose()
        for composed in compositions:  # outside of Hydra, which adds a line to each error of a task
            task(to_page(composed, page))
    except USER_ERRORS as error:
        _stop(error, 2)
    except (HydraException, OmegaConfBaseException) as error:
        _stop(error, 2)
    except (NonFiniteLoss, OSError) as error:  # OSError: a full disk, a file that went away
        _stop(error, 3)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if _out_of_memory(error):
            _stop(error, 3)
        traceback.print_exc()
        sys.exit(3)


def load_config(overrides: Sequence[str]) -> Config:
    """The Config of these command-line overrides; raises ConfigError."""
    try:
        with hydra.initialize_config_module("openmoe.conf", version_base="1.3"):
            return to_page(hydra.compose("config", list(overrides)), Config)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(_one_line(error)) from None


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
        raise ConfigError(f"{path}: {_one_line(error)}") from None


def _out_of_memory(error: Exception) -> bool:
    """numpy raises MemoryError, a CUDA device OutOfMemoryError, the CPU a plain RuntimeError."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def _stop(error: BaseException, code: int) -> None:
    print(f"error: {_one_line(error)}", file=sys.stderr)
    sys.exit(code)


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines) or type(error).__name__
    return f"{error.override}: {text}" if isinstance(error, OverrideParseException) else text
