"""Experts from a dense model: what is kept, what is new, and that the same recipe gives the same values."""

from pathlib import Path

import pytest
import torch

from openmoe.checkpoint.errors import CheckpointError
from openmoe.checkpoint.manifest import read_manifest
from openmoe.checkpoint.state import model_tensors
from openmoe.checkpoint.storage import write_checkpoint
from openmoe.checkpoint.stored_tensors import CheckpointTensors
from openmoe.checkpoint.upcycling import Recipe, expected_gate_sum, require_fitting, upcycled
from openmoe.model.batch import Batch
from openmoe.model.config import ModelConfig
from openmoe.model.decoder import Decoder
from openmoe.model.init import initialise
from openmoe.train.difference import difference
from openmoe.train.step import MicroBatch

DENSE = ModelConfig(
    vocab_size=96, d_model=24, n_layers=4, n_heads=2, head_dim=8, d_ff=20, ffn="swiglu4", init_scale=1.0
)
MOE = DENSE.model_copy(
    update={"moe_every": 2, "num_experts": 4, "top_k": 2, "residual": "sequential", "dropless": True}
)
COPY = Recipe("copy", noise=0.0, fraction=0.5, expert_share=0.5, seed=7)


def changed(recipe: Recipe, **values: object) -> Recipe:
    return Recipe(**({**recipe.__dict__} | values))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> tuple[Decoder, CheckpointTensors]:
    model = Decoder(DENSE)
    initialise(model, DENSE, seed=3)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("scale"):  # no two norms alike
                parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
    folder: Path = tmp_path_factory.mktemp("dense") / "step_3"
    write_checkpoint(
        folder,
        model_tensors(model),
        step=3,
        tokens_seen=30,
        milestone=False,
        model=DENSE.model_dump(exclude={"dispatch"}),
        metadata={},
    )
    return model.eval(), CheckpointTensors(folder, read_manifest(folder))


def made(stored: CheckpointTensors, moe: ModelConfig, recipe: Recipe) -> Decoder:
    model = Decoder(moe)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    tensors = upcycled(stored, moe, shapes, recipe)
    assert [tensor.name.removeprefix("model/") for tensor in tensors] == list(shapes)
    values = {
        tensor.name.removeprefix("model/"): torch.cat(list(tensor.parts())).view(tensor.shape)
        for tensor in tensors
    }
    model.load_state_dict(values)
    return model.eval()


def rows() -> list[MicroBatch]:
    tokens = torch.randint(1, 96, (4, 33), generator=torch.Generator().manual_seed(5))
    weights = torch.ones(4, 32)
    weights[2:] = 0
    batch = Batch(tokens[:, :-1], tokens[:, 1:], weights)
    return [MicroBatch(batch, weights.flatten().nonzero()[:, 0])]


@pytest.mark.parametrize("residual", ["sequential", "parallel_shared_norm"])
def test_a_share_of_zero_keeps_the_function(dense: tuple[Decoder, CheckpointTensors], residual: str) -> None:
    """Bug: a norm or the residual FFN taken from elsewhere; an expert that adds to a full FFN."""
    first, stored = dense
    moe = MOE.model_copy(update={"residual": residual})
    recipe = changed(COPY, expert_share=0.0, method="noise", noise=0.5)
    found = difference(first, made(stored, moe, recipe), rows())
    assert found.tokens == 64
    assert found.logit_difference == found.kl == 0.0
    assert found.loss_before == found.loss_after
    assert max(found.layers) == 0.0


def test_the_difference_is_that_of_the_logits(dense: tuple[Decoder, CheckpointTensors]) -> None:
    """Bug: rows without loss counted, means over the wrong number, KL the wrong way round."""
    first, stored = dense
    second = made(stored, MOE, changed(COPY, method="noise", noise=0.5))
    (micro,) = rows()
    with torch.no_grad():
        a, b = (model.logits(model(micro.batch).hidden)[:2].double() for model in (first, second))
    found = difference(first, second, [micro])
    target = micro.batch.target_tokens[:2, :, None]
    assert found.logit_difference == pytest.approx((a - b).abs().mean().item())
    assert found.loss_after == pytest.approx(-b.log_softmax(-1).gather(-1, target).mean().item())
    p, q = a.log_softmax(-1), b.log_softmax(-1)
    assert found.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item())
    assert [layer > 0.01 for layer in found.layers] == [False, True, False, True]
    assert found.layers[0] == 0.0


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_experts_do_their_share(dense: tuple[Decoder, CheckpointTensors], share: float) -> None:
    """Bug: copies that raw gates shrink to a fraction of the FFN, or an FFN that is there twice."""
    first, stored = dense
    moe = MOE.model_copy(update={"residual": "parallel_shared_norm"})
    found = difference(first, made(stored, moe, changed(COPY, expert_share=share)), rows())
    plain = made(stored, moe, changed(COPY, expert_share=share))
    with torch.no_grad():  # what it would be without the gates' scale
        for layer in moe.moe_layers:
            plain.layers[layer].moe.experts.wo *= expected_gate_sum(moe, 1.0)
    unscaled = difference(first, plain, rows())
    assert 0 < max(found.layers) < 0.25 * share
    assert max(found.layers) < 0.5 * min(unscaled.layers[layer] for layer in moe.moe_layers)


def test_expected_gate_sum() -> None:
    """Bug: a formula that holds for a uniform router only."""
    assert expected_gate_sum(MOE.model_copy(update={"router_init_std": 1e-9}), 1.0) == pytest.approx(0.5)
    assert expected_gate_sum(MOE.model_copy(update={"router_init_std": 1e3}), 1.0) == pytest.approx(
        1.0, abs=1e-3
    )
    router = torch.nn.Linear(24, 4, bias=False)
    torch.nn.init.normal_(router.weight, std=0.3, generator=torch.Generator().manual_seed(1))
    x = torch.nn.functional.rms_norm(torch.randn(4096, 24, generator=torch.Generator().manual_seed(2)), (24,))
    routers = torch.randn(64, 24, 4, generator=torch.Generator().manual_seed(3)) * 0.3
    seen = (x[:64] @ routers).softmax(-1).topk(2).values.sum(-1).mean().item()
    config = MOE.model_copy(update={"router_init_std": 0.3})
    assert expected_gate_sum(config, 1.0) == pytest.approx(seen, rel=0.02)


def test_copy(dense: tuple[Decoder, CheckpointTensors]) -> None:
    """Bug: experts that differ where they are said to be copies; the wrong layer's FFN."""
    first, stored = dense
    second = made(stored, MOE, COPY)
    for layer in MOE.moe_layers:
        ffn, block = first.layers[layer].ffn, second.layers[layer]
        experts = block.moe.experts
        scale = experts.wo[0].norm() / ffn.wo.norm()
        for e in range(4):
            assert torch.equal(experts.wi_0[e], ffn.wi_0)
            assert torch.equal(experts.wi_1[e], ffn.wi_1)
            torch.testing.assert_close(experts.wo[e], ffn.wo * scale)
        assert torch.equal(block.ffn.wo, ffn.wo * 0.5)
        assert torch.equal(block.moe_norm.scale, first.layers[layer].ffn_norm.scale)
    fresh = Decoder(MOE)
    initialise(fresh, MOE, seed=7)
    assert torch.equal(second.layers[1].moe.router.weight, fresh.layers[1].moe.router.weight)


def test_noise(dense: tuple[Decoder, CheckpointTensors]) -> None:
    """Bug: noise of another size than asked, the same for all experts or layers, or not from the seed."""
    first, stored = dense
    recipe = changed(COPY, method="noise", noise=0.1)
    second, again = made(stored, MOE, recipe), made(stored, MOE, recipe)
    other = made(stored, MOE, changed(recipe, seed=8))
    seen = []
    for layer in MOE.moe_layers:
        for name in ("wi_0", "wi_1"):
            base = getattr(first.layers[layer].ffn, name)
            value = getattr(second.layers[layer].moe.experts, name)
            assert torch.equal(value, getattr(again.layers[layer].moe.experts, name))
            assert not torch.equal(value, getattr(other.layers[layer].moe.experts, name))
            for e in range(4):
                added = (value[e] - base) / base.std()
                assert added.std().item() == pytest.approx(0.1, rel=0.15)
                seen.append(added.flatten()[:400])
    correlation = torch.corrcoef(torch.stack(seen)) - torch.eye(len(seen))
    assert correlation.abs().max() < 0.3


def test_partial(dense: tuple[Decoder, CheckpointTensors]) -> None:
    """Bug: hidden units drawn anew in one matrix and kept in another, or the same ones in every expert."""
    first, stored = dense
    second = made(stored, MOE, changed(COPY, method="partial", fraction=0.4))
    chosen = []
    for layer in MOE.moe_layers:
        ffn, experts = first.layers[layer].ffn, second.layers[layer].moe.experts
        for e in range(4):
            kept = (experts.wi_1[e] == ffn.wi_1).all(1)
            assert kept.sum() == 12
            assert torch.equal((experts.wi_0[e] == ffn.wi_0).all(-1), kept.expand(2, -1))
            ratio = experts.wo[e] / ffn.wo
            assert torch.equal(ratio.std(0) < 1e-3 * ratio.median(), kept)
            new = experts.wi_1[e][~kept]
            assert new.std().item() == pytest.approx(ffn.wi_1[~kept].std().item(), rel=0.2)
            chosen.append(tuple(kept.tolist()))
    assert len(set(chosen)) == len(chosen)


MISFITS = [
    (DENSE.model_copy(update={"d_ff": 24}), MOE, "model.d_ff=20: allowed 24"),
    (MOE, MOE, r"model.moe_every=2 in the checkpoint: allowed 0"),
    (DENSE, DENSE, "model.moe_every=0: allowed 1 to"),
    (DENSE.model_copy(update={"ffn": "swiglu3"}), MOE, "model.ffn=swiglu4: allowed swiglu3"),
]


@pytest.mark.parametrize(("dense_config", "moe", "line"), MISFITS)
def test_models_that_are_no_pair(dense_config: ModelConfig, moe: ModelConfig, line: str) -> None:
    """Bug: a matrix of another shape or meaning taken for an expert."""
    with pytest.raises(CheckpointError, match=line):
        require_fitting(dense_config, moe)
