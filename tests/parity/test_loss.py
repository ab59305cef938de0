"""Losses and gradients against the original (golden README: loss_*.npz)."""

import numpy as np
import pytest
import torch

from openmoe.model.losses import linear_cross_entropy

from .golden import Case, converted, golden_files, load_decoder
from .test_model import golden_batch

CASES = golden_files("loss_*.npz")
pytestmark = pytest.mark.skipif(not CASES, reason="no loss_*.npz in the golden folder")


def losses(case: Case, mode: str, dispatch: str = "sort", router_z_weight: float | None = None):
    """The original's loss_fn out of our parts: LM loss by its own weight sum, router losses as means."""
    golden = case.config()
    model = load_decoder(case, dispatch=dispatch).train(mode == "train")
    batch = golden_batch(case)
    out = model(batch)
    nll, log_z, _ = linear_cross_entropy(
        out.hidden.flatten(0, 1), model.head_weight, batch.target_tokens.flatten()
    )
    weights = batch.loss_weights.flatten()
    z = golden["z_loss"] * log_z.square()
    weight_sum = weights.sum()
    groups = sum(s.num_groups for s in out.router)
    aux = golden["aux_loss_factor"] * sum(s.load_balancing_sum for s in out.router) / groups
    z_weight = golden["router_z_loss_factor"] if router_z_weight is None else router_z_weight
    router_z = z_weight * sum(s.router_z_sum for s in out.router) / groups
    parts = {
        "ce_plus_z": ((nll + z) * weights).sum() / weight_sum,
        "ce_only": (nll * weights).sum() / weight_sum,
        "z_loss_term": (z * weights).sum() / weight_sum,
        "aux": aux,
        "router_z": router_z,
        "weight_sum": weight_sum,
    }
    parts["total_loss"] = parts["ce_plus_z"] + aux + router_z
    per_token = {"per_token_loss_incl_z": nll + z, "per_token_z_loss": z}
    return model, parts, {k: v.view(batch.target_tokens.shape) for k, v in per_token.items()}


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_losses(path, mode):
    """A wrong normaliser, weight, z-loss square or mean over groups and layers."""
    case = Case(path)
    exact = case.config()["dtype"] == "float32"
    _, parts, per_token = losses(case, mode)
    stored = case.meta.get(mode) or case.meta
    compared = 0
    for name, ours in parts.items():
        if name in stored:
            tolerance = 5e-6 * max(1, abs(stored[name])) if exact else 5e-3
            assert abs(ours.item() - stored[name]) <= tolerance, name
            compared += 1
    assert compared >= 4
    for name, ours in per_token.items():
        if exact and f"{mode}/{name}" in case:
            np.testing.assert_allclose(ours.detach(), case[f"{mode}/{name}"], atol=2e-5, err_msg=name)


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
        model, parts, _ = losses(case, "train", dispatch, weight)
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
            model, parts, _ = losses(case, "train")
            parts["total_loss"].backward()
            for name, p in model.named_parameters():
                assert p.grad is not None, name
                assert p.grad.dtype == torch.float32, name
                assert p.grad.isfinite().all(), name
