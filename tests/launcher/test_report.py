"""The report of a run: its table, samples and picture."""

from pathlib import Path

import matplotlib.image
import pytest

from openmoe.data.config import TokenizerConfig
from openmoe.data.prepare import PreparedData
from openmoe.data.tokenizer import TrainingStyle, train_tokenizer
from openmoe.launcher import report as command
from openmoe.launcher.entry import load_config
from openmoe.launcher.errors import ConfigError
from openmoe.launcher.report import report
from openmoe.launcher.train import train
from openmoe.model.generation import Generated

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


def test_the_space_before_a_continuation(
    small: Small, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: with a tokenizer that puts a space before each text, samples whose first words grow together."""
    style = TrainingStyle(dummy_prefix=True, squeeze_spaces=True)
    tokenizer = train_tokenizer(["the cat sat on a mat " * 30], TokenizerConfig(vocab_size=512), style)
    made = Generated(tokenizer.encode("cat sat"), [], ended=False)
    monkeypatch.setattr(command, "find_checkpoint", lambda *_: tmp_path)
    monkeypatch.setattr(command, "load_model", lambda *_: None)
    monkeypatch.setattr(command, "generate", lambda *_: [made] * len(command.PROMPTS))
    command.print_samples(load_config(small(tmp_path)), PreparedData(tokenizer, {}), tmp_path)
    assert capsys.readouterr().out.count("| cat sat\n") == 2


def test_no_run(tmp_path: Path) -> None:
    """Bug: a traceback where there is nothing to report."""
    with pytest.raises(ConfigError, match="no run there"):
        report(tmp_path)
