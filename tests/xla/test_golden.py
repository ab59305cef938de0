"""The original's own numbers over a mesh: logits, routing, losses and gradients of the model cases."""

import numpy as np
import pytest
import torch

from openmoe.parallel.axis_rules import parameter_spec
from openmoe.parallel.config import ParallelConfig
from openmoe.parallel.spmd import XlaRanks, meta_model, put_parameter
from openmoe.parallel.topology import resolve
from openmoe.parallel.xla import Spmd
from openmoe.train.step import loss_sums, micro_batches
from tests.parity.golden import Case, converted, golden_files, load_decoder
from tests.parity.test_model import golden_batch
from tests.xla.training import CPU, on_host

MODELS, LOSSES = golden_files("model_*.npz"), golden_files("loss_*.npz")
pytestmark = pytest.mark.skipif(not MODELS, reason="no model_*.npz in the golden folder")


class Spread:
    """A case's model and batch over a mesh (2, 2, 2)."""

    def __init__(self, case: Case, devices: int) -> None:
        whole = load_decoder(case, dispatch="einsum")
        parallel = ParallelConfig(engine="xla", expert=2, tensor=2)
        spmd = Spmd(resolve(parallel, devices))
        self.exact = whole.compute_dtype == torch.float32
        self.model = meta_model(whole.config, parallel, spmd, whole.compute_dtype)
        for name, value in whole.state_dict().items():
            put_parameter(self.model, name, spmd.put(value, parameter_spec(name, value.dim())))
        self.ranks = XlaRanks(self.model, spmd)
        batch = golden_batch(case)
        arrays = {
            "input_tokens": batch.input_tokens,
            "target_tokens": batch.target_tokens,
            "loss_weights": batch.loss_weights,
            "segment_ids": torch.ones_like(batch.input_tokens)
            if batch.segment_ids is None
            else batch.segment_ids,
            "prefix_mask": torch.zeros(batch.input_tokens.shape, dtype=torch.bool),
            "source_ids": torch.zeros_like(batch.input_tokens),
        }
        packed = batch.segment_ids is not None
        host = {name: array.numpy() for name, array in arrays.items()}
        [self.micro] = micro_batches(host, -1, CPU, packed=packed, spread=self.ranks.rows)


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_logits_and_routing(path, mode, devices):
    """Groups, priority or slots that follow from how rows lie on devices; a sum in another precision."""
    case = Case(path)
    spread = Spread(case, devices)
    model = spread.model.train(mode == "train")
    routings = {}
    for i, block in enumerate(model.layers):
        if block.moe is not None:
            block.moe.register_forward_hook(lambda _m, _i, out, i=i: routings.__setitem__(i, out[2]))
    with torch.no_grad():
        logits = model.logits(model(spread.micro.batch).hidden)
    [logits], *slots = on_host([[logits], *([r.expert_index, r.slot] for r in routings.values())])

    golden = case.under(mode)
    if "logits" in golden:
        difference = np.abs(logits.numpy() - golden["logits"])
        assert difference.max() <= 2e-5 if spread.exact else difference.mean() <= 0.03
    for layer, (expert_index, slot) in zip(routings, slots, strict=True):
        if f"layer{layer}/topk_expert_index" in golden:
            agree = (expert_index.numpy() == golden[f"layer{layer}/topk_expert_index"]).mean()
            assert agree == 1 if spread.exact else agree >= 0.95
            if spread.exact:
                np.testing.assert_array_equal(slot, golden[f"layer{layer}/slot"])
    assert mode == "eval" or "logits" in golden


@pytest.mark.parametrize("path", LOSSES, ids=lambda p: p.stem)
def test_losses_and_gradients(path, devices):
    """A loss that counts a row once for each device that has it, a gradient summed over too few of them."""
    case = Case(path)
    golden = case.config()
    spread = Spread(case, devices)
    sums = loss_sums(spread.model.train(), spread.micro)
    groups = max(1, sum(s.num_groups for s in sums.router))
    parts = {
        "ce_only": sums.lm / sums.weight,
        "z_loss_term": golden["z_loss"] * sums.z / sums.weight,
        "experts/auxiliary_loss": golden["aux_loss_factor"]
        * sum(s.load_balancing_sum for s in sums.router)
        / groups,
        "experts/router_z_loss": golden["router_z_loss_factor"]
        * sum(s.router_z_sum for s in sums.router)
        / groups,
    }
    total = sum(parts.values())
    total.backward()
    gradients = {name: p.grad for name, p in spread.model.named_parameters()}
    [values, found] = on_host([[*parts.values(), total], list(gradients.values())])
    stored = case.meta.get("train") or case.meta
    compared = 0
    for name, ours in zip([*parts, "total_loss"], values, strict=True):
        if name in stored:
            tolerance = 5e-6 * max(1, abs(stored[name])) if spread.exact else 5e-3
            assert abs(ours.item() - stored[name]) <= tolerance, name
            compared += 1
    assert compared >= 3
    ours = dict(zip(gradients, found, strict=True))
    for name, whole in converted(case.under("grads"), spread.model.config).items():
        worst = (ours[name] - whole).abs().max() / whole.abs().max().clamp(min=1e-30)
        assert worst <= 2e-5, f"{name}: {worst:.1e}"
