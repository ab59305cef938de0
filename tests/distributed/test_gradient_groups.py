"""Over which ranks the gradient of each kind of parameter is summed: rank r contributes 2^r to each element,
so a sum names its terms."""

from collections.abc import Iterable

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from openmoe.parallel.topology import Topology
from tests.distributed.comparison import GradientReader, Setup, Training, setup
from tests.distributed.layouts import Variant, name_of
from tests.distributed.pool import Pool

# With their number of micro-batches. Tensor and expert groups are equal, or either is a part of the other.
CASES = [
    (Topology(8, 2, 2, 2, 4), 4),
    (Topology(8, 1, 2, 4, 2), 1),
    (Topology(8, 1, 4, 2, 8), 1),
    (Topology(8, 2, 4, 1, 2), 4),
    (Topology(8, 1, 4, 2, 1), 1),
    (Topology(8, 4, 1, 2, 2), 1),
]

# The end of a name -> who has terms of its gradient.
SUMMED_OVER = {
    "embedding.weight": "data",
    "head.weight": "data",
    "attention.q.weight": "data",
    "attention.k.weight": "data",
    "attention.v.weight": "data",
    "attention.o.weight": "data",
    "ffn.wi_0": "data",
    "ffn.wi_1": "data",
    "ffn.wo": "data",
    "experts.wi_0": "expert_data",
    "experts.wi_1": "expert_data",
    "experts.wo": "expert_data",
    # Whole on each tensor rank, which sees a part of the tokens.
    "norm.scale": "world",
    "router.weight": "world",
}


def gradients_of_powers_of_two(setup: Setup, topology: Topology) -> dict[str, tuple[float, float]]:
    """Smallest and largest element of each complete gradient, where every backward pass of rank r yields 2^r
    for every element. A gradient without elements here is left out."""
    training = Training(setup, topology, "fp64")
    power = 2.0 ** dist.get_rank()
    modules = [module for module in training.model.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.unshard()
    for parameter in training.model.parameters():  # now what the backward pass computes with
        parameter.register_hook(lambda gradient: torch.full_like(gradient, power))
    for module in modules:
        module.reshard()
    reader = GradientReader(training.ranks)
    training.step(0, reader)
    assert len(reader.gradients) == len(list(training.model.parameters()))
    return {
        name: (gradient.min().item(), gradient.max().item())
        for name, gradient in reader.gradients.items()
        if gradient.numel()
    }


def total(ranks: Iterable[int]) -> float:
    return sum(2.0**rank for rank in ranks)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("topology", "micro_batches"), CASES, ids=[name_of(topology) for topology, _ in CASES]
)
def test_groups_of_gradients(pool: Pool, topology: Topology, micro_batches: int) -> None:
    """Catches experts' gradients summed over all data ranks, any sum that is an average, one that is made
    for each micro-batch anew, and norms or routers that know their own tokens only."""
    case = setup(topology, Variant("tiny_released", micro_batches=micro_batches), n_layers=2)
    results = pool.run(gradients_of_powers_of_two, 8, case, topology)
    seen = set()
    for rank, extremes in enumerate(results):
        for name, found in extremes.items():
            ending, group = next(item for item in SUMMED_OVER.items() if name.endswith(item[0]))
            expected = micro_batches * total(topology.group(group, rank))
            assert found == (expected, expected), (name, rank)
            seen.add(ending)
    assert seen == SUMMED_OVER.keys()
