"""The model against the original's own numbers (golden README: model_*.npz)."""

import numpy as np
import pytest
import torch

from openmoe.model.batch import Batch
from openmoe.model.decoder import Decoder

from .golden import Case, golden_files, load_decoder

CASES = golden_files("model_*.npz")
pytestmark = pytest.mark.skipif(not CASES, reason="no model_*.npz in the golden folder")


def golden_batch(case: Case) -> Batch:
    arrays = case.origin("batch").under("batch")

    def tensor(name: str) -> torch.Tensor | None:
        array = arrays.get(name)
        return None if array is None else torch.from_numpy(np.array(array)).long()

    weights = torch.from_numpy(np.array(arrays["decoder_loss_weights"], dtype=np.float32))
    return Batch(
        tensor("decoder_input_tokens"),
        tensor("decoder_target_tokens"),
        weights,
        segment_ids=tensor("decoder_segment_ids"),
    )


def record(model: Decoder) -> dict[str, torch.Tensor]:
    """Forward hooks that keep what the golden files keep, under their names."""
    seen: dict[str, torch.Tensor] = {}
    streams: dict[int, torch.Tensor] = {}
    for i, block in enumerate(model.layers):

        def keep(name: str, i: int = i):
            def hook(_m, _i, out):
                seen[f"layer{i}/{name}"] = out[0] if isinstance(out, tuple) else out

            return hook

        block.attention.register_forward_hook(keep("self_attention_out"))
        if block.moe is None:
            block.ffn.register_forward_hook(keep("mlp_out"))
        else:
            block.moe.register_forward_hook(keep("mlp_out"))
            block.ffn.register_forward_hook(keep("extra_mlp_out"))
            block.ffn_norm.register_forward_pre_hook(
                lambda _m, args, i=i: seen.__setitem__(f"layer{i}/output", args[0])
            )
        block.register_forward_hook(lambda _m, _i, out, i=i: streams.__setitem__(i, out[0]))
        if block.moe is None:
            block.register_forward_hook(keep("output"))
    model.final_norm.register_forward_hook(lambda _m, _i, out: seen.__setitem__("decoder_norm_out", out))
    return seen


@pytest.mark.parametrize("dispatch", ["sort", "einsum"])
@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_model(path, mode, dispatch):
    """Any slip in attention, rotary, masks, norms, residual order, groups, priority, capacity or gates."""
    case = Case(path)
    exact = case.config()["dtype"] == "float32"
    model = load_decoder(case, dispatch=dispatch).train(mode == "train")
    seen = record(model)
    with torch.no_grad():
        out = model(golden_batch(case), trace=True)
        logits = model.logits(out.hidden)

    golden = case.under(mode)
    if "logits" in golden:
        difference = np.abs(logits.numpy() - golden["logits"])
        assert difference.max() <= 2e-5 if exact else difference.mean() <= 0.03
    compared = "logits" in golden
    for key, value in golden.items():
        if key in seen and exact:
            np.testing.assert_allclose(
                seen[key].float(), value, atol=2e-5 * max(1, np.abs(value).max()), rtol=0, err_msg=key
            )
            compared = True
    assert compared or mode == "eval"
    for layer, statistics in zip(model.config.moe_layers, out.router, strict=True):
        prefix = f"layer{layer}/"
        if exact:
            for name, ours in (
                ("aux_loss", statistics.load_balancing_sum / statistics.num_groups),
                ("router_z_loss", statistics.router_z_sum / statistics.num_groups),
            ):
                if prefix + name in golden:
                    assert abs(ours.item() - golden[prefix + name]) <= 2e-5 * max(
                        1, abs(golden[prefix + name])
                    )


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_routing(path, mode):
    """Wrong tie-break, priority, group boundary or capacity: every choice and slot must be the original's."""
    case = Case(path)
    exact = case.config()["dtype"] == "float32"
    model = load_decoder(case).train(mode == "train")
    routings = {}
    for i, block in enumerate(model.layers):
        if block.moe is not None:
            block.moe.register_forward_hook(lambda _m, _i, out, i=i: routings.__setitem__(i, out[2]))
    with torch.no_grad():
        model(golden_batch(case))
    golden = case.under(mode)
    for layer, routing in routings.items():

        def expect(name: str, layer: int = layer) -> np.ndarray | None:
            return golden.get(f"layer{layer}/{name}")

        index = expect("topk_expert_index")
        if index is None:
            continue
        agree = (routing.expert_index.numpy() == index).mean()
        assert agree == 1 if exact else agree >= 0.95
        if not exact:
            continue
        np.testing.assert_array_equal(routing.slot, expect("slot"))
        for name, ours in (("router_logits", routing.logits), ("router_probs", routing.probs)):
            if expect(name) is not None:
                scale = max(1, np.abs(expect(name)).max())
                np.testing.assert_allclose(ours, expect(name), atol=2e-5 * scale, rtol=0)
        one_hot = torch.nn.functional.one_hot(routing.expert_index, model.config.num_experts)
        np.testing.assert_array_equal(one_hot.sum((1, 2)), expect("assigned_per_group_expert"))
        kept = (one_hot * routing.kept[..., None]).sum((1, 2))
        np.testing.assert_array_equal(kept, expect("kept_per_group_expert"))
        combine = expect("combine_array")
        if combine is not None:
            gates = (one_hot * (routing.gate * routing.kept)[..., None]).sum(2)
            np.testing.assert_allclose(gates, combine.sum(-1), atol=2e-6)
