"""One checkpoint: exact contents, and every kind of damage noticed."""

import hashlib
import json
import pickle
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from openmoe.checkpoint import storage
from openmoe.checkpoint.config import CheckpointConfig
from openmoe.checkpoint.errors import CheckpointError
from openmoe.checkpoint.manager import CheckpointManager, load_checkpoint
from openmoe.checkpoint.manifest import MANIFEST_NAME
from openmoe.checkpoint.state import restore_counters, training_tensors
from openmoe.checkpoint.storage import read_checkpoint, verify_checkpoint, write_checkpoint
from openmoe.optim.build import build_optimizer, set_learning_rate
from openmoe.optim.config import AdafactorConfig, AdamWConfig

MODEL = {"d_model": 8, "moe": {"experts": 4}, "tied": False}


def tensors_of_all_types() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    special = torch.tensor([float("nan"), float("inf"), -0.0, 1e-45, 3.4e38])
    made = {
        f"model/{str(t)[6:]}": normal.to(t)
        for t in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
    }
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    made |= {f"model/{str(t)[6:]}": (normal * 50).abs().to(t) for t in integers}
    return made | {
        "model/bool": normal > 0,
        "model/special": special,
        "model/scalar": torch.tensor(3.25),
        "optimizer/model/count": torch.tensor(2**53 + 1),
        "model/empty": torch.zeros(0, 4),
        "model/transposed": normal.T,
        "model/slice": normal[1:3, ::2],
        "rng/torch_cpu": torch.get_rng_state(),
    }


def same_bits(a: Tensor, b: Tensor) -> bool:
    def raw(x: Tensor) -> bytes:
        return x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()

    return a.dtype == b.dtype and a.shape == b.shape and raw(a) == raw(b)


def write(folder: Path, tensors: dict[str, Tensor], step: int = 7, metadata: dict | None = None) -> None:
    write_checkpoint(
        folder,
        tensors,
        step=step,
        tokens_seen=10**12,
        milestone=False,
        model=MODEL,
        metadata={"phase": 1, "data": {"counters": [1, 2]}, "wandb": None} if metadata is None else metadata,
    )


@pytest.mark.parametrize("file_bytes", [2**30, 64])
def test_every_type_comes_back_to_the_last_bit(
    file_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A type that is converted, a scalar that gains a dimension, a tensor lost between two files."""
    monkeypatch.setattr(storage, "FILE_BYTES", file_bytes)
    tensors = tensors_of_all_types()
    write(tmp_path / "step_7", tensors)
    targets = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    manifest = load_checkpoint(tmp_path / "step_7", targets, MODEL)
    assert all(same_bits(targets[name], tensor) for name, tensor in tensors.items())
    assert (manifest.step, manifest.tokens_seen, manifest.milestone) == (7, 10**12, False)
    assert manifest.metadata == {"phase": 1, "data": {"counters": [1, 2]}, "wandb": None}
    assert len(manifest.files) == 1 if file_bytes == 2**30 else len(manifest.files) > 5
    assert [path.name for path in tmp_path.iterdir()] == ["step_7"]


@pytest.mark.parametrize(("file_bytes", "digest"), [(2**30, "f8e8d21d968fe024"), (64, "abb19563892c1584")])
def test_the_files_of_one_process_stay_as_they_are(
    file_bytes: int, digest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that differ from process to process for the same content; a change for runs of several processes
    that changes names, order or contents of one process's files."""
    monkeypatch.setattr(storage, "FILE_BYTES", file_bytes)
    types = (torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8)
    tensors = {f"model/{str(t)[6:]}": torch.arange(15).view(5, 3).to(t) for t in types}
    tensors |= {"model/transposed": torch.arange(6.0).view(2, 3).T, "optimizer/a/step": torch.tensor(3.0)}
    write(tmp_path / "step_7", tensors | {"model/empty": torch.zeros(0, 4)})
    found = hashlib.sha256()
    for file in sorted((tmp_path / "step_7").iterdir()):
        found.update(file.name.encode() + file.read_bytes())
    assert found.hexdigest()[:16] == digest


def test_any_safetensors_reader_opens_the_files(tmp_path: Path) -> None:
    """A header, an order or an alignment of our own."""
    tensors = tensors_of_all_types()
    write(tmp_path / "step_7", tensors)
    (file,) = (tmp_path / "step_7").glob("*.safetensors")
    found = load_file(file)
    assert found.keys() == tensors.keys()
    assert all(same_bits(found[name], tensor) for name, tensor in tensors.items())
    ours = file.read_bytes()
    theirs = save({name: tensor.contiguous() for name, tensor in tensors.items()})
    data_bytes = sum(tensor.nbytes for tensor in tensors.values())
    assert ours[-data_bytes:] == theirs[-data_bytes:]


def test_no_pickle_is_written_or_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint from a stranger that runs code when it is loaded."""

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("pickle")

    for module, names in {pickle: ("dump", "dumps", "load", "loads"), torch: ("save", "load")}.items():
        for name in names:
            monkeypatch.setattr(module, name, forbidden)
    tensors = tensors_of_all_types()
    write(tmp_path / "step_7", tensors)
    load_checkpoint(tmp_path / "step_7", tensors, MODEL)
    assert {path.suffix for path in (tmp_path / "step_7").iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize("seed", range(4))
def test_any_flipped_bit_and_any_truncation_is_noticed(seed: int, tmp_path: Path) -> None:
    """Damage that only a parser would notice, or that lies in a tensor, in a header, or in the manifest."""
    rng = random.Random(seed)
    folder = tmp_path / "step_7"
    write(folder, tensors_of_all_types())
    verify_checkpoint(folder)
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        for _ in range(60):
            place = rng.randrange(len(content))
            flipped = bytearray(content)
            flipped[place] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
            with pytest.raises(CheckpointError, match=path.name):
                verify_checkpoint(folder)
        for length in (0, len(content) - 1, *(rng.randrange(len(content)) for _ in range(20))):
            path.write_bytes(content[:length])
            with pytest.raises(CheckpointError, match=path.name):
                verify_checkpoint(folder)
        path.write_bytes(content + b"\n")
        with pytest.raises(CheckpointError, match=path.name):
            verify_checkpoint(folder)
        path.unlink()
        with pytest.raises(CheckpointError, match=path.name):
            verify_checkpoint(folder)
        path.write_bytes(content)
    (folder / "more.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"more\.safetensors: is not part of the checkpoint"):
        verify_checkpoint(folder)


def test_a_damaged_checkpoint_touches_nothing_and_offers_an_earlier_whole_one(tmp_path: Path) -> None:
    """A model filled half, or advice that leads to the next damaged checkpoint."""
    tensors = tensors_of_all_types()
    for step in (8, 9, 10):
        write(tmp_path / f"step_{step}", tensors, step)
    for step, size in ((9, 100), (10, 300)):
        file = next((tmp_path / f"step_{step}").glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:size])
    targets = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(tmp_path / "step_10", targets, MODEL)
    message = str(caught.value)
    assert message.count("\n") == 0
    assert file.name in message
    assert "damaged: 300 bytes" in message
    assert message.endswith(f"use checkpoint.resume={tmp_path / 'step_8'}")
    assert not any(target.any() for target in targets.values())
    shutil.rmtree(tmp_path / "step_8")
    with pytest.raises(CheckpointError, match="no earlier whole one"):
        load_checkpoint(tmp_path / "step_10", targets, MODEL)


@pytest.mark.parametrize(
    ("model", "change", "says"),
    [
        (MODEL | {"d_model": 16}, {}, "model.d_model is 8 in the checkpoint, 16 here"),
        (
            MODEL | {"moe": {"experts": 8}},
            {},
            "model.moe is {'experts': 4} in the checkpoint, {'experts': 8} here",
        ),
        (MODEL | {"new": 1}, {}, "model.new is absent in the checkpoint, 1 here"),
        (
            MODEL,
            {"model/a": torch.zeros(3)},
            "tensor model/a is float32 [2] in the checkpoint, float32 [3] here",
        ),
        (
            MODEL,
            {"model/a": torch.zeros(2).double()},
            "tensor model/a is float32 [2] in the checkpoint, float64 [2] here",
        ),
        (MODEL, {"model/b": torch.zeros(2)}, "tensor model/b is absent in the checkpoint, float32 [2] here"),
        (
            MODEL,
            {"model/a": None, "model/c": torch.zeros(())},
            "tensor model/a is float32 [2] in the checkpoint, absent here",
        ),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    model: dict, change: dict, says: str, tmp_path: Path
) -> None:
    """Weights loaded into another architecture because the shapes happen to fit, or cast silently."""
    write(tmp_path / "step_7", {"model/a": torch.ones(2), "optimizer/a/v": torch.ones(2)})
    targets = {"model/a": torch.zeros(2)} | change
    targets = {name: tensor for name, tensor in targets.items() if tensor is not None}
    manifest = verify_checkpoint(tmp_path / "step_7")
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(tmp_path / "step_7", manifest, targets, model)
    assert says in str(caught.value)
    assert not any(target.any() for target in targets.values())


def test_evaluation_reads_the_model_alone(tmp_path: Path) -> None:
    """Optimizer state demanded where there is no optimizer."""
    write(tmp_path / "step_7", {"model/a": torch.ones(2), "optimizer/a/v": torch.ones(2)})
    targets = {"model/a": torch.zeros(2)}
    load_checkpoint(tmp_path / "step_7", targets, MODEL)
    assert targets["model/a"].all()


def test_a_newer_format_is_named(tmp_path: Path) -> None:
    """A later version of the format reported as damage."""
    write(tmp_path / "step_7", {"model/a": torch.ones(2)})
    path = tmp_path / "step_7" / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}))
    with pytest.raises(CheckpointError, match="version 2 of the checkpoint format; this program reads 1"):
        verify_checkpoint(tmp_path / "step_7")


@pytest.mark.parametrize(
    "metadata", [{"rows": (1, 2)}, {"counters": {1: 2}}, {"x": float("nan")}, {"x": object()}]
)
def test_metadata_that_json_would_change_is_refused(metadata: dict, tmp_path: Path) -> None:
    """Data state whose integer keys come back as strings: the resumed run reads other text."""
    with pytest.raises((TypeError, ValueError)):
        write(tmp_path / "step_7", {"model/a": torch.ones(2)}, metadata=metadata)
    assert not list(tmp_path.iterdir())


class Net(torch.nn.Module):
    """Parameter names as the model has them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(160, 128, dtype=dtype)
        self.head = torch.nn.Linear(128, 160, bias=False, dtype=dtype)

    def train_step(self, optimizer: torch.optim.Optimizer) -> float:
        tokens = torch.randint(160, (4, 16))
        loss = torch.nn.functional.cross_entropy(
            self.head(self.embedding(tokens)).flatten(0, 1), tokens.flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        set_learning_rate(optimizer, 0.01)
        optimizer.step()
        return loss.item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "config", [AdafactorConfig(name="adafactor"), AdamWConfig(name="adamw")], ids=lambda config: config.name
)
@pytest.mark.parametrize("steps_before", [0, 3])
def test_a_resumed_run_goes_on_to_the_last_bit(
    config: AdafactorConfig | AdamWConfig, dtype: torch.dtype, steps_before: int, tmp_path: Path
) -> None:
    """A moment, a count of updates or the random generator that is not in the checkpoint; a tensor that is
    written as the next step has made it."""
    torch.manual_seed(1)
    net = Net(dtype)
    optimizer = build_optimizer(config, net.named_parameters())
    for _ in range(steps_before):
        net.train_step(optimizer)
    manager = CheckpointManager(tmp_path, CheckpointConfig())
    folder = manager.save(
        training_tensors(net, optimizer),
        step=steps_before,
        tokens_seen=0,
        milestone=False,
        model=MODEL,
        metadata={},
    )
    optimizer.register_step_pre_hook(lambda *_: manager.wait_to_update())
    expected = [net.train_step(optimizer) for _ in range(3)]
    manager.finish()
    torch.manual_seed(2)
    again = Net(dtype)
    optimizer = build_optimizer(config, again.named_parameters())
    tensors = training_tensors(again, optimizer)
    manifest = load_checkpoint(folder, tensors, MODEL)
    restore_counters(optimizer, tensors, manifest.step)
    assert [again.train_step(optimizer) for _ in range(3)] == expected
    for name, param in net.named_parameters():
        assert torch.equal(param, dict(again.named_parameters())[name]), name
