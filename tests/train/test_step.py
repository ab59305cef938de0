"""What a host batch becomes on the device."""

import numpy as np
import pytest
import torch

from openmoe.model.config import ModelConfig
from openmoe.parallel.build import build_decoder
from openmoe.train.step import loss_sums, micro_batches


@pytest.mark.parametrize("attention", ["causal", "prefix"])
def test_packed_rows_are_masked_alike_in_every_split(attention: str) -> None:
    """Bug: each block decides by its own rows whether a mask is needed, so routed padding sees other columns
    with other neighbours, and the router losses depend on the number of micro-batches."""
    config = ModelConfig(
        vocab_size=32, d_model=16, n_layers=2, n_heads=2, head_dim=8, d_ff=16, moe_every=2, num_experts=4,
        top_k=2, router_init_std=0.5, route_padding=True, attention=attention,
    )  # fmt: skip
    draw = np.random.default_rng(0)
    segments = np.array([[1] * 9 + [0] * 7, [1] * 5 + [2] * 6 + [0] * 5, [1] * 16, [1] * 3 + [0] * 13])
    targets = draw.integers(1, 32, segments.shape) * (segments > 0)
    arrays = {
        "input_tokens": np.roll(targets, 1, 1) * (segments > 0),
        "target_tokens": targets,
        "loss_weights": (segments > 0).astype(np.float32),
        "segment_ids": segments.astype(np.int32),
        "prefix_mask": (segments > 0) & (np.arange(16) < 3),
        "source_ids": np.zeros(segments.shape, np.int16),
    }
    model = build_decoder(config, "fp64", torch.device("cpu"), seed=0)
    sums = {}
    for size in (4, 1):
        blocks = [loss_sums(model, block) for block in micro_batches(arrays, size, torch.device("cpu"))]
        sums[size] = torch.stack(
            [torch.stack([b.lm, b.router[0].load_balancing_sum, b.router[0].router_z_sum]) for b in blocks]
        ).sum(0)
    torch.testing.assert_close(sums[4], sums[1], rtol=1e-10, atol=1e-10)
