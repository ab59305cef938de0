"""What parallel.engine=xla refuses at the start; none of it needs torch_xla to be there."""

import importlib.util
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module

from openmoe.launcher.entry import to_page
from openmoe.launcher.errors import ConfigError
from openmoe.launcher.layout import count_ranks, lay_out
from openmoe.launcher.schema import Config
from openmoe.parallel.topology import TopologyError

from .commands import Commands
from .conftest import Small


def page(*overrides: str) -> Config:
    arguments = ["experiment=tiny", "parallel.engine=xla", "model.dispatch=einsum", *overrides]
    with initialize_config_module("openmoe.conf", version_base="1.3"):
        return to_page(compose("config", arguments), Config)


@pytest.mark.skipif(importlib.util.find_spec("torch_xla") is not None, reason="torch_xla is here")
def test_torch_xla_is_missing(small: Small, commands: Commands, tmp_path: Path) -> None:
    """Bug: a traceback of an import, or a run that goes on with another engine."""
    code, stderr = commands.run(*small(tmp_path / "run", "parallel.engine=xla", "model.dispatch=einsum"))
    assert code == 2
    assert stderr.startswith("error: parallel.engine=xla: torch_xla is not installed in this environment")
    assert stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("model.dispatch=sort", "model.dispatch=sort: allowed einsum with parallel.engine=xla"),
        ("model.dropless=true", "model.dropless=true: allowed false with parallel.engine=xla"),
        ("data.packing=dense", "data.packing=dense: allowed released with parallel.engine=xla"),
        ("parallel.compile=true", "parallel.compile=true: allowed false with parallel.engine=xla"),
        ("parallel.recompute=selective", "parallel.recompute=selective: allowed none or full with"),
        ("parallel.exchange=uneven", "parallel.exchange=uneven: allowed auto or fixed with"),
        ("parallel.overlap=on", "parallel.overlap=on: allowed auto or off with"),
        ("parallel.tensor=16", "parallel.tensor=16 is 16: allowed a divisor of the 8"),
        ("parallel.shard=16", "is 16: allowed the 8"),
        (
            "parallel.expert=8 parallel.tensor=2",
            "parallel.expert=8: allowed a divisor of parallel.shard=4 with",
        ),
    ],
)
def test_what_has_no_static_shape_or_no_mesh(override: str, line: str) -> None:
    """Bug: a run that compiles anew each step, aborts in the partitioner, or trains something else."""
    with pytest.raises(TopologyError) as found:
        lay_out(page(*override.split()), 8, alone=True)
    assert line in str(found.value)
    assert "\n" not in str(found.value)


def test_layouts_of_the_mesh_are_taken() -> None:
    """Bug: a check made for process groups refuses what the mesh can do."""
    assert lay_out(page("parallel.expert=4", "parallel.tensor=2"), 8, alone=True).xla_shape() == (1, 4, 2)
    assert lay_out(page("parallel.replicate=2", "parallel.expert=4"), 8, alone=True).xla_shape() == (2, 4, 1)


def test_device_is_xlas_to_choose() -> None:
    """Bug: run.device=cuda is read by nobody."""
    with pytest.raises(ConfigError, match=r"run\.device=cpu: allowed auto with parallel\.engine=xla"):
        count_ranks(page("run.device=cpu"), 1)
