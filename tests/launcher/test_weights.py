"""Weights out, in, and as the start of a run, by the commands."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from openmoe.checkpoint.manifest import read_manifest
from openmoe.checkpoint.names import tensor_names
from openmoe.checkpoint.origin import model_config_of, tokenizer_of
from openmoe.checkpoint.stored_tensors import CheckpointTensors
from openmoe.data.prepare import prepare
from openmoe.data.tokenizer import load_tokenizer
from openmoe.launcher import export, import_weights, train
from openmoe.launcher.entry import load_config, read_config

from .conftest import Small, lines
from .test_processes import free_port

RELEASED = (
    "model.ffn=swiglu4",
    "model.residual=sequential",
    "model.mask_padding=true",
    "model.route_padding=true",
    "train.z_loss_weight=1e-4",
    "checkpoint.every_steps=0",
)
Command = Callable[..., str]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """command(module, "key=value", ...) runs it in this process; returns what it printed."""

    def run(module: object, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        module.main()  # type: ignore[attr-defined]
        return "".join(capsys.readouterr())

    return run


@pytest.fixture
def refused(command: Command, capsys: pytest.CaptureFixture[str]) -> Command:
    """refused(module, "key=value", ...) -> the line; exit code 2."""

    def run(module: object, *arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            command(module, *arguments)
        printed = capsys.readouterr().err
        assert ended.value.code == 2, printed
        line = printed.splitlines()[-1]
        assert line.startswith("error: "), printed
        return line

    return run


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_out_in_and_on(small: Small, tmp_path: Path, command: Command, refused: Command) -> None:
    """Bug: weights or tokenizer that change on the way round, a start that keeps initial values or takes an
    old step, a start that overrides the checkpoint of a run that goes on."""
    first = tmp_path / "first"
    command(train, *small(first, *RELEASED, "train.steps=3"))
    printed = command(export, f"checkpoint={first}", f"to={tmp_path / 'given'}")
    assert "step 3" in printed
    command(import_weights, f"weights={tmp_path / 'given'}", f"to={tmp_path / 'taken'}")
    folder = tmp_path / "taken" / "step_3"
    manifest = read_manifest(folder)
    config = read_config(first / "config.yaml")
    assert model_config_of(folder, manifest) == config.model
    data = prepare(config.data, config.model.vocab_size, ["alpha", "beta"])
    assert tokenizer_of(folder, manifest).model == data.tokenizer.model
    assert tokenizer_of(first / "checkpoints/step_3", read_manifest(first / "checkpoints/step_3")).model == (
        data.tokenizer.model
    )
    values = json.loads((tmp_path / "given/config.json").read_text())
    assert (values["z_loss_factor"], values["router_aux_loss_factor"]) == (1e-4, 1e-2)

    command(export, f"checkpoint={folder}", f"to={tmp_path / 'again'}")
    assert content(tmp_path / "again") == content(tmp_path / "given")

    starts = {
        name: [*small(tmp_path / name, *RELEASED), f"checkpoint.initialise_from={tmp_path / origin}"]
        for name, origin in (("second", "taken"), ("third", "first"))
    }
    for arguments in starts.values():
        assert "with the weights of" in command(train, *arguments, "train.steps=2")
    second = lines(tmp_path / "second")
    assert second == lines(tmp_path / "third")
    assert [line["step"] for line in second] == [1, 2]
    assert second[0]["loss"] < lines(first)[0]["loss"] - 1e-3  # the same rows, before they were learned from
    assert second[0]["learning_rate"] == lines(first)[0]["learning_rate"]

    go_on = [*starts["second"], "checkpoint.resume=auto", "train.steps=4"]
    assert "(step 2)" in command(train, *go_on)
    whole = [*starts["third"], f"run.dir={tmp_path / 'whole'}", "checkpoint.resume=auto", "train.steps=4"]
    command(train, *whole)
    losses = [[line["loss"] for line in lines(tmp_path / name)] for name in ("second", "whole")]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 4

    for key in ("resume", "initialise_from"):
        line = refused(train, *small(tmp_path / "x", *RELEASED), f"checkpoint.{key}={tmp_path / 'given'}")
        assert f"checkpoint.{key}={tmp_path / 'given'}: no checkpoint there" in line
    line = refused(train, *small(tmp_path / "x", *RELEASED), f"checkpoint.resume={tmp_path / 'taken'}")
    assert "holds weights alone" in line
    assert f"checkpoint.initialise_from={folder}" in line
    line = refused(train, *starts["second"], f"checkpoint.resume={first}", "run.dir=x")
    assert "checkpoint: initialise_from=" in line
    line = refused(train, *starts["second"], "model.d_ff=64", f"run.dir={tmp_path / 'x'}")
    assert "model.d_ff is 32 in the checkpoint, 64 here" in line
    assert not (tmp_path / "x").exists()
    damaged = next(folder.glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    line = refused(train, *starts["second"], f"run.dir={tmp_path / 'x'}")
    assert f"{damaged}: damaged" in line
    line = refused(export, f"checkpoint={folder}", f"to={tmp_path / 'y'}")
    assert f"{damaged}: damaged" in line

    line = refused(export, f"checkpoint={first}", f"to={tmp_path / 'given'}")
    assert f"to={tmp_path / 'given'}: exists already" in line
    line = refused(export, f"checkpoint={tmp_path / 'given'}", f"to={tmp_path / 'y'}")
    assert f"checkpoint={tmp_path / 'given'}: no checkpoint there" in line
    line = refused(export, f"checkpoint={first}", f"to={tmp_path / 'y'}", "tokenizer=nowhere")
    assert "tokenizer=nowhere: " in line
    assert not (tmp_path / "y").exists()


def test_a_checkpoint_needs_no_data(small: Small, tmp_path: Path, command: Command) -> None:
    """Bug: a model that nobody can use any more, or only with another tokenizer, when its text is gone."""
    config = load_config(small(tmp_path / "first", *RELEASED, "train.steps=1"))
    assert config.data.root is not None
    shutil.copytree(config.data.root, tmp_path / "text")
    own = [f"data.root={tmp_path / 'text'}", f"data.cache_dir={tmp_path / 'cache'}"]
    command(train, *small(tmp_path / "first", *RELEASED, "train.steps=1", *own))
    data = prepare(config.data, config.model.vocab_size, ["alpha", "beta"])
    for name in ("text", "cache"):
        shutil.rmtree(tmp_path / name)
    command(export, f"checkpoint={tmp_path / 'first'}", f"to={tmp_path / 'given'}")
    assert load_tokenizer(str(tmp_path / "given/spiece.model")).model == data.tokenizer.model


def test_another_tokenizer_at_the_start(
    small: Small, tmp_path: Path, command: Command, refused: Command
) -> None:
    """Bug: weights taken without a word for text in which each id means another piece."""
    command(train, *small(tmp_path / "first", "train.steps=1"))
    stored = tmp_path / "first/checkpoints/step_1"
    start = [*small(tmp_path / "second", "train.steps=1"), f"checkpoint.initialise_from={stored}"]
    line = refused(train, *start, "data.tokenizer.vocab_size=540")
    assert f"give {stored}/tokenizer.model as data.tokenizer.path" in line
    assert not (tmp_path / "second").exists()
    # As earlier versions wrote it: without the file, with its digest.
    manifest = read_manifest(stored)
    (stored / "tokenizer.model").unlink()
    files = {name: entry for name, entry in manifest.files.items() if name != "tokenizer.model"}
    (stored / "manifest.json").write_text(manifest.model_copy(update={"files": files}).text())
    assert "give the file as data.tokenizer.path" in refused(train, *start, "data.tokenizer.vocab_size=540")
    assert not (tmp_path / "second").exists()
    command(train, *start)


def test_the_commands_of_the_page(
    small: Small, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: the first thing that a reader of docs/hugging_face.md types fails."""
    page = Path(__file__).resolve().parents[2] / "docs/hugging_face.md"
    commands = page.read_text().split("```")[1].strip().splitlines()
    assert len(commands) == 4
    monkeypatch.chdir(tmp_path)
    modules = {"train": train, "export": export, "import_weights": import_weights}
    for line in commands:
        words = line.partition("#")[0].split()
        module = modules[words[2].removeprefix("openmoe.launcher.")]
        sizes = [word for word in small(tmp_path) if not word.startswith(("experiment=", "run.dir="))]
        more = [*words[3:], *sizes, "train.steps=1"] if module is train else words[3:]
        command(module, *more)
    assert (tmp_path / "runs/on/checkpoints/step_1").is_dir()


def test_capacity_may_change_at_the_start(small: Small, tmp_path: Path, command: Command) -> None:
    """Bug: weights that can't be taken because of a routing choice that they do not depend on."""
    command(train, *small(tmp_path / "first", "train.steps=1"))
    more = ["model.capacity_factor_train=2.0", f"checkpoint.initialise_from={tmp_path / 'first'}"]
    command(train, *small(tmp_path / "second", "train.steps=1", *more))


def test_refused(small: Small, tmp_path: Path, command: Command, refused: Command) -> None:
    """Bug: an export that no other program reads as the same model; a page's fault without its key."""
    command(train, *small(tmp_path / "paper", "train.steps=1"))
    line = refused(export, f"checkpoint={tmp_path / 'paper'}", f"to={tmp_path / 'given'}")
    assert "model.ffn=swiglu3: the released format has no such models; allowed swiglu4" in line
    assert not list(tmp_path.glob("given*"))
    line = refused(export, f"checkpoint={tmp_path / 'paper'}", "to=x", "dtype=float16")
    assert "dtype='float16'" in line
    line = refused(import_weights, f"weights={tmp_path / 'nothing'}", "to=x")
    assert "nothing: no such file or folder" in line
    line = refused(import_weights, f"weights={tmp_path / 'paper'}", "to=x")
    assert "config.json: can't be read" in line
    (tmp_path / "flat.npz").write_bytes(b"x")
    line = refused(import_weights, f"weights={tmp_path / 'flat.npz'}", "to=x")
    assert "model: missing" in line
    line = refused(import_weights, f"weights={tmp_path / 'flat.npz'}", "to=x", "model=tiny_released")
    assert "flat.npz: damaged" in line
    line = refused(import_weights, f"weights={tmp_path / 'flat.npz'}", "to=x", "model=tiny")
    assert "model.residual=parallel_shared_norm" in line


def test_t5x_by_command(tmp_path: Path, command: Command) -> None:
    """Bug: flat t5x tensors imported under another model's page, or without it."""
    sizes = ["model.d_model=16", "model.d_ff=8", "model.vocab_size=64", "model.num_experts=2"]
    page = ["model=tiny_released", *sizes, "model.n_layers=2", "model.head_dim=4"]
    config = import_weights.ModelConfig(
        vocab_size=64, d_model=16, n_layers=2, n_heads=4, head_dim=4, d_ff=8, ffn="swiglu4",
        residual="sequential", moe_every=2, num_experts=2, top_k=2,
    )  # fmt: skip
    values = np.random.default_rng(0)
    flat = {n.t5x: values.normal(size=n.shape_in("t5x")).astype(np.float32) for n in tensor_names(config)}
    np.savez(tmp_path / "flat.npz", **flat)
    printed = command(import_weights, f"weights={tmp_path / 'flat.npz'}", f"to={tmp_path / 'taken'}", *page)
    assert "(t5x)" in printed
    folder = tmp_path / "taken/step_0"
    stored = CheckpointTensors(folder, read_manifest(folder))
    router = stored.rows("model/layers.1.moe.router.weight", 0, 2)
    kernel = flat["decoder/layers_1/mlp/router/router_weights/w/kernel"]
    assert torch.equal(router, torch.from_numpy(kernel).T)


@pytest.mark.slow
def test_the_start_of_several_processes(small: Small, tmp_path: Path, command: Command) -> None:
    """Bug: a rank that takes the whole of a tensor, or another's part, or keeps its initial values."""
    more = ["train.precision=fp64", "train.validation_rows=0", "checkpoint.asynchronous=false"]
    command(train, *small(tmp_path / "first", *more, "train.steps=2"))
    start = [*more, f"checkpoint.initialise_from={tmp_path / 'first'}", "train.steps=2"]
    command(train, *small(tmp_path / "one", *start))
    two = small(tmp_path / "two", *start, "parallel.tensor=2", "parallel.expert=2")
    ended = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
            "--master-port", str(free_port()),
            "-m", "openmoe.launcher.train", *two,
        ],
        capture_output=True, text=True, timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    losses = [[line["loss"] for line in lines(tmp_path / name)] for name in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-10, rel=0)
