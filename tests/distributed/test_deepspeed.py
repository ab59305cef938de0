"""The same training under DeepSpeed's engine as in one process, and what it refuses."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from openmoe.checkpoint.config import CheckpointConfig
from openmoe.checkpoint.manager import CheckpointManager, load_checkpoint
from openmoe.checkpoint.manifest import read_manifest
from openmoe.checkpoint.state import restore_counters, training_tensors
from openmoe.checkpoint.storage import write_checkpoint
from openmoe.checkpoint.together import Peers
from openmoe.launcher.entry import without_local_rank
from openmoe.launcher.errors import ConfigError
from openmoe.optim.config import AdafactorConfig, AdamWConfig, ConstantSchedule, OptimConfig
from openmoe.parallel.build import DTYPES
from openmoe.parallel.config import ParallelConfig
from openmoe.parallel.deepspeed_pairs import REFUSALS, check_supported
from openmoe.parallel.topology import Topology, TopologyError
from tests.distributed.comparison import (
    LOSSES,
    ONE,
    Setup,
    Training,
    compare,
    page,
    setup,
    train_in_one_process,
    train_under_layout,
)
from tests.distributed.layouts import Variant, name_of
from tests.distributed.pool import Pool
from tests.distributed.test_gradient_groups import SUMMED_OVER, gradients_of_powers_of_two, total

# With an epsilon of the gradients' size: updates then show their scale, and not what rounding leaves of the
# smallest ones.
ADAMW = AdamWConfig(
    name="adamw", schedule=ConstantSchedule(name="constant", value=1e-3), epsilon=1e-4, weight_decay=0.1
)


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
    parallel = case.config.parallel.model_copy(
        update={"engine": "deepspeed", "zero_stage": zero_stage, "overlap": "on"}
    )
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


TOPOLOGIES = {
    "alone": None,  # without a process group
    "data2": Topology(2, 1, 2, 1, 1),
    "data2-expert2": Topology(2, 1, 2, 1, 2),
    "tensor2-expert2": Topology(2, 1, 1, 2, 2),
    "data3": Topology(3, 1, 3, 1, 1),
    "copies2-data2-expert2": Topology(4, 2, 2, 1, 2),
    "data2-tensor2-expert4": Topology(4, 1, 2, 2, 4),
    "data2-tensor2": Topology(4, 1, 2, 2, 1),
}


@dataclass(frozen=True)
class Leg:
    """A piece of a training: `engine` is torch or zero0, zero1, zero2; updates `first` to `last` - 1."""

    layout: str
    engine: str
    first: int
    last: int
    frozen: bool = False  # routers


def train_leg(setup: Setup, leg: Leg, precision: str, given: Path | None, to: Path) -> list[dict[str, Any]]:
    """Metrics of its steps; goes on from the checkpoint `given` and writes another one."""
    topology = TOPOLOGIES[leg.layout] or ONE
    if TOPOLOGIES[leg.layout] is None:
        dist.destroy_process_group()
    if leg.engine == "torch":
        parallel = page("tiny").parallel
        setup = Setup(setup.config.model_copy(update={"parallel": parallel}), setup.variant)
    else:
        setup = under_deepspeed(setup, int(leg.engine[-1]))
    training = Training(setup, topology, precision)
    if given is not None:
        tensors = training_tensors(training.model, training.optimizer, training.ranks)
        load_checkpoint(given, tensors, {})
        restore_counters(training.optimizer, tensors, leg.first, training.ranks)
    if leg.frozen:
        training.model.freeze_routers()
    metrics = [training.step(number) for number in range(leg.first, leg.last)]
    tensors = training_tensors(training.model, training.optimizer, training.ranks)
    write_checkpoint(to, tensors, step=leg.last, tokens_seen=leg.last, milestone=False, model={}, metadata={})
    return metrics


def run_legs(
    pool: Pool, setup: Setup, legs: list[Leg], precision: str, folder: Path
) -> tuple[list[dict[str, Any]], Path]:
    """Metrics of all steps, and the last checkpoint."""
    metrics: list[dict[str, Any]] = []
    given: Path | None = None
    for number, leg in enumerate(legs):
        topology = TOPOLOGIES[leg.layout] or ONE
        to = folder / f"leg_{number}" / f"step_{leg.last}"
        ranks = pool.run(
            train_leg, topology.world_size, setup, leg, precision, given, to, timeout_seconds=250
        )
        metrics += ranks[0]
        given = to
    assert given is not None
    return metrics, given


def small(variant: Variant, optim: OptimConfig | None = None) -> Setup:
    case = setup(TOPOLOGIES["copies2-data2-expert2"] or ONE, variant, n_layers=2)
    # Three ranks share this evenly in no layout of rows but have shards of unequal size.
    train = case.config.train.model_copy(update={"global_batch_rows": 24, "seq_len": 32})
    changes = {"train": train, "optim": optim or case.config.optim}
    return Setup(case.config.model_copy(update=changes), case.variant)


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, entry in read_manifest(checkpoint).tensors.items():
        found[name] = torch.empty(entry.shape, dtype=getattr(torch, entry.dtype.removeprefix("torch.")))
    load_checkpoint(checkpoint, found, {})
    return found


def losses(metrics: list[dict[str, Any]]) -> list[list[float]]:
    return [[line[name] for name in (*LOSSES, "grad_norm")] for line in metrics]


UNBROKEN = 14  # updates: four, a checkpoint, ten more


@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize("optimizer", ["adafactor", "adamw"])
def test_between_engines(engine_pool: Pool, optimizer: str, tmp_path: Path) -> None:
    """Catches a checkpoint of one engine that another one reads as something else: parameters that the
    engine keeps elsewhere, counters that start again, parts of other shapes."""
    case = small(Variant(RELEASED), ADAMW if optimizer == "adamw" else None)
    unbroken, _ = run_legs(
        engine_pool, case, [Leg("alone", "torch", 0, UNBROKEN)], "fp64", tmp_path / "unbroken"
    )
    pairs = [
        (("data2-expert2", "torch"), ("data2-tensor2-expert4", "zero0")),
        (("data3", "zero0"), ("alone", "torch")),
        (("copies2-data2-expert2", "zero0"), ("tensor2-expert2", "zero0")),
    ]
    for number, (start, end) in enumerate(pairs):
        legs = [Leg(*start, 0, 4), Leg(*end, 4, UNBROKEN)]
        metrics, _ = run_legs(engine_pool, case, legs, "fp64", tmp_path / str(number))
        difference = np.abs(np.subtract(losses(metrics), losses(unbroken))).max()
        assert difference < 1e-10, (start, end)


@pytest.mark.distributed
def test_frozen_routers(engine_pool: Pool, tmp_path: Path) -> None:
    """Catches a missing gradient that the engine takes for zeros: decay would move the weights."""
    case = small(Variant(RELEASED), ADAMW)
    checkpoints = [
        run_legs(engine_pool, case, [Leg(layout, engine, 0, 2, frozen=True)], "fp64", tmp_path / layout)[1]
        for layout, engine in (("alone", "torch"), ("data2-tensor2-expert4", "zero0"))
    ]
    alone, found = map(tensors_of, checkpoints)
    for name, tensor in found.items():
        if name.startswith("model/"):
            assert torch.allclose(tensor, alone[name], rtol=0, atol=1e-10), name


ZERO_CASES = [
    ("data2", "zero1", 1),
    ("data2-expert2", "zero2", 4),
    ("tensor2-expert2", "zero1", 1),
    ("data3", "zero2", 1),
    ("copies2-data2-expert2", "zero1", 3),
    ("data2-tensor2-expert4", "zero2", 1),
    ("data2-tensor2", "zero1", 4),
]


@pytest.mark.distributed
@pytest.mark.timeout(900)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zero(engine_pool: Pool, precision: str, tmp_path: Path) -> None:
    """Catches gradients of a run that lack other ranks' or other micro-batches' terms, a norm that counts
    copies or padding, decay on norms, and experts that are shared out among ranks that have others."""
    case = small(Variant(), ADAMW)
    alone, checkpoint = run_legs(
        engine_pool, case, [Leg("alone", "torch", 0, 4)], precision, tmp_path / "alone"
    )
    expected = tensors_of(checkpoint)
    limit = 1e-6 if precision == "fp32" else 5e-3
    for layout, engine, micro_batches in ZERO_CASES if precision == "fp32" else ZERO_CASES[-2:]:
        variant = Variant(micro_batches=micro_batches)
        folder = tmp_path / f"{layout}_{engine}"
        metrics, checkpoint = run_legs(
            engine_pool, Setup(case.config, variant), [Leg(layout, engine, 0, 4)], precision, folder
        )
        found = tensors_of(checkpoint)
        assert found.keys() == expected.keys()
        worst = {
            name: (tensor.double() - expected[name].double()).abs().max().item()
            for name, tensor in found.items()
            if name.startswith("model/")
        }
        assert max(worst.values()) < limit, (layout, engine, max(worst.items(), key=lambda item: item[1]))
        norms = [[line["grad_norm"] for line in lines] for lines in (metrics, alone)]
        assert np.allclose(*norms, rtol=1e-5 if precision == "fp32" else 1e-2), (layout, engine)


@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_state_of_zero_by_parameter(engine_pool: Pool, tmp_path: Path) -> None:
    """Catches a state that is taken for another parameter's, lost at the end of a run or between two, added
    up over copies, or that is not put back."""
    case = small(Variant(), ADAMW)
    way = [
        ("data3", "zero1"),
        ("data2-tensor2-expert4", "torch"),
        ("copies2-data2-expert2", "zero2"),
        ("data2-tensor2", "zero1"),
        ("alone", "torch"),
    ]
    # The first takes two steps; the others only read and write.
    legs = [Leg(*place, 0 if number == 0 else 2, 2) for number, place in enumerate(way)]
    _, last = run_legs(engine_pool, case, legs, "fp32", tmp_path)
    first = tensors_of(tmp_path / "leg_0" / "step_2")
    assert any(tensor.any() for name, tensor in first.items() if name.endswith("/exp_avg_sq"))
    for number in range(1, len(way)):
        found = tensors_of(tmp_path / f"leg_{number}" / "step_2")
        assert found.keys() == first.keys()
        assert all(torch.equal(tensor, first[name]) for name, tensor in found.items()), way[number]
    # And a run that goes on from there goes on as if nothing had been.
    unbroken, _ = run_legs(engine_pool, case, [Leg("alone", "torch", 0, 4)], "fp32", tmp_path / "unbroken")
    topology = TOPOLOGIES["data2"] or ONE
    go_on = Leg("data2", "zero2", 2, 4)
    ranks = engine_pool.run(
        train_leg, topology.world_size, case, go_on, "fp32", last, tmp_path / "end" / "step_4",
        timeout_seconds=250,
    )  # fmt: skip
    difference = np.abs(np.subtract(losses(ranks[0]), losses(unbroken[2:])))
    assert difference.max() < 1e-4, difference


def save_and_train_on(setup: Setup, stage: int, folder: Path) -> None:
    """The checkpoint of step 1 twice: by a save that is waited for, and by one beside the next steps."""
    training = Training(under_deepspeed(setup, stage), TOPOLOGIES["data2-expert2"] or ONE, "fp32")
    training.step(0)

    def tensors() -> dict[str, Tensor]:
        return training_tensors(training.model, training.optimizer, training.ranks)

    waited = folder / "waited" / "step_1"
    write_checkpoint(waited, tensors(), step=1, tokens_seen=1, milestone=False, model={}, metadata={})
    checkpoints = CheckpointManager(
        folder, CheckpointConfig(keep=0, asynchronous=True), Peers(dist.new_group(backend="gloo"))
    )
    training.optimizer.register_step_pre_hook(lambda *_: checkpoints.wait_to_update())
    take = checkpoints._copies.take

    def take_late() -> dict[str, Any]:
        time.sleep(2)  # an update takes less
        return take()

    checkpoints._copies.take = take_late  # type: ignore[method-assign]
    checkpoints.save(tensors(), step=1, tokens_seen=1, milestone=False, model={}, metadata={})
    for number in (1, 2):
        training.step(number)
    checkpoints.finish()


@pytest.mark.distributed
@pytest.mark.timeout(600)
@pytest.mark.parametrize("stage", [1, 2])
def test_zero_trains_on_beside_a_save(engine_pool: Pool, stage: int, tmp_path: Path) -> None:
    """Catches an engine whose update does not wait for the copying, and runs that are copied half updated."""
    engine_pool.run(save_and_train_on, 2, small(Variant(), ADAMW), stage, tmp_path, timeout_seconds=250)
    waited = tensors_of(tmp_path / "waited" / "step_1")
    found = tensors_of(tmp_path / "checkpoints" / "step_1")
    assert found.keys() == waited.keys()
    assert [name for name, tensor in found.items() if not torch.equal(tensor, waited[name])] == []


@pytest.mark.distributed
def test_started_by_its_own_launcher(tmp_path: Path) -> None:
    """Catches the launcher's --local_rank, which is no key of a configuration, what DeepSpeed prints to the
    standard output, and a run that ends otherwise than others do."""
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("needs the extra deepspeed")
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    keys = [
        "experiment=tiny", "optim=adamw", f"run.dir={tmp_path / 'run'}", "run.device=cpu", "train.steps=2",
        "train.seq_len=64", "train.validation_rows=0", "model.n_layers=2", "logging.wandb=disabled",
        "parallel.engine=deepspeed", "parallel.zero_stage=1", "parallel.expert=2",
    ]  # fmt: skip
    ended = subprocess.run(
        [*launcher, "--master_port", str(port), "--module", "openmoe.launcher.train", *keys],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        | {"TORCH_EXTENSIONS_DIR": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert (tmp_path / "run" / "checkpoints" / "step_2").is_dir()
    assert "Warning" not in ended.stderr


def test_the_launchers_own_option() -> None:
    """Catches a key that looks like the launcher's option, and a rank that the environment does not know."""
    arguments = ["train.py", "--local_rank=1", "train.steps=2", "--cfg", "job"]
    assert without_local_rank(arguments, 1) == ["train.py", "train.steps=2", "--cfg", "job"]
    with pytest.raises(ConfigError, match="--local_rank=1: allowed LOCAL_RANK=0"):
        without_local_rank(arguments, 0)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "parallel.zero_stage=3: allowed 0, 1 and 2": ({"zero_stage": 3}, {}),
    "parallel.zero_stage=1 with optim=adafactor": ({"zero_stage": 1}, {}),
    "parallel.zero_stage=2 with train.precision=fp64": (
        {"zero_stage": 2},
        {"optim": ADAMW, "precision": "fp64"},
    ),
    "train.freeze_router_at_step with parallel.zero_stage=1": (
        {"zero_stage": 1},
        {"optim": ADAMW, "freezes": True},
    ),
    "parallel.compile=true": ({"compile": True}, {}),
    "parallel.engine=deepspeed: allowed in processes": ({}, {"alone": True}),
    "the package deepspeed is not installed": ({}, {"installed": False}),
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_is_refused(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a pair that nobody has tried, which starts and trains another model."""
    keys, changes = REFUSED[line]
    rest = dict(changes)
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


SUPPORTED = [
    *((0, optim, precision) for optim in (AdafactorConfig(name="adafactor"), ADAMW) for precision in DTYPES),
    *((stage, ADAMW, precision) for stage in (1, 2) for precision in ("fp32", "bf16")),
]


@pytest.mark.parametrize(("stage", "optim", "precision"), SUPPORTED, ids=str)
def test_what_is_supported(
    stage: int, optim: OptimConfig, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a refusal that takes too much with it."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    parallel = ParallelConfig(engine="deepspeed", zero_stage=stage)
    check_supported(parallel, optim, precision, freezes=stage == 0, alone=False)


def test_every_refusal_is_tried() -> None:
    """Catches a line of the table that no test asks for."""
    assert len(REFUSED) == len(REFUSALS)
