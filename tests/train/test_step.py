"""What a host batch becomes on the device."""

import numpy as np
import pytest
import torch

from openmoe.data.batch_memory import BatchMemory
from openmoe.model.config import ModelConfig
from openmoe.model.decoder import Decoder
from openmoe.parallel.build import build_decoder
from openmoe.train.step import host_memory, loss_sums, micro_batches

CPU = torch.device("cpu")


def host_batch() -> dict[str, np.ndarray]:
    """Rows of one example, of two, and of padding alone."""
    draw = np.random.default_rng(0)
    segments = np.zeros((6, 16), np.int32)
    for row, lengths in enumerate(([9], [5, 6], [16], [3], [], [7, 9])):
        segments[row, : sum(lengths)] = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    targets = draw.integers(1, 32, segments.shape) * (segments > 0)
    return {
        "input_tokens": np.roll(targets, 1, 1) * (segments > 0),
        "target_tokens": targets,
        "loss_weights": (segments > 0).astype(np.float32),
        "segment_ids": segments,
        "prefix_mask": (segments > 0) & (np.arange(16) < 3),
        "source_ids": np.zeros(segments.shape, np.int16),
    }


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_host_batches_for_a_gpu_are_pinned() -> None:
    """Bug: batches in ordinary memory, whose copy holds the host up; ids that are no index on the device."""
    device = torch.device("cuda")
    arrays = BatchMemory(host_memory(device)).empty_batch(6, 16)
    assert all(torch.from_numpy(array).is_pinned() for array in arrays.values())
    micro = micro_batches(arrays, 3, device)
    assert all(block.batch.input_tokens.dtype == torch.int64 for block in micro)
    assert all(block.batch.input_tokens.is_cuda for block in micro)


def small_model(**options: object) -> Decoder:
    config = ModelConfig(
        vocab_size=32, d_model=16, n_layers=2, n_heads=2, head_dim=8, d_ff=16, moe_every=2, num_experts=4,
        top_k=2, router_init_std=0.5, **options,
    )  # fmt: skip
    return build_decoder(config, "fp64", CPU, seed=0)


def total(model: Decoder, micro_batch_rows: int, longest_segment: int | None = None) -> torch.Tensor:
    """Sums of the LM loss and both router losses over a batch cut into micro-batches."""
    blocks = micro_batches(host_batch(), micro_batch_rows, CPU, longest_segment)
    sums = [loss_sums(model, block) for block in blocks]
    return torch.stack(
        [torch.stack([b.lm, b.router[0].load_balancing_sum, b.router[0].router_z_sum]) for b in sums]
    ).sum(0)


@pytest.mark.parametrize("attention", ["causal", "prefix"])
def test_packed_rows_are_masked_alike_in_every_split(attention: str) -> None:
    """Bug: each block decides by its own rows whether a mask is needed, so routed padding sees other columns
    with other neighbours, and the router losses depend on the number of micro-batches."""
    model = small_model(route_padding=True, attention=attention)
    torch.testing.assert_close(total(model, -1), total(model, 1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("attention", ["causal", "prefix"])
@pytest.mark.parametrize("micro_batch_rows", [-1, 2, 1])
def test_tiles_give_the_same_loss(micro_batch_rows: int, attention: str) -> None:
    """Catches tiles that index the rows of the whole batch instead of the block's, and a block of padding
    alone that fails."""
    model = small_model(attention=attention)
    expected = total(model, micro_batch_rows)
    torch.testing.assert_close(total(model, micro_batch_rows, 16), expected, rtol=1e-12, atol=1e-12)


def test_tiles_are_built_where_asked_for() -> None:
    """Catches long rows that fall back to a mask over whole rows, and a tile of another width in each block,
    which compiles anew."""
    assert all(block.batch.tiles is None for block in micro_batches(host_batch(), 2, CPU))
    widths = [block.batch.tiles.positions.shape[1] for block in micro_batches(host_batch(), 2, CPU, 20)]
    assert widths == [20, 20, 20]
