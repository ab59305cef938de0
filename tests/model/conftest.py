"""A small model with everything in it."""

import pytest
import torch

from openmoe.model.batch import Batch
from openmoe.model.config import ModelConfig
from openmoe.model.decoder import Decoder
from openmoe.model.init import initialise


@pytest.fixture
def config() -> ModelConfig:
    return ModelConfig(
        vocab_size=64,
        d_model=32,
        n_layers=4,
        n_heads=2,
        head_dim=8,
        d_ff=24,
        moe_every=2,
        num_experts=4,
        top_k=2,
        router_init_std=0.3,
        init_scale=1.0,
    )


def build(config: ModelConfig, dtype: torch.dtype = torch.float64) -> Decoder:
    model = Decoder(config, compute_dtype=dtype).to(dtype)
    initialise(model, config, seed=1)
    return model


def rows(lengths: list[int], seq_len: int = 24, seed: int = 0) -> Batch:
    """One example a row, of the given length, padding behind it."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(1, 64, (len(lengths), seq_len), generator=generator)
    real = torch.arange(seq_len) < torch.tensor(lengths)[:, None]
    targets = targets * real
    inputs = torch.nn.functional.pad(targets[:, :-1], (1, 0)) * real
    return Batch(inputs, targets, real.double(), segment_ids=None)
