"""The released format out and in: exact both ways, in small memory, and every fault named."""

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from openmoe.checkpoint import export, importing, tensor_files
from openmoe.checkpoint.errors import CheckpointError, CheckpointWriteError
from openmoe.checkpoint.export import export_released
from openmoe.checkpoint.importing import open_released, open_t5x
from openmoe.checkpoint.manifest import read_manifest
from openmoe.checkpoint.names import openmoe_pt_name, tensor_names
from openmoe.checkpoint.released_config import LossWeights, Provenance, read_json, require_expressible
from openmoe.checkpoint.state import model_tensors
from openmoe.checkpoint.storage import verify_checkpoint, write_checkpoint
from openmoe.checkpoint.stored_tensors import CheckpointTensors
from openmoe.checkpoint.tensor_files import new_folder
from openmoe.checkpoint.weights import load_weights, write_weights
from openmoe.data.config import TokenizerConfig
from openmoe.data.tokenizer import Tokenizer, parse_model, train_tokenizer
from openmoe.model.batch import Batch
from openmoe.model.config import ModelConfig
from openmoe.model.decoder import Decoder
from openmoe.model.init import initialise

from .released_forward import released_logits

CONFIG = ModelConfig(
    vocab_size=96,
    d_model=24,
    n_layers=4,
    n_heads=2,
    head_dim=8,
    d_ff=20,
    ffn="swiglu4",
    residual="sequential",
    moe_every=2,
    num_experts=4,
    top_k=2,
    capacity_factor_eval=0.7,
    router_init_std=0.3,
    init_scale=1.0,
    mask_padding=True,
    route_padding=True,
    group_rows=2,
)
LOSS = LossWeights(z_loss_weight=3e-4, load_balancing_weight=0.02, router_z_loss_weight=2e-4)
PORT = {
    "group_rule": "hugging_face",
    "capacity_includes_k": True,
    "mask_padding": False,
    "route_padding": True,
}


def model_of(config: ModelConfig) -> Decoder:
    model = Decoder(config)
    initialise(model, config, seed=3)
    with torch.no_grad():  # scales of 1 would hide an exchange of two norms
        for name, parameter in model.named_parameters():
            if name.endswith("scale"):
                parameter += torch.linspace(-0.3, 0.3, len(parameter)).roll(len(name) % 7)
    return model


def save(folder: Path, config: ModelConfig = CONFIG, dtype: torch.dtype = torch.float32) -> Decoder:
    model = model_of(config).to(dtype)
    write_checkpoint(
        folder,
        model_tensors(model) | {"rng/torch_cpu": torch.get_rng_state(), "optimizer/x": torch.tensor(1.0)},
        step=7,
        tokens_seen=700,
        milestone=False,
        model=config.model_dump(exclude={"dispatch"}),
        metadata={},
    )
    return model


def give(folder: Path, target: Path, **changes: object) -> Path:
    options = {"dtype": None, "shard_bytes": 20_000, "loss": LOSS, "tokenizer": None}
    export_released(folder, read_manifest(folder), target, **(options | changes))
    return target


def take(source: Path, target: Path) -> Path:
    found = open_released(source)
    write_weights(
        target,
        found.tensors,
        step=found.provenance.step,
        tokens_seen=found.provenance.tokens_seen,
        model=found.provenance.model.model_dump(exclude={"dispatch"}),
        metadata={},
        other_files=found.other_files,
    )
    return target


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def loaded(folder: Path, **changes: object) -> Decoder:
    config = CONFIG.model_copy(update=changes)
    model = Decoder(config)
    load_weights(folder, model_tensors(model), config.model_dump())
    return model.eval()


def logits(model: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(Batch(tokens, torch.ones_like(tokens), torch.ones(tokens.shape))).hidden)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    text = ["the cat and the dog sat on the mat " * 20, "a bird sang in the tall old tree " * 20]
    return train_tokenizer(text, TokenizerConfig(vocab_size=512))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "step_7"
    save(folder)
    return folder


@pytest.fixture(scope="module")
def given(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return give(saved, tmp_path_factory.mktemp("given") / "model")


@pytest.mark.parametrize("training", [False, True])
def test_the_port_reads_what_we_export(saved: Path, given: Path, tmp_path: Path, training: bool) -> None:
    """Bug: halves, transposed experts, norms or capacity that a reader of the format takes otherwise."""
    tokens = torch.randint(0, 96, (3, 21), generator=torch.Generator().manual_seed(5))
    theirs = released_logits(given, tokens, training)
    ours = loaded(take(given, tmp_path / "step_7"), **PORT).train(training)
    torch.testing.assert_close(logits(ours, tokens), theirs, atol=2e-5, rtol=0)
    assert (theirs - released_logits(given, tokens, not training)).abs().max() > 0.01  # something is dropped


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shard_bytes", [1, 20_000, 10**9])
def test_export_import_export(
    tmp_path: Path, saved: Path, tokenizer: Tokenizer, dtype: torch.dtype | None, shard_bytes: int
) -> None:
    """Bug: a value, a key of config.json, the order of tensors or the tokenizer that does not come back."""
    wide = tmp_path / "wide"
    config = CONFIG.model_copy(update={"vocab_size": 896})
    save(wide, config)
    options = {"dtype": dtype, "shard_bytes": shard_bytes, "tokenizer": tokenizer}
    first = give(wide, tmp_path / "first", **options)
    back = take(first, tmp_path / "back")
    verify_checkpoint(back)
    again = Tokenizer((back / "tokenizer.model").read_bytes())
    assert again.model == tokenizer.model
    second = give(back, tmp_path / "second", **(options | {"tokenizer": again}))
    assert content(first) == content(second)
    files = len(list(first.glob("*.safetensors")))
    assert files == {1: len(list(tensor_names(config))), 10**9: 1}.get(shard_bytes, files)


def test_all_of_it_comes_back(saved: Path, given: Path, tmp_path: Path) -> None:
    """Bug: rounding, a tensor swapped with one of its shape, a part of a tensor read twice."""
    back = loaded(take(given, tmp_path / "step_7"))
    for name, value in model_of(CONFIG).named_parameters():
        assert torch.equal(back.get_parameter(name), value), name


def test_config_says_what_trained_it(given: Path) -> None:
    """Bug: the released artefacts (z-loss 0.01, smoothing 0.001) in a model that was trained without them."""
    values = json.loads((given / "config.json").read_text())
    assert (values["z_loss_factor"], values["label_smoothing"]) == (3e-4, 0.0)
    assert (values["router_aux_loss_factor"], values["router_z_loss_factor"]) == (0.02, 2e-4)
    assert (values["moe_layer_interval"], values["hidden_size"], values["torch_dtype"]) == (2, 24, "float32")


def test_the_tokenizer_as_t5_reads_it(saved: Path, tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Bug: sentinels in the model file and once more by `extra_ids`, at other ids than ours."""
    config = CONFIG.model_copy(update={"vocab_size": 896})
    save(tmp_path / "step_7", config)
    folder = give(tmp_path / "step_7", tmp_path / "model", tokenizer=tokenizer)
    pieces = parse_model((folder / "spiece.model").read_bytes(), "").pieces
    values = json.loads((folder / "tokenizer_config.json").read_text())
    assert not [piece for piece in pieces if piece.piece.startswith("<extra_id_")]
    assert [pieces[i].piece for i in (0, 1)] == [values["pad_token"], values["eos_token"]]
    # T5Tokenizer puts <extra_id_0> at the last id of all.
    assert len(pieces) + values["extra_ids"] - 1 == tokenizer.first_sentinel


def test_parts_of_several_processes(saved: Path, tmp_path: Path) -> None:
    """Bug: parts along the second or third axis, or of another process, put in the wrong place."""
    whole = {f"model/{name}": value.detach() for name, value in model_of(CONFIG).named_parameters()}
    files: dict[str, dict[str, torch.Tensor]] = {"a": {}, "b": {}}
    places: dict[str, dict[str, dict[str, list[int]]]] = {"a": {}, "b": {}}
    for number, (name, value) in enumerate(whole.items()):
        dim = number % value.dim()
        first, second = value.tensor_split(2, dim)
        for file, part, start in (("a", first, 0), ("b", second, first.shape[dim])):
            files[file][name] = part.contiguous()
            places[file][name] = {"saved_offsets": [start if d == dim else 0 for d in range(value.dim())]}
    manifest = read_manifest(saved)
    for file, tensors in files.items():
        save_file(tensors, tmp_path / f"{file}.safetensors", {"DCP_SHARDING_INFO": json.dumps(places[file])})
    stated = {name: entry for name, entry in manifest.tensors.items() if name in whole}
    manifest = manifest.model_copy(
        update={"files": dict.fromkeys(["a.safetensors", "b.safetensors"]), "tensors": stated}
    )
    stored = CheckpointTensors(tmp_path, manifest)
    for name, value in whole.items():
        assert torch.equal(torch.cat(list(stored.parts(name).parts())), value), name
        assert torch.equal(stored.rows(name, 1, 2), value[1:2]), name
    manifest.tensors.pop("model/head.weight")
    with pytest.raises(CheckpointError, match=r"a\.safetensors: tensor model/head.weight"):
        CheckpointTensors(tmp_path, manifest)


def test_memory_holds_one_expert_at_most(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: a tensor, a file or the model read at once."""
    expert_bytes = 2 * 20 * 24 * 4
    monkeypatch.setattr(tensor_files, "PART_BYTES", 1000)
    largest = [0]
    rows = tensor_files.StoredTensor.rows

    def watched(self: tensor_files.StoredTensor, first: int, stop: int) -> torch.Tensor:
        part = rows(self, first, stop)
        largest[0] = max(largest[0], part.nbytes)
        return part

    monkeypatch.setattr(tensor_files.StoredTensor, "rows", watched)
    take(give(saved, tmp_path / "model"), tmp_path / "step_7")
    assert largest[0] == expert_bytes


def test_openmoe_pt(given: Path, tmp_path: Path) -> None:
    """Bug: its experts, one tensor each and `[out, in]`, transposed or out of order."""
    tensors: dict[str, torch.Tensor] = {}
    for file in given.glob("*.safetensors"):
        for name, value in load_file(file).items():
            other = openmoe_pt_name(name)
            if "{e}" not in other:
                tensors[other] = value
                continue
            for e, expert in enumerate(value):
                tensors[other.format(e=e)] = expert.T.contiguous()
    assert "model.layers.3.mlp.experts.2.down_proj.weight" in tensors
    source = tmp_path / "pt"
    source.mkdir()
    save_file(tensors, source / "model.safetensors")
    shutil.copy(given / "config.json", source)
    assert open_released(source).format == "openmoe_pt"
    back = loaded(take(source, tmp_path / "step_7"))
    for name, value in model_of(CONFIG).named_parameters():
        assert torch.equal(back.get_parameter(name), value), name


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_t5x(tmp_path: Path, ending: str) -> None:
    """Bug: a kernel that is not transposed, the halves of wi_0 exchanged."""
    ours = dict(model_of(CONFIG).named_parameters())
    flat = {
        name.t5x: name.to_format("t5x", ours[name.ours].detach()).contiguous()
        for name in tensor_names(CONFIG)
    }
    path = tmp_path / f"params.{ending}"
    if ending == "npz":
        np.savez(path, **{name: value.numpy() for name, value in flat.items()})
    else:
        save_file(flat, path)
    provenance = Provenance(model=CONFIG, loss=LOSS, step=0, tokens_seen=0)
    for tensor in open_t5x(path, provenance).tensors:
        value = ours[tensor.name.removeprefix("model/")]
        assert torch.equal(torch.cat(list(tensor.parts())).view(value.shape), value), tensor.name
    other = provenance.model_copy(update={"model": CONFIG.model_copy(update={"d_ff": 24})})
    with pytest.raises(
        CheckpointError, match=r"mlp/wi_0/kernel: shape \[24, 40\], the model's is \[24, 48\]"
    ):
        open_t5x(path, other)
    with pytest.raises(CheckpointError, match=r"tensor decoder/layers_2/.*the model has none"):
        open_t5x(path, provenance.model_copy(update={"model": CONFIG.model_copy(update={"n_layers": 2})}))
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"params\.\w+: damaged"):
        open_t5x(path, provenance)


REFUSED = [
    ({"ffn": "swiglu3"}, "model.ffn=swiglu3: the released format has no such models; allowed swiglu4"),
    ({"residual": "parallel_shared_norm"}, "model.residual=parallel_shared_norm: .*; allowed sequential"),
    ({"tied_head": True}, "model.tied_head=true: .*; allowed false"),
    ({"attention": "prefix"}, "model.attention=prefix: .*; allowed causal"),
    ({"rope_base": 1e6}, "model.rope_base=1000000.0: .*; allowed 10000.0"),
    ({"top_k": 1}, "model.top_k=1: .*; allowed 2"),
]


@pytest.mark.parametrize(("changes", "line"), REFUSED)
def test_models_that_the_format_has_not(changes: dict[str, object], line: str) -> None:
    """Bug: an export that loads elsewhere and computes something else."""
    with pytest.raises(CheckpointError, match=line):
        require_expressible(CONFIG.model_copy(update=changes))


def test_models_without_experts_or_limits(tmp_path: Path) -> None:
    """Bug: a dense or dropless model refused, or exported as one that routes or drops."""
    tokens = torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(5))
    for changes in ({"moe_every": 0, "num_experts": 1, "top_k": 1}, {"dropless": True}):
        config = CONFIG.model_copy(update=changes)
        name = next(iter(changes))
        model = save(tmp_path / f"{name}.saved", config).eval()
        given = give(tmp_path / f"{name}.saved", tmp_path / name)
        torch.testing.assert_close(released_logits(given, tokens), logits(model, tokens), atol=2e-5, rtol=0)
        assert open_released(given).provenance.model == config


def _edit(file: str, **changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        values = json.loads((folder / file).read_text())
        for key, value in changes.items():
            values.pop(key)
            if value is not None:
                values[key] = value
        (folder / file).write_text(json.dumps(values))

    return damage


def _tensors(file: str, edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / file)
        edit(tensors)
        save_file(tensors, folder / file)

    return damage


FIRST, LAST = "model-00001-of-00009.safetensors", "model-00009-of-00009.safetensors"
HEAD = "lm_head.weight"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), r"config\.json: can't be read"),
    "config cut short": (
        lambda d: (d / "config.json").write_text((d / "config.json").read_text()[:99]),
        r"config\.json: damaged",
    ),
    "a key missing": (_edit("config.json", head_dim=None), r"config\.json: head_dim: missing"),
    "a key of another type": (_edit("config.json", num_experts="4"), r"config\.json: num_experts=4: allowed"),
    "another activation": (_edit("config.json", hidden_act="gelu"), r"hidden_act=gelu: allowed swiglu"),
    "fewer key heads": (_edit("config.json", num_key_value_heads=1), r"num_key_value_heads=1: allowed"),
    "a contradiction": (_edit("config.json", hidden_size=32), r"contradicts itself: .*d_model=24.*32"),
    "another interval": (_edit("config.json", moe_layer_interval=4), r"contradicts itself: .*moe_every=2"),
    "no index": (lambda d: (d / export.INDEX_NAME).unlink(), "neither model.safetensors.index.json nor"),
    "index damaged": (lambda d: (d / export.INDEX_NAME).write_text("{}"), "index.json: damaged"),
    "index leads out": (
        _edit(export.INDEX_NAME, weight_map={HEAD: "../x.safetensors"}),
        r"\.\./x\.safetensors: no file of this folder",
    ),
    "a shard missing": (lambda d: (d / LAST).unlink(), rf"{LAST}: can't be read: No such file"),
    "a shard cut short": (
        lambda d: (d / LAST).write_bytes((d / LAST).read_bytes()[:-1]),
        rf"{LAST}: damaged, or no safetensors file: \d+ bytes of tensors in \d+",
    ),
    "a shard cut within its header": (
        lambda d: (d / LAST).write_bytes((d / LAST).read_bytes()[:40]),
        rf"{LAST}: damaged",
    ),
    "a shard too long": (lambda d: (d / LAST).open("ab").write(b"x"), rf"{LAST}: damaged"),
    "two shards exchanged": (
        lambda d: shutil.copy(d / FIRST, d / LAST),
        rf"{LAST}: tensor model.embed_tokens.weight: the index does not place it there",
    ),
    "a foreign shard": (
        lambda d: shutil.copy(d / FIRST, d / "more.safetensors"),
        r"more\.safetensors: foreign",
    ),
    "a tensor missing": (
        _tensors(LAST, lambda t: (t.pop(HEAD), t.update(x=torch.zeros(1)))),
        rf"{LAST}: tensor x: the index does not place it there",
    ),
    "a tensor of another shape": (
        _tensors(LAST, lambda t: t.update({HEAD: t[HEAD][:, :-1].contiguous()})),
        rf"{LAST}: tensor {HEAD}: shape \[96, 23\], config.json's is \[96, 24\]",
    ),
    "a tensor of integers": (
        _tensors(LAST, lambda t: t.update({HEAD: t[HEAD].int()})),
        rf"{LAST}: tensor {HEAD}: torch.int32: allowed F64, F32, BF16, F16",
    ),
    "pickles": (
        lambda d: ((d / export.INDEX_NAME).unlink(), (d / "pytorch_model.bin").write_bytes(b"x")),
        "pytorch_model.bin is a pickle, which is not read",
    ),
    "a tokenizer that is none": (
        lambda d: (d / "spiece.model").write_bytes(b"\xff"),
        r"^/.*source/spiece\.model is not a sentencepiece model",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_named(given: Path, tmp_path: Path, damage: str) -> None:
    """Bug: half a model imported, or an error that does not say which file."""
    source = tmp_path / "source"
    shutil.copytree(given, source)
    act, line = DAMAGES[damage]
    act(source)
    with pytest.raises(ValueError, match=line) as caught:
        take(source, tmp_path / "step_7")
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_a_foreign_tensor_is_named(given: Path, tmp_path: Path) -> None:
    """Bug: weights that the model has no place for, left out without a word."""
    tensors: dict[str, torch.Tensor] = {"model.extra": torch.zeros(1)}
    for file in given.glob("*.safetensors"):
        tensors |= load_file(file)
    source = tmp_path / "source"
    source.mkdir()
    shutil.copy(given / "config.json", source)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: tensor model\.extra: .*none of that name"
    ):
        open_released(source)
    tensors.pop("model.extra")
    tensors.pop("model.layers.1.mlp.gate_weight")
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"source: tensor model\.layers\.1\.mlp\.gate_weight: missing"):
        open_released(source)


@pytest.mark.parametrize("after", range(3))
def test_a_full_disk_leaves_nothing(
    saved: Path, given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    """Bug: half an export, which a reader takes for whole."""
    written = [0]
    write = tensor_files.write_file

    def full(*args: object) -> object:
        written[0] += 1
        if written[0] > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("openmoe.checkpoint.export.write_file", full)
    monkeypatch.setattr("openmoe.checkpoint.weights.write_file", full)
    with pytest.raises(CheckpointWriteError, match="model: not written: No space"):
        give(saved, tmp_path / "model", shard_bytes=10**9)
    if after < 2:  # one file of tensors, one manifest
        written[0] = 0
        with pytest.raises(CheckpointWriteError, match="step_7: not written: No space"):
            take(given, tmp_path / "step_7")
    assert not list(tmp_path.iterdir())


def test_nothing_is_replaced(saved: Path, given: Path) -> None:
    """Bug: an export over another one."""
    before = content(given)
    with pytest.raises(CheckpointError, match="exists already"):
        give(saved, given)
    with pytest.raises(CheckpointError, match="exists already"):
        take(given, saved)
    assert content(given) == before


def test_two_writers_of_one_folder(tmp_path: Path) -> None:
    """Bug: one writer removes or takes over what the other one has half written, or a folder of somebody else
    that happens to have such a name."""
    target = tmp_path / "model"
    (tmp_path / "model.partial").mkdir()

    def write() -> None:
        with new_folder(target) as slow:
            (slow / "a").write_bytes(b"slow")
            with new_folder(target) as fast:
                assert not list(fast.iterdir())
                (fast / "a").write_bytes(b"fast")
            (slow / "b").write_bytes(b"slow")

    with pytest.raises(CheckpointError, match="model: exists already"):
        write()
    assert content(target) == {"a": b"fast"}
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model.partial"}


def test_what_a_killed_writer_left_goes(tmp_path: Path) -> None:
    """Bug: each try that was killed leaves gigabytes; or what belongs to another target goes."""
    left, other, own = (
        tmp_path / f"{name}.partial"
        for name in ("model.0123456789abcdef", "model.b.0123456789abcdef", "model.x")
    )
    for folder in (left, other, own):
        folder.mkdir()
        (folder / "a").touch()
    with new_folder(tmp_path / "model"):
        assert not left.exists()
    assert {path.name for path in tmp_path.iterdir()} == {"model", other.name, own.name}


def test_float64_stays(tmp_path: Path) -> None:
    """Bug: a float64 model rounded on its way."""
    save(tmp_path / "step_7", dtype=torch.float64)
    given = give(tmp_path / "step_7", tmp_path / "model")
    assert {tensor.dtype for tensor in open_released(given).tensors} == {torch.float64}
    assert json.loads((given / "config.json").read_text())["torch_dtype"] == "float64"


def test_the_released_config_without_our_key(given: Path, tmp_path: Path) -> None:
    """Bug: a released config.json, which knows nothing of us, refused, or its artefacts believed."""
    source = tmp_path / "source"
    shutil.copytree(given, source)
    values = json.loads((source / "config.json").read_text())
    values.pop("openmoe")
    values |= {"z_loss_factor": 0.01, "label_smoothing": 0.001}
    (source / "config.json").write_text(json.dumps(values))
    found = importing.open_released(source).provenance
    assert found.loss.z_loss_weight == 1e-4
    assert found.model.group_rows == 2
    changes = {"router_init_std": 0.02, "init_scale": 0.1}
    assert found.model == CONFIG.model_copy(update=changes)


FOREIGN: list[tuple[dict[str, object], dict[str, object] | str]] = [
    ({"router_capacity_factor_eval": 3}, {"capacity_factor_eval": 3.0}),
    (
        {"router_capacity_factor_train": 1.5, "router_min_capacity": 8},
        {"capacity_factor_train": 1.5, "min_capacity": 8},
    ),
    ({"router_drop_tks": False}, {"dropless": True}),
    ({"router_drop_tks": 0}, "router_drop_tks=0: allowed true or false"),
    ({"router_capacity_factor_eval": -1}, "router_capacity_factor_eval: Input should be greater than 0"),
    ({"rope_theta": 1e6}, "rope_theta=1000000.0: allowed 10000.0"),
    ({"rope_theta": 10_000}, {}),
    ({"router_noisy_policy": "Jitter"}, "router_noisy_policy=Jitter: allowed null"),
    ({"mlp_gated": False}, "mlp_gated=false: allowed true"),
]


@pytest.mark.parametrize("case", range(len(FOREIGN)))
def test_a_foreign_config_is_read_or_refused(given: Path, tmp_path: Path, case: int) -> None:
    """Bug: a key of somebody else's config.json passed over: another model than they trained."""
    changes, expected = FOREIGN[case]
    values = json.loads((given / "config.json").read_text())
    values.pop("openmoe")
    (tmp_path / "config.json").write_text(json.dumps(values))
    plain = read_json(tmp_path / "config.json").model
    (tmp_path / "config.json").write_text(json.dumps(values | changes))
    if isinstance(expected, str):
        with pytest.raises(CheckpointError, match=rf"config\.json: {expected}"):
            read_json(tmp_path / "config.json")
    else:
        assert read_json(tmp_path / "config.json").model == plain.model_copy(update=expected)


def test_flat_files_that_are_no_weights(tmp_path: Path) -> None:
    """Bug: a traceback at a damaged archive; integers taken for weights."""
    path = tmp_path / "params.npz"
    provenance = Provenance(model=CONFIG, loss=LOSS, step=0, tokens_seen=0)
    flat = {name.t5x: np.zeros(name.shape_in("t5x"), np.float32) for name in tensor_names(CONFIG)}

    def line(pattern: str) -> None:
        with pytest.raises(CheckpointError, match=pattern) as caught:
            open_t5x(path, provenance)
        assert len(str(caught.value).splitlines()) == 1

    path.write_bytes(b"")
    line(r"params\.npz: damaged")
    np.savez_compressed(path, **flat)
    open_t5x(path, provenance)
    whole = path.read_bytes()
    # Behind the first member's header (30 bytes and its name) lie its compressed bytes.
    start = 30 + int.from_bytes(whole[26:28], "little") + int.from_bytes(whole[28:30], "little")
    path.write_bytes(whole[:start] + b"\xff" * 20 + whole[start + 20 :])
    line("tensor .*: damaged: Error -3")
    path.write_bytes(whole[:start] + whole[start + 20 :])
    line("damaged")
    first = next(iter(flat))
    np.savez(path, **(flat | {first: flat[first].astype(np.int32)}))
    line(f"tensor {first}: torch.int32: allowed F64, F32, BF16, F16")
    save_file({first: torch.zeros(())}, tmp_path / "params.safetensors")
    path = tmp_path / "params.safetensors"
    line(rf"tensor {first}: shape \[\], the model's is")


def test_special_tokens_by_the_names_of_their_pieces(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Bug: a tokenizer_config.json that names pieces which the model has not: T5Tokenizer adds them at new
    ids."""
    proto = parse_model(tokenizer.model, "")
    for index, name in ((0, "[PAD]"), (1, "[END]"), (2, "[?]")):
        assert proto.pieces[index].type in (proto.SentencePiece.CONTROL, proto.SentencePiece.UNKNOWN)
        proto.pieces[index].piece = name
    proto.trainer_spec.pad_piece, proto.trainer_spec.eos_piece, proto.trainer_spec.unk_piece = (
        "[PAD]",
        "[END]",
        "[?]",
    )
    save(tmp_path / "step_7", CONFIG.model_copy(update={"vocab_size": 896}))
    folder = give(tmp_path / "step_7", tmp_path / "model", tokenizer=Tokenizer(proto.SerializeToString()))
    pieces = [piece.piece for piece in parse_model((folder / "spiece.model").read_bytes(), "").pieces]
    values = json.loads((folder / "tokenizer_config.json").read_text())
    named = [values[f"{name}_token"] for name in ("pad", "bos", "eos", "unk")]
    assert [pieces.index(name) for name in named] == [0, 0, 1, 2]
