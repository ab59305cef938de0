"""Initial values: the original's distributions, and every slice a function of its own indices."""

import json

import pytest
import torch

import openmoe.model.init
from openmoe.model.decoder import Decoder
from openmoe.model.init import fill, initial_values, initialise
from tests.parity.golden import golden_files, our_name, released_config


def test_slices(config):
    """A shard that starts anywhere must hold the slice of the whole."""
    whole = initial_values(config, 3, "layers.0.ffn.wi_0", 0, 1000)
    for start, count in ((0, 1), (1, 7), (333, 100), (996, 4)):
        part = initial_values(config, 3, "layers.0.ffn.wi_0", start, count)
        assert torch.equal(part, whole[start : start + count])


@pytest.mark.parametrize(
    "slices",
    [
        ((0, 4), (0, 3), (0, 5)),
        ((1, 3), (0, 3), (0, 5)),
        ((0, 4), (2, 3), (0, 5)),
        ((3, 4), (0, 3), (1, 4)),
        ((0, 4), (1, 3), (4, 5)),
        ((2, 2), (0, 3), (0, 5)),
    ],
)
def test_parts_of_a_tensor(config, slices, monkeypatch):
    """A shard cut in any dimensions, also an empty one, must hold the part of the whole; blocks and runs
    must not be counted from the shard's own start."""
    monkeypatch.setattr(openmoe.model.init, "BLOCK_ELEMENTS", 7)
    shape, name = (4, 3, 5), "layers.0.moe.experts.wo"
    whole = initial_values(config, 3, name, 0, 60).view(shape)
    cut = tuple(slice(*ends) for ends in slices)
    part = torch.full_like(whole[cut], torch.nan, memory_format=torch.contiguous_format)
    fill(part, config, 3, name, shape, cut)
    assert torch.equal(part, whole[cut])


def test_names_and_seeds_differ(config):
    """Two tensors with equal values would be one stream used twice."""
    draws = [
        initial_values(config, seed, name, 0, 64)
        for seed in (0, 1)
        for name in ("layers.0.attention.k.weight", "layers.1.attention.k.weight", "head.weight")
    ]
    for i, a in enumerate(draws):
        assert all(abs(torch.corrcoef(torch.stack((a, b)))[0, 1]) < 0.5 for b in draws[:i])


def test_distributions_of_the_original():
    """A wrong fan-in, scale, truncation or attention factor (golden init_stats.json)."""
    files = golden_files("init_stats.json")
    if not files:
        pytest.skip("no init_stats.json in the golden folder")
    golden = json.loads(files[0].read_text())
    config = released_config(golden["config"])
    model = Decoder(config)
    initialise(model, config, seed=0)
    parameters = dict(model.named_parameters())
    for name, expected in golden["stats"].items():
        x = parameters[our_name(name, config)].detach().double().flatten()
        n = x.numel()
        assert n == torch.tensor(expected["shape"]).prod()
        assert x.mean().item() == pytest.approx(expected["mean"], abs=6 * expected["std"] / n**0.5 + 1e-12)
        assert x.std(correction=0).item() == pytest.approx(expected["std"], rel=5 / n**0.5, abs=1e-12), name
        if n >= 50_000:
            kurtosis = ((x - x.mean()) ** 4).mean() / x.var() ** 2
            assert kurtosis.item() == pytest.approx(expected["kurtosis"], abs=0.1), name
