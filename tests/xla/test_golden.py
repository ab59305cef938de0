"""The original's own numbers over a mesh: logits, routing, losses and gradients of the model cases."""

import numpy as np
import pytest
import torch

from openmoe.model.decoder import Decoder
from openmoe.optim.build import build_optimizer
from openmoe.optim.config import AdafactorConfig
from openmoe.optim.schedules import learning_rate
from openmoe.parallel.axis_rules import parameter_spec
from openmoe.parallel.config import ParallelConfig
from openmoe.parallel.spmd import XlaRanks, meta_model, put_parameter
from openmoe.parallel.topology import resolve
from openmoe.parallel.xla import Spmd
from openmoe.train.config import TrainConfig
from openmoe.train.step import loss_sums, micro_batches, train_step
from tests.parity.golden import Case, converted, golden_files, load_decoder
from tests.parity.test_model import golden_batch
from tests.parity.test_train import step_arrays
from tests.xla.training import CPU, on_host

MODELS, LOSSES, TRAJECTORIES = (golden_files(f"{kind}_*.npz") for kind in ("model", "loss", "train"))
pytestmark = pytest.mark.skipif(not MODELS, reason="no model_*.npz in the golden folder")


def spread(whole: Decoder, devices: int) -> tuple[Decoder, XlaRanks]:
    """The same model over a mesh (2, 2, 2)."""
    parallel = ParallelConfig(engine="xla", expert=2, tensor=2)
    spmd = Spmd(resolve(parallel, devices))
    model = meta_model(whole.config, parallel, spmd, whole.compute_dtype)
    for name, value in whole.state_dict().items():
        put_parameter(model, name, spmd.put(value, parameter_spec(name, value.dim())))
    return model, XlaRanks(model, spmd)


class Spread:
    """A case's model and batch over the mesh."""

    def __init__(self, case: Case, devices: int) -> None:
        whole = load_decoder(case, dispatch="einsum")
        self.exact = whole.compute_dtype == torch.float32
        self.model, ranks = spread(whole, devices)
        batch = golden_batch(case)
        packed = batch.segment_ids is not None
        arrays = {
            "input_tokens": batch.input_tokens,
            "target_tokens": batch.target_tokens,
            "loss_weights": batch.loss_weights,
            "segment_ids": batch.segment_ids if packed else torch.ones_like(batch.input_tokens),
            "prefix_mask": torch.zeros(batch.input_tokens.shape, dtype=torch.bool),
            "source_ids": torch.zeros_like(batch.input_tokens),
        }
        host = {name: array.numpy() for name, array in arrays.items()}
        [self.micro] = micro_batches(host, -1, CPU, packed=packed, spread=ranks.rows)


@pytest.mark.parametrize("path", MODELS, ids=lambda p: p.stem)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_logits_and_routing(path, mode, devices):
    """Groups, priority or slots that follow from how rows lie on devices; a sum in another precision."""
    case = Case(path)
    over = Spread(case, devices)
    model = over.model.train(mode == "train")
    routings = {}
    for i, block in enumerate(model.layers):
        if block.moe is not None:
            block.moe.register_forward_hook(lambda _m, _i, out, i=i: routings.__setitem__(i, out[2]))
    with torch.no_grad():
        logits = model.logits(model(over.micro.batch).hidden)
    [logits], *slots = on_host([[logits], *([r.expert_index, r.slot] for r in routings.values())])

    golden = case.under(mode)
    if "logits" in golden:
        difference = np.abs(logits.numpy() - golden["logits"])
        assert difference.max() <= 2e-5 if over.exact else difference.mean() <= 0.03
    for layer, (expert_index, slot) in zip(routings, slots, strict=True):
        if f"layer{layer}/topk_expert_index" in golden:
            agree = (expert_index.numpy() == golden[f"layer{layer}/topk_expert_index"]).mean()
            assert agree == 1 if over.exact else agree >= 0.95
            if over.exact:
                np.testing.assert_array_equal(slot, golden[f"layer{layer}/slot"])
    assert mode == "eval" or "logits" in golden


@pytest.mark.parametrize("path", LOSSES, ids=lambda p: p.stem)
def test_losses_and_gradients(path, devices):
    """A loss that counts a row once for each device that has it, a gradient summed over too few of them."""
    case = Case(path)
    golden = case.config()
    over = Spread(case, devices)
    sums = loss_sums(over.model.train(), over.micro)
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
    gradients = {name: p.grad for name, p in over.model.named_parameters()}
    [values, found] = on_host([[*parts.values(), total], list(gradients.values())])
    stored = case.meta.get("train") or case.meta
    compared = 0
    for name, ours in zip([*parts, "total_loss"], values, strict=True):
        if name in stored:
            tolerance = 5e-6 * max(1, abs(stored[name])) if over.exact else 5e-3
            assert abs(ours.item() - stored[name]) <= tolerance, name
            compared += 1
    assert compared >= 3
    ours = dict(zip(gradients, found, strict=True))
    for name, whole in converted(case.under("grads"), over.model.config).items():
        worst = (ours[name] - whole).abs().max() / whole.abs().max().clamp(min=1e-30)
        assert worst <= 2e-5, f"{name}: {worst:.1e}"


@pytest.mark.parametrize("path", TRAJECTORIES, ids=lambda p: p.stem)
def test_trajectory(path, devices):
    """Twenty updates of the original trainer: a moment of Adafactor that is off shows by the end."""
    case = Case(path)
    golden = case.meta["config"]
    model, ranks = spread(load_decoder(case, "params_step0", dispatch="einsum"), devices)
    optim = AdafactorConfig(name="adafactor")
    optimizer = build_optimizer(optim, ranks.named_parameters(), ranks.shards)
    ranks.attach(optimizer)
    config = TrainConfig(
        global_batch_rows=1,
        seq_len=2,
        loss_normalization="per_microbatch",
        z_loss_weight=golden["z_loss"],
        load_balancing_weight=golden["aux_loss_factor"],
        router_z_loss_weight=golden["router_z_loss_factor"],
    )
    for entry in case.meta["history"]:
        arrays = step_arrays(case, entry["step"])
        size = len(arrays["input_tokens"]) // (case.meta.get("microbatches") or 1) // ranks.rows.data_ranks
        rate = learning_rate(optim.schedule, entry["step"])
        packed = bool(arrays["segment_ids"].max() > 1)
        micro = micro_batches(arrays, size, CPU, packed=packed, spread=ranks.rows)
        result = train_step(model, optimizer, micro, 0, rate, config, ranks)
        assert result.loss.cpu().item() == pytest.approx(entry["total_loss"], abs=5e-6), entry["step"]
        after = case.under(f"params_step{entry['step'] + 1}")
        ours = dict(model.named_parameters())
        for name, value in converted(after, model.config).items():
            error = (ours[name].detach().cpu() - value).abs().max()
            assert error <= 1e-6, f"{name}: {error:.1e}"
