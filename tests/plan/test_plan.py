"""What a plan says, against what a run does."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from openmoe.launcher.entry import load_page
from openmoe.launcher.plan import PlanPage, asked_for, main
from openmoe.launcher.schema import Config
from openmoe.model.batch import Batch
from openmoe.model.decoder import Decoder
from openmoe.parallel.build import build_decoder
from openmoe.parallel.parallelize import prepare_blocks
from openmoe.parallel.recompute import Recompute
from openmoe.parallel.topology import Topology
from openmoe.parallel.traffic import Step, Traffic, Update, layouts_of
from openmoe.plan.cluster import ClusterConfig
from openmoe.plan.memory import state_memory
from openmoe.plan.micro_batch import MicroBatchShape, trace_micro_batch
from openmoe.plan.search import Planner, Request
from openmoe.plan.step_time import collective_seconds
from openmoe.train.step import MicroBatch, loss_sums, weighted
from tests.distributed.comparison import page
from tests.distributed.test_memory import bytes_of_rank

CPU = torch.device("cpu")
CLUSTER = ClusterConfig(
    devices=16,
    devices_per_node=8,
    memory_bytes=10**9,
    reserved_bytes=0,
    flops_per_second={"fp32": 1e12},
    peak_flops_per_second={"fp32": 2e12},
    memory_bytes_per_second=1e11,
    node_bytes_per_second=100.0,
    network_bytes_per_second=10.0,
    node_latency_seconds=0.0,
    network_latency_seconds=0.0,
    operation_seconds=0.0,
)


def wide(rows_of: str = "tiny") -> Config:
    """A small model whose activations are far larger than its weights; dropless, so that what an expert gets
    does not depend on chance."""
    config = page(rows_of)
    heads = {"tiny": 4, "tiny_released": 6}[rows_of]
    widths = {"d_model": 32 * heads, "n_heads": heads, "head_dim": 32, "d_ff": 64 * heads}
    sizes = widths | {"vocab_size": 512, "dropless": True}
    train = config.train.model_copy(update={"seq_len": 512, "precision": "fp32"})
    return config.model_copy(update={"model": config.model.model_copy(update=sizes), "train": train})


def shape(config: Config, rows: int, recompute: Recompute = "none") -> MicroBatchShape:
    return MicroBatchShape(1, 1, "none", recompute, rows, config.train.seq_len, 1.0)


def micro_batch(config: Config, rows: int) -> MicroBatch:
    tokens = torch.randint(1, config.model.vocab_size, (rows, config.train.seq_len))
    return MicroBatch(Batch(tokens, tokens, torch.ones(tokens.shape)), torch.arange(tokens.numel()))


def run_passes(model: Decoder, config: Config, micro: MicroBatch) -> None:
    model.train()
    sums = loss_sums(model, micro)
    parts = {
        "lm_loss": sums.lm,
        "z_loss": sums.z,
        "load_balancing_loss": sum(s.load_balancing_sum for s in sums.router),
        "router_z_loss": sum(s.router_z_sum for s in sums.router),
    }
    weighted(parts, config.train).backward()


@pytest.mark.parametrize(
    ("experiment", "recompute"),
    [("tiny", "none"), ("tiny", "selective"), ("tiny", "full"), ("tiny_released", "none")],
)
def test_flops_are_those_of_the_counter(experiment: str, recompute: Recompute) -> None:
    """Catches an operation that the trace leaves out, and work that it sees twice."""
    config = wide(experiment)
    found = trace_micro_batch(config.model, config.train, shape(config, 2, recompute))
    model = build_decoder(config.model, "fp32", CPU, 0)
    prepare_blocks(model, recompute, compile_modules=False)
    with FlopCounterMode(display=False) as counter:
        run_passes(model, config, micro_batch(config, 2))
    model_config, seq_len = config.model, config.train.seq_len
    product = 2 * model_config.n_heads * seq_len**2 * model_config.head_dim * model_config.n_layers
    product *= 2 if model_config.mask_padding else 1  # under a mask all columns, else the visible half
    again = 2 if recompute == "full" else 0  # selective keeps the result of attention
    scores = (7 + again) * product  # of which the counter knows nothing on a CPU
    assert found.flops - scores == pytest.approx(counter.get_total_flops(), rel=0.01)


MEASURE = r"""
import re, sys, torch
from tests.plan.test_plan import CPU, build_decoder, micro_batch, prepare_blocks, run_passes, wide
torch.set_num_threads(1)
config, rows = wide(sys.argv[1]), int(sys.argv[2])
model = build_decoder(config.model, "fp32", CPU, 0)
prepare_blocks(model, sys.argv[3], compile_modules=False)
run_passes(model, config, micro_batch(config, 2))  # what torch allocates once, and the gradients
micro = micro_batch(config, rows)
def kib(what):  # unlike getrusage it knows nothing of the process that started this one
    return int(re.search(what + r":\s+(\d+) kB", open("/proc/self/status").read())[1])
now = kib("VmRSS")
run_passes(model, config, micro)
print(1024 * (kib("VmHWM") - now))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("experiment", "rows", "recompute"),
    [("tiny", 8, "none"), ("tiny_released", 16, "none"), ("tiny", 16, "full")],
)
def test_peak_of_activations_is_the_measured_one(experiment: str, rows: int, recompute: Recompute) -> None:
    """Catches memory that the trace believes freed, or kept."""
    config = wide(experiment)
    found = trace_micro_batch(config.model, config.train, shape(config, rows, recompute))
    # Each tensor of some size gets pages of its own, which go back at once.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    out = subprocess.run(
        [sys.executable, "-c", MEASURE, experiment, str(rows), recompute],
        env=environment, capture_output=True, text=True, check=True, timeout=240,
    ).stdout  # fmt: skip
    assert found.peak_bytes == pytest.approx(int(out), rel=0.10)


def test_state_is_that_of_the_built_ranks() -> None:
    """Catches a shard or a moment of another size than training makes."""
    config, topology = page("openmoe_8b"), Topology(512, 2, 32, 8, 32)
    step = Step(config.model, config.parallel, topology, "fp32", 2048, 1, 1)
    layouts = layouts_of(step)
    memory = state_memory(step, layouts, Update(step, layouts, config.optim))
    assert memory.parameters + memory.optimizer == bytes_of_rank(config, topology, 0)


@pytest.mark.parametrize(
    ("kind", "group", "seconds"),
    [
        # 800 bytes; 8 ranks of a node: 7/8 of them at 100 a second, twice for a sum.
        ("all_gather", "tensor", 7.0),
        ("all_reduce", "tensor", 14.0),
        # 2 ranks in 2 nodes, one of each: half of them at 10 a second.
        ("reduce_scatter", "shard", 40.0),
        # 16 ranks, 8 of each node, whose adapters work side by side: 15/16 at 80 a second.
        ("all_gather", "world", 800 * 15 / 16 / 80),
        # 8 of 16 receivers are in the other node.
        ("all_to_all", "expert", 40.0),
    ],
)
def test_seconds_of_a_collective(kind: str, group: str, seconds: float) -> None:
    """Catches a ring counted by its ranks, and groups within a node billed for the network."""
    topology = Topology(16, 1, 2, 8, 16)
    part = Traffic("test", group, kind, 1, 800)
    assert collective_seconds(part, topology, CLUSTER) == pytest.approx(seconds)
    slower = replace(part, size_bytes=1600)
    assert collective_seconds(slower, topology, CLUSTER) == pytest.approx(2 * seconds)


def open_layouts(*overrides: str) -> list[tuple[Topology, Recompute]]:
    config = load_page(PlanPage, "plan", ["experiment=tiny", "cluster=h200x8", *overrides])
    request = Request(config.model, config.optim, config.train, config.parallel, 1.0)
    return asked_for(Planner(request, config.cluster), config)


def test_named_degrees_are_kept() -> None:
    """Catches a plan for something else than was asked."""
    found = open_layouts("parallel.tensor=2", "parallel.recompute=full")
    assert {(topology.tensor, mode) for topology, mode in found} == {(2, "full")}
    assert len({topology.expert for topology, _ in found}) > 1
    pinned = open_layouts("cluster.devices_per_node=1", "parallel.shard=2", "parallel.tensor=4")
    assert {topology for topology, _ in pinned} == {Topology(8, 1, 2, 4, 1)}


def test_only_what_training_accepts_is_looked_at() -> None:
    """Catches overrides that end a run at its start."""
    assert {mode for _, mode in open_layouts("parallel.compile=true")} == {"none", "full"}
    fixed = open_layouts("parallel.exchange=fixed")
    assert {topology.tensor for topology, _ in fixed if topology.expert > 1} == {1}
    assert {topology.expert for topology, _ in open_layouts("model.dispatch=einsum")} == {1}


def test_expert_groups_that_cut_across_tensor_groups_are_traced() -> None:
    """Catches a smallest world that holds one of the two groups only."""
    config = wide()
    model = config.model.model_copy(update={"num_experts": 6})
    crossing = replace(shape(config, 2), tensor=2, expert=3, exchange="uneven")
    found = trace_micro_batch(model, config.train, crossing)
    assert found.by_part["experts"]


Command = Callable[..., str]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """command("key=value", ..., code=0) -> stdout; stderr where it ends with another exit code."""

    def run(*overrides: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", ["openmoe-plan", "experiment=tiny", "model.n_layers=2", *overrides])
        try:
            main()
            ended = 0
        except SystemExit as end:
            ended = int(end.code or 0)
        printed = capsys.readouterr()
        assert ended == code, printed.err
        return printed.err if code else printed.out

    return run


@pytest.mark.slow
def test_the_command_ranks_layouts(command: Command, tmp_path: Path) -> None:
    """Catches a table that is not in order, and overrides that are not the layout's."""
    printed = command(
        "cluster=h200x8", "cluster.devices=2", "cluster.price_per_device_hour=3", f"plan.output={tmp_path}"
    )
    records = json.loads((tmp_path / "plan.json").read_text())
    seconds = [record["step_seconds"] for record in records]
    assert seconds == sorted(seconds)
    first = records[0]
    assert (
        f"parallel.replicate={first['replicate']} parallel.shard={first['shard']} "
        f"parallel.tensor={first['tensor']} parallel.expert={first['expert']}"
    ) in printed
    assert first["cost"] == pytest.approx(first["days"] * 24 * 2 * 3)
    assert (tmp_path / "plan.png").stat().st_size > 10_000


def test_what_does_not_fit_is_refused_with_what_would(command: Command) -> None:
    """Catches a plan whose first line does not run."""
    line = command("cluster=h200x8", "cluster.devices=1", "cluster.memory_bytes=6012000000", code=2).strip()
    assert "\n" not in line
    assert "cluster.devices=1: the model does not fit" in line
    assert "allowed: 4 devices, where" in line
