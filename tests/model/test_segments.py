"""Attention over segments in tiles: the results of the mask over whole rows, without its size."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from openmoe.model import decoder
from openmoe.model.batch import Batch
from openmoe.model.segments import SegmentTiles, tile_index

from .conftest import build

LONGEST = 12
PACKINGS = {
    "full": [[12, 12], [5, 7, 12], [1] * 24, [12, 11, 1]],
    "padding": [[12, 9], [3, 4, 5], [1], []],
    "one": [[12], [7], [1], [10]],
}


def packed(lengths: list[list[int]], seq_len: int = 24, longest: int = LONGEST, seed: int = 0) -> Batch:
    """Rows of segments of the given lengths, a stretch of prefix in each, padding behind them, and tiles."""
    draw = np.random.default_rng(seed)
    segments = np.zeros((len(lengths), seq_len), np.int64)
    prefix = np.zeros(segments.shape, bool)
    inputs = draw.integers(1, 64, segments.shape)  # at padding too: a leak shows
    for row, row_lengths in enumerate(lengths):
        start = 0
        for number, length in enumerate(row_lengths, start=1):
            segments[row, start : start + length] = number
            first, last = sorted(draw.integers(length + 1, size=2))
            prefix[row, start + first : start + last] = True
            inputs[row, start] = 0
            start += length
    targets = draw.integers(1, 64, segments.shape) * (segments > 0)
    weights = draw.random(segments.shape) * (segments > 0)
    tensors = map(torch.from_numpy, (inputs, targets, weights, segments, prefix))
    tiles = SegmentTiles(*map(torch.from_numpy, tile_index(segments, longest)))
    return replace(Batch(*tensors), tiles=tiles)


def results(model: decoder.Decoder, batch: Batch) -> dict[str, torch.Tensor]:
    """Hidden states of the real tokens, router sums, and the gradient of every parameter."""
    model.zero_grad()
    out = model(batch)
    real = batch.target_tokens > 0
    logits = model.logits(out.hidden[real])
    nll = torch.nn.functional.cross_entropy(logits, batch.target_tokens[real], reduction="none")
    loss = (nll * batch.loss_weights[real]).sum()
    for s in out.router:
        loss = loss + 0.1 * s.load_balancing_sum + 0.1 * s.router_z_sum
    loss.backward()
    router = {
        f"{name} {layer}": getattr(s, name).detach()
        for layer, s in enumerate(out.router)
        for name in ("load_balancing_sum", "router_z_sum", "kept", "routed_tokens")
    }
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"hidden": out.hidden[real].detach(), **router, **gradients}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Within `tolerance` of each tensor's maximum."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(1.0, value.abs().max().item())
        torch.testing.assert_close(found[name], value, rtol=0, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("attention", ["causal", "prefix"])
@pytest.mark.parametrize("moe", [{"moe_every": 0}, {"group_rows": 2}, {"dispatch": "einsum"}])
def test_tiles_equal_the_mask(config, moe, attention, packing, dtype):
    """Catches a key of another segment or row in a tile, a prefix of another example, a tile put back at
    another place, a gradient that the gathers lose or count twice."""
    model = build(config.model_copy(update={**moe, "attention": attention}), dtype)
    batch = packed(PACKINGS[packing])
    expected = results(model, replace(batch, tiles=None))
    assert_equal(results(model, batch), expected, 1e-12 if dtype == torch.float64 else 2e-6)


def test_tile_index():
    """Catches segments of neighbouring rows that share a number taken for one; padding in a tile."""
    segments = np.array([[1, 1, 2, 2, 2], [2, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 0, 0]])
    positions, slots = tile_index(segments, 4)
    assert positions.tolist() == [[0, 1, -1, -1], [2, 3, 4, -1], [5, -1, -1, -1], [15, 16, 17, -1]]
    expected = [[0, 1, 4, 5, 6], [8, -1, -1, -1, -1], [-1] * 5, [12, 13, 14, -1, -1]]
    assert slots.tolist() == expected


def test_too_long_segment():
    """Catches an example that is cut off, or runs over into the next tile, without a word."""
    with pytest.raises(ValueError, match="row 1: a segment of 5 positions; allowed: at most 4"):
        tile_index(np.array([[1, 1, 1, 1, 0], [3, 3, 3, 3, 3]]), 4)


def test_padding_alone(config):
    """Catches a micro-batch without an example that fails, or gives NaN."""
    model = build(config)
    out = model(packed([[], []]))
    (out.hidden.sum() + sum(s.load_balancing_sum for s in out.router)).backward()
    assert out.hidden.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("attention", ["causal", "prefix"])
def test_empty_tiles_change_nothing(config, attention):
    """Catches an empty tile that reads or writes something: then their number could not be fixed."""
    model = build(config.model_copy(update={"attention": attention}))
    batch = packed(PACKINGS["padding"])
    more = torch.nn.functional.pad(batch.tiles.positions, (0, 0, 0, 3), value=-1)
    padded = replace(batch, tiles=replace(batch.tiles, positions=more))
    assert_equal(results(model, padded), results(model, batch), 1e-13)


@pytest.mark.parametrize(
    "padding",
    [{"mask_padding": True}, {"route_padding": True}, {"mask_padding": True, "route_padding": True}],
)
def test_rows_whose_padding_counts_keep_their_mask(config, padding):
    """Catches tiles where padding reads a row's other columns and then takes part in routing or gradients:
    another result than the released model's."""
    model = build(config.model_copy(update=padding))
    batch = packed(PACKINGS["padding"])
    expected = results(model, replace(batch, tiles=None))
    assert_equal(results(model, batch), expected, 0)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns, backward pass included."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                self.elements = max(self.elements, t.numel())
        return out


@pytest.mark.parametrize("attention", ["causal", "prefix"])
def test_nothing_grows_with_the_square_of_the_row(config, attention):
    """Catches a mask, or scores, over whole rows: a gibibyte a row at 32,768 positions."""
    model = build(config.model_copy(update={"attention": attention, "n_layers": 2}), torch.float32)
    seq_len, longest = 16_384, 256
    batch = packed([[longest] * 63 + [100]], seq_len, longest)
    with LargestTensor() as largest:
        model(batch).hidden.sum().backward()
    assert seq_len < largest.elements < seq_len**2 // 16


def test_place_in_the_row_does_not_show(config):
    """Catches positions that count from the row's start: in float32 their angles round to 1e-3 far out, and
    an example depends on what was packed before it."""
    model = build(config.model_copy(update={"moe_every": 0}), torch.float32)
    start = 15 * 1024
    batch = packed([[1024] * 16], 16 * 1024, 1024)
    tokens = batch.input_tokens.clone()
    tokens[:, start:] = tokens[:, :1024]
    hidden = model(replace(batch, input_tokens=tokens)).hidden
    torch.testing.assert_close(hidden[:, start:], hidden[:, :1024], rtol=0, atol=2e-6)
