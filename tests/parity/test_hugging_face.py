"""The released checkpoints' PyTorch code against ours under its rules (golden README: hf_*.npz)."""

import json

import numpy as np
import pytest
import torch

from openmoe.checkpoint.importing import open_t5x
from openmoe.checkpoint.names import tensor_names
from openmoe.checkpoint.released_config import LossWeights, Provenance
from openmoe.model.batch import Batch
from openmoe.model.config import ModelConfig
from openmoe.model.decoder import Decoder

from .golden import Case, converted, golden_files, golden_root, released_config

CASES = golden_files("hf_*.npz")
DISPATCHES = ["sort", "einsum"]
needs_cases = pytest.mark.skipif(not CASES, reason="no hf_*.npz in the golden folder")


def hugging_face_config(golden: dict, factor: float = 2.0) -> ModelConfig:
    """The case's config.json as ours, with the port's routing rule at one capacity factor."""
    return ModelConfig(
        vocab_size=golden["vocab_size"],
        d_model=golden["hidden_size"],
        n_layers=golden["num_hidden_layers"],
        n_heads=golden["num_attention_heads"],
        head_dim=golden["head_dim"],
        d_ff=golden["intermediate_size"],
        ffn="swiglu4",
        residual="sequential",
        moe_every=golden["moe_layer_interval"],
        num_experts=golden["num_experts"],
        top_k=golden["topk"],
        group_rule="hugging_face",
        capacity_includes_k=True,
        capacity_factor_train=factor,
        capacity_factor_eval=factor,
        min_capacity=golden["min_capacity"],
        route_padding=True,
    )


def modes(case: Case) -> list[str]:
    return sorted(case.meta["modes"])


def jax_case(case: Case) -> Case:
    """The case that this one's parameters were converted from."""
    return Case(case.path.with_name(case.path.name.replace("hf_from_", "model_")))


def load(case: Case, mode: str, dispatch: str) -> Decoder:
    config = hugging_face_config(case.meta["json_config"], float(mode.split("cf")[1].split("_")[0]))
    model = Decoder(config.model_copy(update={"dispatch": dispatch}))
    stored = case.under("state_dict")
    if stored:
        model.load_state_dict(
            {
                name.ours: name.from_format("released", torch.from_numpy(np.array(stored[name.released])))
                for name in tensor_names(config)
            }
        )
    else:
        model.load_state_dict(converted(jax_case(case).params(), config))
    return model.train(mode.startswith("train"))


def with_tokens(tokens: np.ndarray) -> Batch:
    """As the port reads them: no shift, every token real."""
    inputs = torch.from_numpy(np.array(tokens)).long()
    return Batch(inputs, torch.ones_like(inputs), torch.ones(inputs.shape))


@needs_cases
@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize(
    ("path", "mode"), [(path, mode) for path in CASES for mode in modes(Case(path))], ids=str
)
def test_forward(path, mode, dispatch):
    """A capacity without the factor k, rounded otherwise, per row instead of per batch; a wrong place in the
    table of names; halves of wi_0 the wrong way round."""
    case = Case(path)
    model = load(case, mode, dispatch)
    with torch.no_grad():
        out = model(with_tokens(case["input_ids"]), trace=True)
        logits = model.logits(out.hidden)
    golden = case.under(mode)
    if "logits" in golden:
        np.testing.assert_allclose(logits, golden["logits"], atol=2e-5, rtol=0)
    for trace in out.traces:
        one_hot = torch.nn.functional.one_hot(trace.expert_index, model.config.num_experts)
        kept = (one_hot * trace.kept[..., None]).flatten(0, 1)  # [token, k, E]
        np.testing.assert_array_equal(kept.sum((0, 1)), golden[f"layer{trace.layer}/used_capacity"])
        weights = (kept * trace.probs.flatten(0, 1)[..., None]).sum(1)
        stored = golden[f"layer{trace.layer}/combine_weights_token_expert"]
        np.testing.assert_allclose(weights, stored, atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "path", [path for path in CASES if path.stem.startswith("hf_from_")], ids=lambda path: path.stem
)
def test_converted_parameters(path):
    """A name too many or too few, the shape of a transposed expert, a value in another place."""
    case = Case(path)
    config = hugging_face_config(case.meta["json_config"])
    names = list(tensor_names(config))
    stated = {name.released: list(name.shape_in("released")) for name in names}
    assert stated == case.meta["state_dict_shapes"]
    ours = converted(jax_case(case).params(), config)
    for name, value in case.under("state_dict").items():  # absent where only the recipe is stored
        (row,) = (row for row in names if row.released == name)
        np.testing.assert_array_equal(row.to_format("released", ours[row.ours]), value)


TRAINED = golden_files("train_*.npz")


@pytest.mark.skipif(not TRAINED, reason="no train_*.npz in the golden folder")
@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_t5x_parameters_from_a_flat_file(path, tmp_path):
    """Bug: the import takes another way than the tests, which train on from the same values (test_train)."""
    params = Case(path).params("params_step0")
    np.savez(tmp_path / "flat.npz", **params)
    config = released_config(Case(path).config())
    provenance = Provenance(model=config, loss=LossWeights(), step=0, tokens_seen=0)
    expected = converted(params, config)
    found = open_t5x(tmp_path / "flat.npz", provenance).tensors
    assert {tensor.name for tensor in found} == {f"model/{name}" for name in expected}
    for tensor in found:
        (value,) = tensor.parts()
        assert torch.equal(value, expected[tensor.name.removeprefix("model/")]), tensor.name


SHAPES = golden_root() / "hf_param_shapes.json"
JAX_SHAPES = golden_root() / "jax_param_shapes.json"


@pytest.mark.skipif(not SHAPES.exists(), reason="no hf_param_shapes.json in the golden folder")
def test_released_names_of_the_real_models():
    """The table at other sizes, where heads x head_dim is not d_model: every name, in the files' order."""
    configs = json.loads((golden_root() / "hf_configs.json").read_text())
    for size, stored in json.loads(SHAPES.read_text())["models"].items():
        config = hugging_face_config(configs[f"openmoe_{size}_config"])
        names = list(tensor_names(config))
        stated = {name.released: list(name.shape_in("released")) for name in names}
        assert stated == stored["shapes"]
        assert sum(np.prod(name.shape) for name in names) == stored["total"]
        with torch.device("meta"):
            built = Decoder(config)
        assert {name.ours: name.shape for name in names} == {
            name: tuple(parameter.shape) for name, parameter in built.named_parameters()
        }


@pytest.mark.skipif(not JAX_SHAPES.exists(), reason="no jax_param_shapes.json in the golden folder")
def test_t5x_names_of_the_real_models():
    for stored in json.loads(JAX_SHAPES.read_text()).values():
        golden = stored["config"]
        config = ModelConfig(
            vocab_size=golden["vocab"],
            d_model=golden["embed"],
            n_layers=golden["layers"],
            n_heads=golden["heads"],
            head_dim=golden["head_dim"],
            d_ff=golden["mlp"],
            ffn="swiglu4",
            residual="sequential",
            moe_every=golden["layers"] // golden["sparse_layers"],
            num_experts=golden["experts"],
            top_k=golden["topk"],
        )
        stated = {name.t5x: list(name.shape_in("t5x")) for name in tensor_names(config)}
        assert stated == {name: entry["shape"] for name, entry in stored["params"].items()}
