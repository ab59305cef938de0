"""The named experiments and the page that `--cfg job` prints."""

from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from openmoe.launcher.entry import load_config, to_page
from openmoe.launcher.schema import Config

from .commands import Commands

EXPERIMENTS = ["tiny", "openmoe_base", "openmoe_8b", "openmoe_34b"]
EXPERIMENTS += [f"{name}_released" for name in EXPERIMENTS]


def key_paths(value: Any, prefix: str = "") -> set[str]:
    """Dotted names of all keys. Mixes are named freely and phases give one of two marks: no keys here."""
    if not isinstance(value, dict):
        return {prefix}
    return {
        path
        for name, inner in value.items()
        if name not in ("mixes", "curriculum")
        for path in key_paths(inner, f"{prefix}.{name}".removeprefix("."))
    }


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_the_page_holds_every_key(experiment: str, commands: Commands) -> None:
    """Bug: a key that exists only as a default in the code, where no user finds it; a page that can't be
    composed."""
    if experiment.endswith("8b"):
        command = commands.start(f"experiment={experiment}", "--cfg", "job", "--resolve")
        assert command.wait() == 0, command.stderr
        composed = OmegaConf.create(command.stdout)
        assert isinstance(composed, DictConfig)
    else:
        with initialize_config_module("openmoe.conf", version_base="1.3"):
            composed = compose("config", [f"experiment={experiment}"])
    config = to_page(composed, Config)
    page = OmegaConf.to_container(composed, resolve=True)
    assert key_paths(page) == key_paths(config.model_dump())
    assert config == load_config([f"experiment={experiment}"])
    assert config.run.dir == f"runs/{experiment}"


@pytest.mark.parametrize("optim", ["adafactor", "adamw"])
def test_every_optimizer_has_all_its_keys(optim: str) -> None:
    """Bug: as above, for the group that the experiments do not choose."""
    with initialize_config_module("openmoe.conf", version_base="1.3"):
        composed = compose("config", [f"optim={optim}"])
    page = OmegaConf.to_container(composed.optim, resolve=True)
    assert key_paths(page) == key_paths(to_page(composed, Config).model_dump()["optim"])


def test_the_bare_command_is_tiny() -> None:
    """Bug: the shortest command asks for arguments."""
    assert load_config([]) == load_config(["experiment=tiny"])


def test_released_experiments_differ_where_facts_say() -> None:
    """Bug: a `_released` page that is a copy of the paper's."""
    for name in EXPERIMENTS[:4]:
        paper = load_config([f"experiment={name}"]).model
        released = load_config([f"experiment={name}_released"]).model
        assert (paper.ffn, released.ffn) == ("swiglu3", "swiglu4")
        assert (paper.residual, released.residual) == ("parallel_shared_norm", "sequential")
        assert (paper.group_rows, released.group_rows) == (1, 4 if name == "openmoe_34b" else 2)
        assert (paper.route_padding, released.route_padding) == (False, True)
