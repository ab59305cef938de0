"""The report of a run: its table, samples and picture."""

from pathlib import Path

import matplotlib.image
import pytest

from openmoe.launcher.entry import load_config
from openmoe.launcher.errors import ConfigError
from openmoe.launcher.report import report
from openmoe.launcher.train import train

from .conftest import Small


@pytest.mark.parametrize(
    "more", [[], ["model.moe_every=0"], ["experiment=tiny_released", "model.group_rows=2"]]
)
def test_report(small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]) -> None:
    """Bug: a picture or table that breaks on a dense model, on groups of two rows with one prompt, or on the
    half line of a run that is still being written."""
    train(load_config(small(tmp_path, "train.validate_every_steps=3", *more)))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "tokens_se')
    report(tmp_path)
    out = capsys.readouterr().out
    assert "alpha" in out
    assert "phase 0 (ul2)" in out
    assert "phase 1 (causal_lm)" in out
    assert ("expert load" in out) == ("model.moe_every=0" not in more)
    assert out.count("continued at |") == 2
    picture = matplotlib.image.imread(tmp_path / "report.png")
    assert picture.std() > 0.05


def test_no_run(tmp_path: Path) -> None:
    """Bug: a traceback where there is nothing to report."""
    with pytest.raises(ConfigError, match="no run there"):
        report(tmp_path)
