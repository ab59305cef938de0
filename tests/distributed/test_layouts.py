"""The same training under any layout: losses, gradients and routing against one process.

Here each layout has one variant, and two of the four blocks, as two cores are to be done in minutes;
`python -m tests.distributed.full_product` tries the whole models under several.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from openmoe.parallel.topology import Topology
from tests.distributed.comparison import (
    Setup,
    compare,
    setup,
    train_in_one_process,
    train_under_layout,
)
from tests.distributed.layouts import (
    LAYOUTS,
    MODELS,
    VARIANTS,
    Variant,
    name_of,
    one_variant_each,
    pairs,
    several_variants_each,
)
from tests.distributed.pool import Pool


def test_any_two_choices_meet() -> None:
    """Catches a list of cases that leaves out what goes wrong only together."""
    possible = set().union(*(pairs(topology, variant) for topology in LAYOUTS for variant in VARIANTS))
    assert set().union(*(pairs(*case) for case in one_variant_each())) == possible
    for topology in LAYOUTS:
        for model in MODELS:
            variants = [variant for variant in VARIANTS if variant.model == model]
            tried = [(t, v) for t, v in several_variants_each() if t == topology and v.model == model]
            assert tried[0] == (topology, Variant(model))
            assert set().union(*(pairs(*case) for case in tried)) == set().union(
                *(pairs(topology, variant) for variant in variants)
            )


def test_every_layout_is_tried() -> None:
    """Catches a list of layouts that lacks some: tensor 1 to 4, expert 1 to 8, copies and shards."""
    degrees = {
        (replicate, shard, tensor, expert)
        for replicate in (1, 2, 4, 8)
        for shard in (1, 2, 4, 8)
        for tensor in (1, 2, 4)
        for expert in (1, 2, 4, 8)
        if replicate * shard * tensor in (2, 4, 8) and shard * tensor % expert == 0
    }
    tried = [(t.replicate, t.shard, t.tensor, t.expert) for t, _ in one_variant_each()]
    assert len(tried) == len(degrees) == 45
    assert set(tried) == degrees


@pytest.fixture(scope="session")
def reference(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Setup], Path]:
    """File of what one process does, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("references")

    def file(setup: Setup) -> Path:
        path = folder / f"{setup.reference_key}.pt"
        if not path.exists():
            pool.run(train_in_one_process, 1, setup, path, timeout_seconds=120)
        return path

    return file


def check(
    pool: Pool,
    reference: Callable[[Setup], Path],
    topology: Topology,
    variant: Variant,
    n_layers: int | None = None,
) -> None:
    case = setup(topology, variant, n_layers)
    file = reference(case)
    ranks = pool.run(train_under_layout, topology.world_size, case, topology, file, timeout_seconds=120)
    found = compare(case, topology, torch.load(file, "cpu", weights_only=False), ranks)
    assert found.within_limits(), found


@pytest.mark.distributed
@pytest.mark.parametrize("model", MODELS)
def test_one_rank_with_a_group(pool: Pool, reference: Callable[[Setup], Path], model: str) -> None:
    """Catches a sharded path that needs a second rank; all that a single GPU can try."""
    check(pool, reference, Topology(1, 1, 1, 1, 1), Variant(model))


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("topology", "variant"),
    one_variant_each(),
    ids=[f"{name_of(topology)}-{variant}" for topology, variant in one_variant_each()],
)
def test_layout(pool: Pool, reference: Callable[[Setup], Path], topology: Topology, variant: Variant) -> None:
    """Catches whatever makes a layout train another model: wrong or missing sums, capacity by local tokens,
    losses by local counts, another initialisation, optimizer statistics of a shard."""
    check(pool, reference, topology, variant, n_layers=2)


def test_a_layout_of_everything(pool: Pool, reference: Callable[[Setup], Path]) -> None:
    """Catches the same, in `make test` too."""
    check(pool, reference, Topology(4, 1, 2, 2, 4), Variant("tiny_released"))
