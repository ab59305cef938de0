"""Whole training trajectories against the original trainer (golden README: train_*.npz)."""

import numpy as np
import pytest
import torch

from openmoe.optim.build import build_optimizer
from openmoe.optim.config import AdafactorConfig
from openmoe.optim.schedules import learning_rate
from openmoe.parallel.ranks import OneProcess
from openmoe.train.config import TrainConfig
from openmoe.train.step import micro_batches, train_step

from .golden import Case, converted, golden_files, load_decoder

CASES = golden_files("train_*.npz")
pytestmark = pytest.mark.skipif(not CASES, reason="no train_*.npz in the golden folder")


def step_arrays(case: Case, step: int) -> dict[str, np.ndarray]:
    batches = {name: array[step] for name, array in case.under("batches").items()}
    tokens = batches["decoder_target_tokens"]
    return {
        "input_tokens": batches["decoder_input_tokens"],
        "target_tokens": tokens,
        "loss_weights": batches["decoder_loss_weights"].astype(np.float32),
        "segment_ids": batches.get("decoder_segment_ids", (tokens > 0).astype(np.int32)),
        "prefix_mask": np.zeros(tokens.shape, bool),
        "source_ids": np.zeros(tokens.shape, np.int16),
    }


@pytest.mark.parametrize("path", CASES, ids=lambda p: p.stem)
def test_trajectory(path):
    """A wrong order of loss, update, learning-rate step or micro-batch sum shows after one step or by
    twenty."""
    case = Case(path)
    golden = case.meta["config"]
    model = load_decoder(case, "params_step0")
    optim = AdafactorConfig(name="adafactor")
    optimizer = build_optimizer(optim, model.named_parameters())
    history = case.meta["history"]
    config = TrainConfig(
        global_batch_rows=1,
        seq_len=2,
        loss_normalization="per_microbatch",
        z_loss_weight=golden["z_loss"],
        load_balancing_weight=golden["aux_loss_factor"],
        router_z_loss_weight=golden["router_z_loss_factor"],
    )
    for entry in history:
        arrays = step_arrays(case, entry["step"])
        rows = len(arrays["input_tokens"])
        size = rows // (case.meta.get("microbatches") or 1)
        lr = learning_rate(optim.schedule, entry["step"])
        assert lr == pytest.approx(entry["lr"], rel=1e-7)
        micro = micro_batches(arrays, size, torch.device("cpu"))
        result = train_step(model, optimizer, micro, 0, lr, config, OneProcess(model))
        assert result.loss.item() == pytest.approx(entry["total_loss"], abs=5e-6), entry["step"]
        if "metric:experts/fraction_tokens_left_behind" in entry:
            layers = [s for block in result.router for s in block]
            left = sum(s.tokens_left_behind for s in layers) / sum(s.routed_tokens for s in layers)
            assert left.item() == pytest.approx(entry["metric:experts/fraction_tokens_left_behind"], abs=1e-6)
        after = case.under(f"params_step{entry['step'] + 1}")
        ours = dict(model.named_parameters())
        for name, value in converted(after, model.config).items():
            torch.testing.assert_close(
                ours[name].detach(), value, atol=1e-6, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )
