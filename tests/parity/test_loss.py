"""Losses and gradients against the original (golden README: loss_*.npz)."""

import numpy as np
import pytest
import torch

from openmoe.model.losses import linear_cross_entropy
from openmoe.train.config import TrainConfig
from openmoe.train.step import MicroBatch, loss_sums, weighted

from .golden import Case, converted, golden_files, load_decoder
from .test_model import golden_batch

CASES = golden_files("loss_*.npz")
pytestmark = pytest.mark.skipif(not CASES, reason="no loss_*.npz in the golden folder")


def losses(case: Case, mode: str, dispatch: str = "sort", router_z_weight: float | None = None):
    """The original's loss_fn from the parts of our training step: one block by its own weight sum."""
    golden = case.config()
    model = load_decoder(case, dispatch=dispatch).train(mode == "train")
    batch = golden_batch(case)
    weights = batch.loss_weights.flatten()
    sums = loss_sums(model, MicroBatch(batch, weights.nonzero()[:, 0]))
    groups = max(1, sum(s.num_groups for s in sums.router))
    config = TrainConfig(
        global_batch_rows=1,
        seq_len=2,
        z_loss_weight=golden["z_loss"],
        load_balancing_weight=golden["aux_loss_factor"],
        router_z_loss_weight=golden["router_z_loss_factor"] if router_z_weight is None else router_z_weight,
    )
    parts = {
        "lm_loss": sums.lm / sums.weight,
        "z_loss": sums.z / sums.weight,
        "load_balancing_loss": sum((s.load_balancing_sum for s in sums.router), torch.zeros(())) / groups,
        "router_z_loss": sum((s.router_z_sum for s in sums.router), torch.zeros(())) / groups,
    }
    named = {
        "ce_only": parts["lm_loss"],
        "z_loss_term": config.z_loss_weight * parts["z_loss"],
        "experts/auxiliary_loss": config.load_balancing_weight * parts["load_balancing_loss"],
        "experts/router_z_loss": config.router_z_loss_weight * parts["router_z_loss"],
        "weight_sum": sums.weight,
        "total_loss": weighted(parts, config),
    }
    named["ce_plus_z"] = named["ce_only"] + named["z_loss_term"]
    return model, named


def per_token_losses(case: Case, mode: str) -> dict[str, torch.Tensor]:
    """Cross-entropy with z-loss and z-loss of every position, loss weights or not."""
    model = load_decoder(case).train(mode == "train")
    batch = golden_batch(case)
    with torch.no_grad():
        hidden = model(batch).hidden.flatten(0, 1)
        nll, log_z, _ = linear_cross_entropy(hidden, model.head_weight, batch.target_tokens.flatten())
    z = case.config()["z_loss"] * log_z.square()
    per_token = {"per_token_loss_incl_z": nll + z, "per_token_z_loss": z}
    return {name: value.view(batch.target_tokens.shape) for name, value in per_token.items()}


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_losses(path, mode):
    """A wrong normaliser, weight, z-loss square or mean over groups and layers."""
    case = Case(path)
    exact = case.config()["dtype"] == "float32"
    _, parts = losses(case, mode)
    stored = case.meta.get(mode) or case.meta
    compared = 0
    for name, ours in parts.items():
        if name in stored:
            tolerance = 5e-6 * max(1, abs(stored[name])) if exact else 5e-3
            assert abs(ours.item() - stored[name]) <= tolerance, name
            compared += 1
    assert compared >= 4
    for name, ours in per_token_losses(case, mode).items():
        if exact and f"{mode}/{name}" in case:
            np.testing.assert_allclose(ours, case[f"{mode}/{name}"], atol=2e-5, err_msg=name)


@pytest.mark.parametrize("dispatch", ["sort", "einsum"])
@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_gradients(path, dispatch):
    """A gradient that misses a term: through the gates, the router losses, dropped tokens or the z-loss."""
    case = Case(path)
    suffixes = {key.split("/")[0] for key in case.arrays.files if key.startswith("grads")}
    if not suffixes:
        pytest.skip("this case stores no gradients")
    for prefix in suffixes:
        weight = float(prefix.removeprefix("grads_rz")) if prefix != "grads" else None
        model, parts = losses(case, "train", dispatch, weight)
        parts["total_loss"].backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        for name, golden in converted(case.under(prefix), model.config).items():
            worst = (gradients[name] - golden).abs().max() / golden.abs().max().clamp(min=1e-30)
            assert worst <= 2e-5, (prefix, name, worst)


def test_bfloat16_gradients_exist():
    """bfloat16 activations must still give every parameter a finite float32 gradient."""
    for path in CASES:
        case = Case(path)
        if case.config()["dtype"] == "bfloat16":
            model, parts = losses(case, "train")
            parts["total_loss"].backward()
            for name, p in model.named_parameters():
                assert p.grad is not None, name
                assert p.grad.dtype == torch.float32, name
                assert p.grad.isfinite().all(), name
