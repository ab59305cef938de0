"""The layout of processes: what fits, and what is said where it doesn't."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openmoe.parallel.config import ParallelConfig
from openmoe.parallel.topology import TopologyError, resolve

DEGREE = st.integers(1, 6)


@given(replicate=DEGREE, shard=DEGREE, tensor=DEGREE, expert=DEGREE)
def test_degrees_multiply_to_the_world(replicate: int, shard: int, tensor: int, expert: int) -> None:
    """Catches a layout that leaves ranks out, or experts that don't divide the ranks they borrow."""
    world = replicate * shard * tensor
    config = ParallelConfig(replicate=replicate, shard=shard, tensor=tensor, expert=expert)
    if shard * tensor % expert:
        with pytest.raises(TopologyError, match=f"parallel.expert={expert}"):
            resolve(config, world)
        return
    topology = resolve(config, world)
    filled = resolve(config.model_copy(update={"shard": -1}), world)
    assert topology == filled
    assert topology.data_ranks * topology.tensor == world
    with pytest.raises(TopologyError, match=f"the {world + 1} processes"):
        resolve(config, world + 1)


def test_a_shard_of_no_ranks() -> None:
    """Catches a division by zero far from the key that caused it."""
    with pytest.raises(TopologyError, match=r"parallel\.shard=0"):
        resolve(ParallelConfig(shard=0), 1)
