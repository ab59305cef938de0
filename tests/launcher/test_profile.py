"""`train.profile=true`: what a run leaves, and that it trains as if nothing had watched."""

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from openmoe.launcher.entry import load_config
from openmoe.launcher.errors import ConfigError
from openmoe.model.parts import HEAD, PARTS

from .commands import Commands
from .conftest import Small, lines


def test_a_profiled_run(
    small: Small, commands: Commands, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Bug: a profile that changes what is trained, or leaves hooks behind; a part that is not found where its
    module has another name; time that counts twice, or nowhere."""
    command = commands.start(*small(tmp_path / "run", "train.profile=true"))
    assert command.wait() == 0, command.stderr
    assert lines(tmp_path / "run") == undisturbed
    folder = tmp_path / "run" / "profile"
    text = (folder / "table.txt").read_text()
    head, *rows = text.splitlines()
    assert re.fullmatch(r"profile of steps 4 to 6: \S+ s a step, MFU \S+%, traced", head)
    shares = {row[2:24].strip(): float(row.split()[-1].rstrip("%")) for row in rows[1:]}
    assert {*PARTS.values(), HEAD, "optimizer", "data"} <= shares.keys()
    assert sum(shares.values()) == pytest.approx(100, abs=3)
    assert all(
        float(row[24:].split()[1]) > 0 for row in rows[1:] if row[2:24].strip() in (*PARTS.values(), HEAD)
    )
    with gzip.open(folder / "trace.json.gz", "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"part: experts", "part: data"} <= names
    assert "profile of steps 4 to 6" in command.stdout + command.stderr


def test_a_short_run(small: Small, commands: Commands, tmp_path: Path) -> None:
    """Bug: a run that ends before the steps to profile leaves nothing, or fails at its end."""
    code, stderr = commands.run(*small(tmp_path / "two", "train.profile=true", "train.steps=2"))
    assert code == 0, stderr
    assert (tmp_path / "two" / "profile" / "table.txt").read_text().startswith("profile of steps 2 to 2:")
    command = commands.start(*small(tmp_path / "one", "train.profile=true", "train.steps=1"))
    assert command.wait() == 0, command.stderr
    assert "no profile: the run has ended before its second step" in command.stdout + command.stderr


@pytest.mark.parametrize("other", ["parallel.engine=xla", "parallel.compile=true"])
def test_what_can_not_be_profiled(other: str) -> None:
    """Bug: a table in which everything is "the rest"."""
    with pytest.raises(ConfigError) as error:
        load_config(["experiment=tiny", "train.profile=true", other])
    assert str(error.value) == f"train.profile=true: allowed without {other}, which hides the parts of a step"
