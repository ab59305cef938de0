"""From a dense run to one with experts, by the command."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from openmoe.checkpoint.manifest import read_manifest
from openmoe.data.config import TokenizerConfig
from openmoe.data.tokenizer import train_tokenizer
from openmoe.launcher import train, upcycle

from .conftest import Small, lines

Command = Callable[..., str]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """command(module, "key=value", ...) runs it in this process; returns what it printed."""

    def run(module: object, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        module.main()  # type: ignore[attr-defined]
        return "".join(capsys.readouterr())

    return run


def test_from_dense_to_experts(
    small: Small, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bug: a receipt that is not of these models; a run that can't go on from the result, or not where the
    dense one stopped; a second model over the first."""
    command(train, *small(tmp_path / "dense", "model.moe_every=0", "train.steps=3"))

    def made(name: str, *more: str) -> str:
        return command(
            upcycle, *small(tmp_path / "moe"), f"upcycle.checkpoint={tmp_path / 'dense'}",
            f"upcycle.to={tmp_path / name}", "upcycle.receipt_rows=2", *more,
        )  # fmt: skip

    printed = made("same", "upcycle.expert_share=0", "upcycle.data=kept")
    assert f"checkpoint.resume={tmp_path / 'same/step_3'}" in printed
    receipt = json.loads((tmp_path / "same/receipt.json").read_text())
    validated = lines(tmp_path / "dense")[-1]
    for name in ("alpha", "beta"):
        source = receipt["sources"][name]
        assert source["logit_difference"] == source["kl"] == 0
        assert source["layers"] == [0, 0]
        # The dense run's own measure of the same rows.
        assert source["loss_before"] == pytest.approx(validated[f"eval/causal_lm/{name}/loss"], abs=1e-5)
        assert source["loss_after"] == source["loss_before"]

    # Its data, step and learning rate go on; the optimizer is a fresh one.
    go_on = small(tmp_path / "moe", f"checkpoint.resume={tmp_path / 'same'}", "train.steps=5")
    command(train, *go_on)
    found = lines(tmp_path / "moe")
    assert [line["step"] for line in found] == [4, 5]
    command(train, *small(tmp_path / "whole", "model.moe_every=0", "train.steps=4"))
    expected = lines(tmp_path / "whole")[-1]
    assert found[0]["lm_loss"] == pytest.approx(expected["lm_loss"], abs=1e-5)
    assert found[0]["learning_rate"] == expected["learning_rate"]
    assert found[0]["tokens_seen"] == expected["tokens_seen"]

    printed = made("other", "upcycle.method=noise", "upcycle.noise=0.3")
    assert f"checkpoint.initialise_from={tmp_path / 'other/step_3'}" in printed
    receipt = json.loads((tmp_path / "other/receipt.json").read_text())
    assert receipt["sources"]["alpha"]["layers"][0] == 0
    assert receipt["sources"]["alpha"]["layers"][1] > 0.01
    assert receipt["parameters"]["moe"] > receipt["parameters"]["dense"]
    command(
        train, *small(tmp_path / "new", f"checkpoint.initialise_from={tmp_path / 'other'}", "train.steps=1")
    )
    assert lines(tmp_path / "new")[0]["step"] == 1

    for arguments, fragment in (
        (["other"], "holds an upcycled model already"),
        (["x", "model.moe_every=0"], "model.moe_every=0: allowed 1"),
        (["x", "model.d_ff=64"], "model.d_ff=64: allowed 32, as in the dense checkpoint"),
        (["x", "upcycle.expert_share=2"], "upcycle.expert_share=2"),
        (["x", f"upcycle.checkpoint={tmp_path / 'moe'}"], "model.moe_every=2 in the checkpoint: allowed 0"),
    ):
        with pytest.raises(SystemExit) as ended:
            made(*arguments)
        line = capsys.readouterr().err.splitlines()[-1]
        assert ended.value.code == 2
        assert line.startswith("error: "), line
        assert fragment in line
    assert not (tmp_path / "x").exists()


def test_another_text(
    small: Small,
    tmp_path: Path,
    command: Command,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bug: a receipt that fails leaves a checkpoint behind, and the next try is told that it is there; tokens
    of another tokenizer read with the dense model's embedding; an upcycled model without its tokenizer."""
    command(train, *small(tmp_path / "dense", "model.moe_every=0", "train.steps=1"))
    page = [
        *small(tmp_path / "moe"),
        f"upcycle.checkpoint={tmp_path / 'dense'}",
        f"upcycle.to={tmp_path / 'up'}",
    ]
    for arguments, fragment in (
        (["upcycle.receipt_rows=2", "data.root=/nowhere"], "data.root=/nowhere"),
        (["upcycle.receipt_rows=2", "data.tokenizer.vocab_size=540"], "its model's tokenizer has SHA-256"),
    ):
        with pytest.raises(SystemExit) as ended:
            command(upcycle, *page, *arguments)
        assert ended.value.code == 2
        assert fragment in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "up").exists()
    own = (tmp_path / "dense/checkpoints/step_1/tokenizer.model").read_bytes()
    for rows in (0, 2):
        command(upcycle, *page, f"upcycle.receipt_rows={rows}")
        assert (tmp_path / "up/step_1/tokenizer.model").read_bytes() == own
        shutil.rmtree(tmp_path / "up")

    # A checkpoint of an earlier version holds none.
    dense = tmp_path / "dense/checkpoints/step_1"
    manifest = read_manifest(dense)
    files = {name: entry for name, entry in manifest.files.items() if name != "tokenizer.model"}
    (dense / "manifest.json").write_text(manifest.model_copy(update={"files": files}).text())
    (dense / "tokenizer.model").unlink()
    command(upcycle, *page, "upcycle.receipt_rows=0")
    assert (tmp_path / "up/step_1/tokenizer.model").read_bytes() == own
    shutil.rmtree(tmp_path / "up")
    other = train_tokenizer(["some other text " * 50], TokenizerConfig(vocab_size=512))
    monkeypatch.setattr("openmoe.checkpoint.origin.open_tokenizer", lambda *_: other)
    assert "holds no tokenizer: " in command(upcycle, *page, "upcycle.receipt_rows=0")
    assert not (tmp_path / "up/step_1/tokenizer.model").exists()
