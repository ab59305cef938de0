"""What the layouts of test_layouts leave at its default: other models, another optimizer, bfloat16."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from openmoe.optim.config import AdamWConfig, ConstantSchedule
from openmoe.parallel.ranks import ShardedRanks
from openmoe.parallel.topology import Topology
from tests.distributed.comparison import (
    GradientReader,
    Reference,
    Setup,
    Training,
    compare,
    setup,
    train_in_one_process,
    train_under_layout,
)
from tests.distributed.device import device
from tests.distributed.layouts import Variant
from tests.distributed.pool import Pool

ALL = Topology(4, 1, 2, 2, 4)
OPTIONS: dict[str, tuple[Topology, dict[str, Any]]] = {
    "tied head": (ALL, {"tied_head": True}),
    "prefix attention, one choice": (ALL, {"attention": "prefix", "top_k": 1}),
    "uneven shards": (Topology(3, 1, 3, 1, 1), {"vocab_size": 4481, "d_ff": 250, "num_experts": 7}),
    "no experts": (Topology(4, 2, 1, 2, 1), {"moe_every": 0}),
}


def case_of(topology: Topology, options: dict[str, Any]) -> Setup:
    case = setup(topology, Variant(), n_layers=2)
    rows = topology.size("data") * 4
    model = case.config.model.model_copy(update=options)
    train = case.config.train.model_copy(update={"global_batch_rows": rows})
    return Setup(case.config.model_copy(update={"model": model, "train": train}), case.variant)


def check(pool: Pool, case: Setup, topology: Topology, file: Path) -> None:
    pool.run(train_in_one_process, 1, case, file, timeout_seconds=120)
    ranks = pool.run(train_under_layout, topology.world_size, case, topology, file, timeout_seconds=120)
    found = compare(case, topology, torch.load(file, "cpu", weights_only=False), ranks)
    assert found.within_limits(), found


@pytest.mark.distributed
@pytest.mark.parametrize("options", OPTIONS)
def test_other_models(options: str, pool: Pool, tmp_path: Path) -> None:
    """Catches a head that is the embedding and gets half its gradient, shards of unequal size, a dense model
    that waits for experts."""
    topology, changes = OPTIONS[options]
    check(pool, case_of(topology, changes), topology, tmp_path / "reference.pt")


@pytest.mark.distributed
def test_adamw(pool: Pool, tmp_path: Path) -> None:
    """Catches an optimizer that sees FSDP's tensors, or shards without their state."""
    optim = AdamWConfig(name="adamw", schedule=ConstantSchedule(name="constant", value=1e-3))
    case = case_of(ALL, {})
    case = Setup(case.config.model_copy(update={"optim": optim}), case.variant)
    check(pool, case, ALL, tmp_path / "reference.pt")


def bfloat16_errors(setup: Setup, topology: Topology, file: Path) -> dict[str, tuple[float, float]]:
    """For each gradient the squares of its difference from float32 and of itself, of this rank's part."""
    reference: Reference = torch.load(file, device(), weights_only=False)
    training = Training(setup, topology, "bf16")
    reader = GradientReader(training.ranks)
    training.step(0, reader)
    assert isinstance(training.ranks, ShardedRanks)
    errors = {}
    for name, gradient in reader.gradients.items():
        assert gradient.dtype == torch.float32
        whole = reference.gradients[name][training.ranks.layouts[name].slices(topology, dist.get_rank())]
        errors[name] = (gradient - whole).square().sum().item(), whole.square().sum().item()
    return errors


@pytest.mark.distributed
def test_bfloat16(pool: Pool, tmp_path: Path) -> None:
    """Catches gradients that are summed in bfloat16, over ranks or over the occurrences of a token, and a
    router that computes in it: they lose 10% and more where rounding alone costs 2%."""
    case = case_of(ALL, {})
    train = case.config.train.model_copy(update={"global_batch_rows": 64, "seq_len": 256})
    case = Setup(case.config.model_copy(update={"train": train}), case.variant)
    file = tmp_path / "reference.pt"
    pool.run(train_in_one_process, 1, case, file, timeout_seconds=250)
    ranks = pool.run(bfloat16_errors, 4, case, ALL, file, timeout_seconds=120)
    for name in ranks[0]:
        error, size = (sum(found[name][i] for found in ranks) for i in (0, 1))
        assert (error / size) ** 0.5 < 0.04, name
