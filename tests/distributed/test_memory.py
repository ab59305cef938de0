"""Bytes of parameters and optimizer state per rank, of the large models under layouts of 512 ranks.

Nothing is sent and nothing allocated: one process is any rank of a world of fakes, on the meta device.
"""

from collections.abc import Iterable, Iterator

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

import openmoe.parallel.parallelize
from openmoe.launcher.schema import Config
from openmoe.model.decoder import Decoder
from openmoe.optim.build import build_optimizer
from openmoe.parallel.collectives import Group
from openmoe.parallel.meshes import build_meshes
from openmoe.parallel.parallelize import Sharding, parallelize
from openmoe.parallel.placement import parameter_layouts
from openmoe.parallel.ranks import FsdpRanks
from openmoe.parallel.topology import Topology, check_fit
from tests.distributed.comparison import page

WORLD_SIZE = 512
META = torch.device("meta")
# As the original was spread over 512 cores: experts over 32, matrices over 8, and two copies of 8B.
LAYOUTS = [
    ("openmoe_8b", Topology(WORLD_SIZE, 2, 32, 8, 32)),
    ("openmoe_8b_released", Topology(WORLD_SIZE, 2, 32, 8, 32)),
    ("openmoe_34b", Topology(WORLD_SIZE, 1, 64, 8, 32)),
    ("openmoe_34b_released", Topology(WORLD_SIZE, 1, 64, 8, 32)),
]


@pytest.fixture(autouse=True)
def no_world_is_left() -> Iterator[None]:
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def size_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for state in optimizer.state.values():
        yield from state.values()


def bytes_of_rank(config: Config, topology: Topology, rank: int) -> int:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=topology.world_size)
    meshes = build_meshes(topology, "cpu")
    with META:
        model = Decoder(config.model)
    layouts = parameter_layouts(model, topology)
    sharding = Sharding(topology, meshes, layouts, torch.bfloat16, torch.float32, lambda *_: None)
    parallelize(model, sharding, rank=rank, seed=0, device=META)
    groups = {name: Group(name, group, lambda *_: None) for name, group in meshes.groups.items()}
    ranks = FsdpRanks(model, topology, groups, layouts, meshes)
    parameters = ranks.named_parameters()
    optimizer = build_optimizer(config.optim, parameters, ranks.shards)
    dist.destroy_process_group()
    return size_bytes(p for _, p in parameters) + size_bytes(optimizer_tensors(optimizer))


@pytest.mark.parametrize(("experiment", "topology"), LAYOUTS, ids=[name for name, _ in LAYOUTS])
def test_bytes_per_rank(monkeypatch: pytest.MonkeyPatch, experiment: str, topology: Topology) -> None:
    """Catches a parameter, or a moment of it, that each rank of a large job holds whole."""
    config = page(experiment)
    train = config.train
    check_fit(topology, config.model, train.seq_len, train.global_batch_rows, train.micro_batch_rows)
    monkeypatch.setattr(openmoe.parallel.parallelize, "fill", lambda *_: None)
    with META:
        whole = Decoder(config.model)
    state = build_optimizer(config.optim, whole.named_parameters())
    everything = size_bytes(whole.parameters()) + size_bytes(optimizer_tensors(state))
    ideal = everything * topology.replicate / topology.world_size
    for rank in (0, 1, 333, WORLD_SIZE - 1):
        found = bytes_of_rank(config, topology, rank)
        assert found == pytest.approx(ideal, rel=0.05)
