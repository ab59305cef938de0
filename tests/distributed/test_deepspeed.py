"""The same training under DeepSpeed's engine as in one process, and what it refuses."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from openmoe.optim.config import AdafactorConfig, AdamWConfig, ConstantSchedule, OptimConfig
from openmoe.parallel.config import ParallelConfig
from openmoe.parallel.deepspeed_pairs import REFUSALS, check_supported
from openmoe.parallel.topology import Topology, TopologyError
from tests.distributed.comparison import Setup, compare, setup, train_in_one_process, train_under_layout
from tests.distributed.layouts import Variant, name_of
from tests.distributed.pool import Pool
from tests.distributed.test_gradient_groups import SUMMED_OVER, gradients_of_powers_of_two, total

ADAMW = AdamWConfig(name="adamw", schedule=ConstantSchedule(name="constant", value=1e-3))


@pytest.fixture(scope="module")
def engine_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Ranks that have DeepSpeed from the start, which takes as long to import as torch."""
    pytest.importorskip("deepspeed", reason="needs the extra deepspeed")
    folder = tmp_path_factory.mktemp("pool")
    environment = {
        "DS_ACCELERATOR": "cpu",
        "LOCAL_RANK": "0",  # a launcher would say so
        "TORCH_EXTENSIONS_DIR": str(folder / "extensions"),  # nothing is built; if it were, for nobody else
    }
    pool = Pool(folder, environment, imports="deepspeed")
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def reference(engine_pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Setup], Path]:
    """File of what one process does, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("references")

    def file(case: Setup) -> Path:
        path = folder / f"{case.reference_key}_{case.config.optim.name}.pt"
        if not path.exists():
            engine_pool.run(train_in_one_process, 1, case, path, timeout_seconds=250)
        return path

    return file


def under_deepspeed(case: Setup, zero_stage: int = 0, optim: OptimConfig | None = None) -> Setup:
    parallel = case.config.parallel.model_copy(update={"engine": "deepspeed", "zero_stage": zero_stage})
    changes: dict[str, Any] = {"parallel": parallel, "optim": optim or case.config.optim}
    return Setup(case.config.model_copy(update=changes), case.variant)


RELEASED = "tiny_released"
CASES: list[tuple[Topology, Variant, OptimConfig | None]] = [
    (Topology(1, 1, 1, 1, 1), Variant(), None),
    (Topology(2, 1, 2, 1, 1), Variant(micro_batches=4), None),
    (Topology(2, 1, 2, 1, 2), Variant(RELEASED, dropless=True, recompute="full"), ADAMW),
    (Topology(2, 1, 1, 2, 1), Variant(), ADAMW),
    (Topology(2, 1, 1, 2, 2), Variant(RELEASED, dropless=True, micro_batches=4), None),
    (Topology(4, 2, 2, 1, 2), Variant(dropless=True, micro_batches=4, recompute="selective"), None),
    (Topology(4, 1, 2, 2, 4), Variant(RELEASED, micro_batches=4), None),
    (Topology(4, 1, 2, 2, 1), Variant(exchange="uneven"), None),  # experts' gradients come from all ranks
    (Topology(4, 2, 1, 2, 2), Variant(RELEASED), ADAMW),
]


def name_of_case(case: tuple[Topology, Variant, OptimConfig | None]) -> str:
    topology, variant, optim = case
    return f"{name_of(topology)}-{variant}-{optim.name if optim else 'adafactor'}"


@pytest.mark.distributed
@pytest.mark.parametrize("case", CASES, ids=map(name_of_case, CASES))
def test_without_zero(
    engine_pool: Pool,
    reference: Callable[[Setup], Path],
    case: tuple[Topology, Variant, OptimConfig | None],
) -> None:
    """Catches sums of gradients that are means, over other ranks, in float32 or once for each micro-batch,
    weights that the start of the engine overwrites, an optimizer that sees other shapes or steps twice."""
    topology, variant, optim = case
    wanted = under_deepspeed(setup(topology, variant, n_layers=2), optim=optim)
    file = reference(wanted)
    ranks = engine_pool.run(
        train_under_layout, topology.world_size, wanted, topology, file, timeout_seconds=250
    )
    found = compare(wanted, topology, torch.load(file, "cpu", weights_only=False), ranks)
    assert found.within_limits(), found


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("topology", "micro_batches"),
    [(Topology(4, 2, 2, 1, 2), 4), (Topology(4, 1, 2, 2, 4), 1), (Topology(4, 1, 2, 2, 1), 1)],
    ids=str,
)
def test_groups_of_gradients(engine_pool: Pool, topology: Topology, micro_batches: int) -> None:
    """Catches experts' gradients summed over all data ranks, a sum divided by their number, and norms or
    routers that know their own tokens only."""
    case = under_deepspeed(setup(topology, Variant(RELEASED, micro_batches=micro_batches), n_layers=2))
    results = engine_pool.run(gradients_of_powers_of_two, 4, case, topology, timeout_seconds=120)
    for rank, extremes in enumerate(results):
        assert extremes
        for name, found in extremes.items():
            group = next(group for ending, group in SUMMED_OVER.items() if name.endswith(ending))
            expected = micro_batches * total(topology.group(group, rank))
            assert found == (expected, expected), (name, rank)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "parallel.zero_stage=1": ({"zero_stage": 1}, {}),
    "parallel.compile=true": ({"compile": True}, {}),
    "parallel.engine=deepspeed: allowed in processes": ({}, {"alone": True}),
    "the package deepspeed is not installed": ({}, {"installed": False}),
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_is_refused(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a pair that nobody has tried, which starts and trains another model."""
    keys, rest = REFUSED[line]
    installed = rest.pop("installed", True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object() if installed else None)
    asked = {
        "parallel": ParallelConfig(engine="deepspeed", **keys),
        "optim": AdafactorConfig(name="adafactor"),
        "precision": "fp32",
        "freezes": False,
        "alone": False,
    }
    with pytest.raises(TopologyError) as refused:
        check_supported(**(asked | rest))
    assert line in str(refused.value)
    assert "\n" not in str(refused.value)


def test_every_refusal_is_tried() -> None:
    """Catches a line of the table that no test asks for."""
    assert len(REFUSED) == len(REFUSALS)
