"""Which rank holds what: parts that tile every parameter, and the rules behind them."""

from itertools import product
from math import prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from openmoe.model.config import ModelConfig
from openmoe.model.decoder import Decoder
from openmoe.parallel.placement import parameter_layouts
from openmoe.parallel.topology import Topology

SMALL = {
    "vocab_size": 48, "d_model": 12, "n_layers": 2, "n_heads": 4, "head_dim": 6, "d_ff": 24, "moe_every": 2,
    "num_experts": 8, "top_k": 2,
}  # fmt: skip


def small_decoder(**options: object) -> Decoder:
    with torch.device("meta"):
        return Decoder(ModelConfig(**(SMALL | options)))


topologies = st.tuples(
    st.integers(1, 2), st.integers(1, 6), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4, 8])
).filter(lambda degrees: degrees[1] * degrees[2] % degrees[3] == 0)


@settings(max_examples=40, deadline=None)
@given(topologies, st.sampled_from(["swiglu3", "swiglu4"]))
def test_the_parts_of_a_copy_tile_every_parameter(degrees: tuple[int, int, int, int], ffn: str) -> None:
    """Catches a slice that overlaps another's or leaves a gap: uneven shards, two groups on one dimension,
    halves of wi_0, more ranks than experts."""
    replicate, shard, tensor, expert = degrees
    topology = Topology(replicate * shard * tensor, replicate, shard, tensor, expert)
    for name, layout in parameter_layouts(small_decoder(ffn=ffn), topology).items():
        held = np.zeros(layout.shape, int)
        for rank in range(topology.world_size):
            held[layout.slices(topology, rank)] += 1
        # Each copy of the model holds it once, and once on each tensor rank where that is the rule.
        copies = replicate * (tensor if layout.partial_over_tensor else 1)
        assert (held == copies).all(), name


def test_experts_stay_whole_as_long_as_there_are_enough_of_them() -> None:
    """Catches experts that are cut, whose statistics then have to travel in each update."""
    for shard, expert in product((1, 2, 4, 8), (1, 2, 4, 8)):
        if shard % expert:
            continue
        for name, layout in parameter_layouts(small_decoder(), Topology(shard, 1, shard, 1, expert)).items():
            if layout.is_expert:
                assert not any(layout.splits[1:]), (name, shard, expert)
                assert prod(
                    s.stop - s.start for s in layout.slices(Topology(shard, 1, shard, 1, expert), 0)
                ) == (prod(layout.shape) // shard)


def test_a_parameter_without_a_rule() -> None:
    """Catches a new parameter that is silently held whole, with a gradient that nobody sums."""
    model = small_decoder()
    model.layers[0].bias = nn.Parameter(torch.empty(3, device="meta"))
    with pytest.raises(ValueError, match=r"no placement for the parameter layers\.0\.bias; known endings: "):
        parameter_layouts(model, Topology(2, 1, 1, 2, 1))
